"""Checkpoints: all that a run needs to go on exactly where it was."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from deepeq.models import MEMORY_TYPES
from deepeq.train.storage import DamagedError, Stored, open_stored, write_file, write_folder

FORMAT = "deepeq-checkpoint-3"

_TUPLES = {kind.__name__: kind for kind in MEMORY_TYPES}


class Checkpoint(NamedTuple):
    """What a checkpoint holds besides the state of model and optimizer."""

    progress: dict[str, Any]  # what JSON can hold
    memory: Any  # of the training streams: tensors (B, ...) in tuples
    random: dict[str, Tensor]  # (W, n) by device: a state for each process


def save_checkpoint(
    path: Path,
    model: nn.Module,
    content: Checkpoint,
    *,
    optimizer: Optimizer | None = None,
    fabric: Fabric | None = None,
) -> None:
    """Write a checkpoint: a folder of shards where `path` has no suffix, otherwise one file.

    With several processes, all of them call this, and the first one writes the file. An older checkpoint stays whole
    until this one is complete.

    Args:
        path: The file, or the folder.
        model: Its parameters are kept.
        content: The rest; of the memory, the rows of this process.
        optimizer: Its state is kept by parameter name; without it the checkpoint is for evaluation only.
        fabric: That of the run, if there are several processes.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        for name, state in _states(model, optimizer).items():
            tensors |= {f"optimizer.{name}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    tensors |= {f"random.{device}": states for device, states in content.random.items()}
    sharded = not path.suffix
    leaves: list[Tensor] = []
    structure = _describe(content.memory, leaves, 1 if fabric is None else fabric.world_size)
    metadata = {"format": FORMAT, "progress": json.dumps(content.progress), "memory": json.dumps(structure)}
    for index, leaf in enumerate(leaves):
        tensors[f"memory.{index}"] = _all_rows(leaf, fabric, sharded=sharded)
    if sharded:
        assert fabric is not None
        write_folder(path, tensors, metadata, fabric)
        return
    first = fabric is None or fabric.is_global_zero
    whole = {}
    for name, value in tensors.items():  # one at a time: a device may have no room for all that is sharded
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if first:
            whole[name] = value.cpu()
    if first:
        write_file(path, whole, metadata)


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer | None = None) -> Checkpoint:
    """Put a checkpoint into a model, and into its optimizer if one is given; return the rest, with all rows.

    The number of processes, and whether they share the parameters out, may be another than when it was saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, foreign, or of another model; nothing was changed then.
    """
    stored = open_stored(path)
    content = read_content(stored)
    if optimizer is not None and not content.random:
        raise ValueError(f"{path} holds no optimizer state, so training cannot go on from it; use another checkpoint")
    _load_model(stored, model)
    if optimizer is not None:
        _load_optimizer(stored, model, optimizer)
    return content


def read_content(stored: Stored) -> Checkpoint:
    """What a checkpoint holds besides the state of model and optimizer.

    Raises:
        ValueError: it is damaged or foreign.
    """
    path = stored.path
    if stored.metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no checkpoint of this version of deepeq (format {stored.metadata.get('format')!r})"
        )
    try:
        return _content(stored)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DamagedError(f"{path} is damaged ({error}); use another checkpoint") from error


def random_states(fabric: Fabric) -> dict[str, Tensor]:
    """The states of the sources of random numbers of all processes, `(W, n)` by device."""
    states = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: _gather(state.unsqueeze(0), fabric).cpu() for device, state in states.items()}


def set_random_states(states: dict[str, Tensor], fabric: Fabric) -> bool:
    """Set those of this process; returns False, and sets none, if they are of another number of processes."""
    if len(states["cpu"]) != fabric.world_size:
        return False
    # Clones: torch reads a state from the start of its storage, wherever the row of a tensor begins.
    torch.set_rng_state(states["cpu"][fabric.global_rank].clone())
    if "cuda" in states and fabric.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][fabric.global_rank].clone())
    return True


def _content(stored: Stored) -> Checkpoint:
    def read(prefix: str) -> dict[str, Tensor]:
        targets = {name: torch.zeros_like(held, device="cpu") for name, held in _part(stored.tensors, prefix).items()}
        stored.read_into({prefix + name: target for name, target in targets.items()})
        return targets

    random = read("random.")
    if "cpu" in random:
        torch.Generator().set_state(random["cpu"][0])  # before anything is changed
    memory = _rebuild(json.loads(stored.metadata["memory"]), read("memory."))
    return Checkpoint(json.loads(stored.metadata["progress"]), memory, random)


def _describe(memory: Any, leaves: list[Tensor], num_processes: int) -> Any:
    """The structure of a memory for JSON; a tensor goes to `leaves` and leaves its number, an empty one its shape."""
    if memory is None:
        return None
    if isinstance(memory, Tensor):
        if memory.numel() == 0:
            shape = [memory.shape[0] * num_processes, *memory.shape[1:]]
            return {"shape": shape, "dtype": str(memory.dtype).removeprefix("torch.")}
        leaves.append(memory)
        return len(leaves) - 1
    return [type(memory).__name__, *(_describe(part, leaves, num_processes) for part in memory)]


def _rebuild(structure: Any, leaves: dict[str, Tensor]) -> Any:
    if structure is None:
        return None
    if isinstance(structure, int):
        return leaves[str(structure)]
    if isinstance(structure, dict):
        return torch.zeros(structure["shape"], dtype=getattr(torch, structure["dtype"]))
    name, *parts = structure
    rebuilt = tuple(_rebuild(part, leaves) for part in parts)
    return rebuilt if name == "tuple" else _TUPLES[name](*rebuilt)


def _all_rows(leaf: Tensor, fabric: Fabric | None, *, sharded: bool) -> Tensor:
    """The rows of all processes."""
    if sharded:
        assert fabric is not None
        assert isinstance(fabric.strategy, ModelParallelStrategy)
        return DTensor.from_local(leaf.contiguous(), fabric.strategy.device_mesh["data_parallel"], [Shard(0)])
    return leaf if fabric is None else _gather(leaf, fabric)


def _gather(rows: Tensor, fabric: Fabric) -> Tensor:
    if fabric.world_size == 1:
        return rows
    rows = rows.to(fabric.device).contiguous()
    gathered = [torch.empty_like(rows) for _ in range(fabric.world_size)]
    torch.distributed.all_gather(gathered, rows)
    return torch.cat(gathered)


def _load_model(stored: Stored, model: nn.Module) -> None:
    wanted, held = model.state_dict(), _part(stored.tensors, "model.")
    wrong = sorted(set(wanted) ^ set(held)) or [name for name in wanted if wanted[name].shape != held[name].shape]
    if wrong:
        raise ValueError(
            f"{stored.path} belongs to another model: {wrong[0]} differs (and {len(wrong) - 1} more); "
            "use the configuration in its own run folder"
        )
    stored.read_into({f"model.{name}": tensor.detach() for name, tensor in wanted.items()})


def _load_optimizer(stored: Stored, model: nn.Module, optimizer: Optimizer) -> None:
    saved = _part(stored.tensors, "optimizer.")
    states: dict[Tensor, dict[str, Tensor]] = {}
    targets: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, held in _part(saved, f"{name}/").items():
            # Adam's step counters stay on the CPU; its moments live beside their parameter.
            beside = held.shape == parameter.shape
            value = torch.zeros_like(parameter.detach()) if beside else torch.zeros_like(held, device="cpu")
            targets[f"optimizer.{name}/{key}"] = states.setdefault(parameter, {})[key] = value
    stored.read_into(targets)
    optimizer.state.update(states)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _states(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
