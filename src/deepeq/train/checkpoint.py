"""Checkpoints: everything that a run needs to continue exactly where it was.

A checkpoint is a folder: safetensors files, one from each process, and `manifest.json` with the rest and with SHA-256
checksums of all of it. The folder appears under its name when it is complete. Nothing is pickled.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from deepeq.files import sha256_of, write_atomically
from deepeq.models import MEMORY_TYPES

FORMAT = "deepeq-checkpoint-4"
MANIFEST = "manifest.json"

_TUPLES = {kind.__name__: kind for kind in MEMORY_TYPES}


class CheckpointContent(NamedTuple):
    """What a checkpoint holds besides the state of model and optimizer."""

    progress: dict[str, Any]
    """What JSON can hold."""
    memory: Any
    """Memory of the training streams: tensors `(B, ...)` in tuples."""
    random: dict[str, Tensor]
    """States of the random generators by device, `(W, n)` for W processes."""


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, content: CheckpointContent, fabric: Fabric
) -> None:
    """Write a checkpoint. All processes call this. An older checkpoint stays whole until this one is complete.

    Args:
        path: The folder.
        model: Its parameters are kept, sharded ones as shards.
        optimizer: Its state is kept by parameter name.
        content: The rest; of the memory, the rows of this process.
        fabric: The processes of the run.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"optimizer.{name}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    tensors |= {f"random.{device}": states for device, states in content.random.items()}
    leaves: list[Tensor] = []
    structure = _describe(content.memory, leaves)
    tensors |= {f"memory.{index}": gather_rows(leaf, fabric) for index, leaf in enumerate(leaves)}
    manifest = {"format": FORMAT, "progress": content.progress, "memory": structure}
    temporary = path.with_name(f"{path.name}.tmp")
    if fabric.is_global_zero:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    fabric.barrier()
    _write_shards(temporary, path, tensors, fabric)
    files = list(temporary.glob(f"shard-{fabric.global_rank + 1:05d}-*"))
    for file in files:
        _synchronize(file)
    digests: list[dict[str, str]] = [{file.name: sha256_of(file) for file in files}]
    if fabric.world_size > 1:
        own, digests = digests[0], [{}] * fabric.world_size
        dist.all_gather_object(digests, own)
    if fabric.is_global_zero:
        manifest["files"] = {name: sha for part in digests for name, sha in part.items()}
        write_atomically(temporary / MANIFEST, json.dumps(manifest | {"sha256": _digest(manifest)}))
        if path.exists():
            shutil.rmtree(path.rename(path.with_name(f"old-{path.name}.tmp")))
        temporary.rename(path)
    fabric.barrier()


