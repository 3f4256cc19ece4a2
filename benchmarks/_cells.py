"""Maps for the benchmarks of solvers: two trained language cells with real inputs, and three that are no language.

    python benchmarks/_cells.py --run RUN_DIR --name NAME

saves the cell of a run with the input and the memory of a validation segment, in 16 bits, as cells/NAME.safetensors.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from deepeq.cell import prepare
from deepeq.data import Corpus
from deepeq.models import Memory, TiedNetwork, TransformerConfig, TrellisConfig, TrellisMemory
from deepeq.packing import Packing
from deepeq.train import open_model

Map = Callable[[Tensor], Tensor]
FOLDER = Path(__file__).parent / "cells"
LAYERS = {"TransformerConfig": (TransformerConfig, Memory), "TrellisConfig": (TrellisConfig, TrellisMemory)}


def save(run: Path, name: str, segment_len: int, batch_size: int = 16) -> None:
    """Write the cell of a run, with the third validation segment and its memory."""
    trained = open_model(run)
    model, corpus = trained.model.eval(), trained.load_corpus()
    assert isinstance(corpus, Corpus)
    assert isinstance(model.network, TiedNetwork)
    batches, memory = corpus.stream("valid", batch_size=batch_size, segment_len=segment_len), None
    segments = [batches.segment(index)[0] for index in range(3)]
    with torch.no_grad():
        for tokens in segments[:2]:
            memory = model(tokens, memory, how=trained.how).memory
        x = model.embedding(segments[2])
    parts = {f"memory.{name}": part for name, part in memory._asdict().items()}
    cell = {f"cell.{key}": value for key, value in model.network.cell.state_dict().items()}
    layer = trained.config.model.layer
    tensors = {key: value.bfloat16().contiguous() for key, value in (cell | parts | {"x": x}).items()}
    metadata = {"layer": type(layer).__name__, "fields": json.dumps(asdict(layer))}
    save_file(tensors, FOLDER / f"{name}.safetensors", metadata=metadata)


def trained(name: str) -> tuple[Map, Tensor]:
    """Return the map of a saved cell on states `(B, N)`, and zeros to start from."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    config, memory = LAYERS[metadata["layer"]]
    cell = config(**json.loads(metadata["fields"])).build().eval()
    cell.load_state_dict({key[5:]: value for key, value in tensors.items() if key.startswith("cell.")})
    before = memory(**{name: tensors[f"memory.{name}"] for name in memory._fields})
    f, z0 = prepare(cell.requires_grad_(False), tensors["x"], memory=before)
    packing = Packing(z0)
    return lambda z: packing.pack(f(packing.unpack(z))), packing.pack(z0)


def convolution() -> tuple[Map, Tensor]:
    """Return a multiscale cell: 24 channels at 32 x 32 and at 16 x 16, a batch of 8, group normalization."""
    c = 24
    inner = [nn.Conv2d(c, c, 3, padding=1) for _ in range(2)]
    outer = [nn.Conv2d(c, c, 3, padding=1) for _ in range(2)]
    down, up = nn.Conv2d(c, c, 3, stride=2, padding=1), nn.Conv2d(c, c, 1)
    norms, u = [nn.GroupNorm(4, c) for _ in range(2)], torch.randn(8, c, 32, 32)
    for layer in (*inner, *outer):
        layer.weight.data *= 1.4
    packing = Packing((torch.zeros(8, c, 32, 32), torch.zeros(8, c, 16, 16)))

    def f(z: Tensor) -> Tensor:
        state = packing.unpack(z)
        fine, coarse = (b(a(part).relu()) for a, b, part in zip(inner, outer, state, strict=True))
        fine = norms[0](u + fine + interpolate(up(state[1]), scale_factor=2))
        return packing.pack((fine, norms[1](coarse + down(state[0]))))

    return f, packing.pack((torch.zeros(8, c, 32, 32), torch.zeros(8, c, 16, 16)))


def graph() -> tuple[Map, Tensor]:
    """Return one coupled problem: 500 nodes of 32 channels, a dense adjacency matrix, slowly contracting."""
    adjacency = (torch.rand(500, 500) < 0.02).float()
    adjacency = adjacency / torch.linalg.matrix_norm(adjacency, 2)
    weight = torch.linalg.qr(torch.randn(32, 32))[0]
    u = torch.randn(500, 32)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(1.2 * (adjacency @ z.view(500, 32)) @ weight + 0.3 * u).view(1, -1)

    return f, torch.zeros(1, 500 * 32)


def mlp() -> tuple[Map, Tensor]:
    """Return 256 small problems of width 64."""
    weight, u = 1.2 * torch.randn(64, 64) / 8.0, torch.randn(256, 64)
    return lambda z: torch.tanh(z @ weight.T + u), torch.zeros(256, 64)


CELLS: dict[str, Callable[[], tuple[Map, Tensor]]] = {
    "transformer": lambda: trained("transformer"),
    "trellis": lambda: trained("trellis"),
    "convolution": convolution,
    "graph": graph,
    "mlp": mlp,
}


def make(name: str) -> tuple[Map, Tensor]:
    """Return a map of packed states `(B, N)` without gradients to its parameters, and its first state."""
    torch.manual_seed(0)
    return CELLS[name]()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--segment_len", type=int, default=64)
    arguments = parser.parse_args()
    save(arguments.run, arguments.name, arguments.segment_len)