class SavedCheckpoint:
    """A checkpoint on disk, with its checksums verified.

    Args:
        path: The folder.

    Attributes:
        progress: What `CheckpointContent.progress` was.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is damaged, foreign, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise FileNotFoundError(f"{path} does not exist; has the run saved a checkpoint yet?")
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if manifest.pop("sha256") != _digest(manifest):
                raise ValueError(f"the checksum of {MANIFEST} differs")
            for name, digest in manifest["files"].items():
                if sha256_of(path / name) != digest:
                    raise ValueError(f"the checksum of {name} differs")
            self._held = _shapes(path)
            self._structure, self.progress = manifest["memory"], manifest["progress"]
            found = manifest["format"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged or is not a checkpoint ({error}); use another checkpoint") from error
        if found != FORMAT:
            raise ValueError(f"{path} is not a checkpoint of this version of deepeq (format {found!r})")

    def restore(self, model: nn.Module, optimizer: Optimizer) -> CheckpointContent:
        """Fill a model and its optimizer, and return the rest, with the rows of all processes.

        The number of processes, and whether they share the parameters, may differ from when it was saved.

        Raises:
            ValueError: The checkpoint is of another model; nothing was changed then.
        """
        targets = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
        held = {name: tensor.shape for name, tensor in self._held.items() if name.startswith("model.")}
        wrong = sorted(set(targets) ^ set(held)) or [name for name in targets if targets[name].shape != held[name]]
        if wrong:
            raise ValueError(
                f"{self.path} belongs to another model: {wrong[0].removeprefix('model.')} differs (and "
                f"{len(wrong) - 1} more); use the configuration in its own run folder"
            )
        states: dict[Tensor, dict[str, Tensor]] = {}
        for name, parameter in model.named_parameters():
            for key, tensor in self._part(f"optimizer.{name}/").items():
                # Adam's step counters stay on the CPU; its moments live beside their parameter.
                beside = tensor.shape == parameter.shape
                value = torch.zeros_like(parameter.detach()) if beside else torch.zeros_like(tensor, device="cpu")
                targets[f"optimizer.{name}/{key}"] = states.setdefault(parameter, {})[key] = value
        rest = {
            prefix: {name: torch.zeros_like(tensor, device="cpu") for name, tensor in self._part(prefix).items()}
            for prefix in ("random.", "memory.")
        }
        targets |= {prefix + name: target for prefix, part in rest.items() for name, target in part.items()}
        self._read_into({name: target for name, target in targets.items() if target.numel()})
        optimizer.state.update(states)
        return CheckpointContent(self.progress, _rebuild(self._structure, rest["memory."]), rest["random."])

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): held for name, held in self._held.items() if name.startswith(prefix)}

    def _read_into(self, targets: dict[str, Tensor]) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is .* uninitialized", UserWarning)
            reader = HuggingFaceStorageReader(str(self.path))
            load(targets, storage_reader=reader, no_dist=not dist.is_initialized())


def random_states(fabric: Fabric) -> dict[str, Tensor]:
    """Return the states of the random number generators of all processes, `(W, n)` by device."""
    states = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: gather_rows(state.unsqueeze(0), fabric).cpu() for device, state in states.items()}


def set_random_states(states: dict[str, Tensor], fabric: Fabric) -> bool:
    """Set the generators of this process; set none and return False for states of another number of processes."""
    if len(states["cpu"]) != fabric.world_size:
        return False
    # Clones, because torch reads a state from the start of its storage, wherever the row of a tensor begins.
    torch.set_rng_state(states["cpu"][fabric.global_rank].clone())
    if "cuda" in states and fabric.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][fabric.global_rank].clone())
    return True


def gather_rows(rows: Tensor, fabric: Fabric) -> Tensor:
    """Return the rows of all processes, in their order."""
    if fabric.world_size == 1:
        return rows
    rows = rows.to(fabric.device).contiguous()
    gathered = [torch.empty_like(rows) for _ in range(fabric.world_size)]
    dist.all_gather(gathered, rows)
    return torch.cat(gathered)


def _write_shards(folder: Path, path: Path, tensors: dict[str, Tensor], fabric: Fabric) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is .* uninitialized", UserWarning)
            save(contiguous, storage_writer=writer, no_dist=fabric.world_size == 1)
    except (CheckpointException, SafetensorError, OSError) as error:
        if fabric.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise OSError(f"{path} cannot be written: {cause}") from error


def _shapes(path: Path) -> dict[str, Tensor]:
    held = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in held.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _describe(memory: Any, leaves: list[Tensor]) -> Any:
    """Return the structure of a memory as JSON. Each tensor is appended to `leaves`, and its index takes its place."""
    if memory is None:
        return None
    if isinstance(memory, Tensor):
        leaves.append(memory)
        return len(leaves) - 1
    return [type(memory).__name__, *(_describe(part, leaves) for part in memory)]


def _rebuild(structure: Any, leaves: dict[str, Tensor]) -> Any:
    if structure is None:
        return None
    if isinstance(structure, int):
        return leaves[str(structure)]
    name, *parts = structure
    rebuilt = tuple(_rebuild(part, leaves) for part in parts)
    return rebuilt if name == "tuple" else _TUPLES[name](*rebuilt)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _synchronize(path: Path) -> None:
    with path.open("rb+") as file:  # Windows synchronizes only what is open for writing
        os.fsync(file.fileno())
