"""Checkpoints: one safetensors file each, written to a temporary name and renamed. Nothing is ever unpickled."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from deepeq.models import MEMORY_TYPES

FORMAT = "deepeq-checkpoint-2"

_TUPLES = {kind.__name__: kind for kind in MEMORY_TYPES}


def save_checkpoint(
    path: Path,
    model: nn.Module,
    *,
    progress: dict[str, Any],
    optimizer: Optimizer | None = None,
    memory: Any = None,
) -> None:
    """Write all that a run needs to go on exactly where it was; an older file stays whole until this one is complete.

    Args:
        path: The file.
        model: Its parameters are kept.
        progress: What JSON can hold: step, time, best result.
        optimizer: Its state is kept by parameter name; without it the file is for evaluation only.
        memory: Memory of the training streams: tensors in tuples.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        for name, state in _states(model, optimizer).items():
            tensors |= {f"optimizer.{name}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
        tensors |= {f"random.{device}": state for device, state in _random_states().items()}
    leaves: list[Tensor] = []
    structure = _describe(memory, leaves)
    tensors |= {f"memory.{index}": leaf for index, leaf in enumerate(leaves)}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        metadata = {"format": FORMAT, "progress": json.dumps(progress), "memory": json.dumps(structure)}
        save_file(tensors, temporary, metadata=metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer | None = None) -> tuple[dict[str, Any], Any]:
    """Put a checkpoint into a model, and into its optimizer and the random state if one is given.

    Returns:
        The progress that was saved, and the memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, foreign, or of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; has the run saved a checkpoint yet?")
    tensors, metadata = _read(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version of deepeq (format {metadata.get('format')!r})")
    try:
        progress = json.loads(metadata["progress"])
        memory = _rebuild(json.loads(metadata["memory"]), _part(tensors, "memory."))
        random_state = None if optimizer is None else tensors.get("random.cpu")
        if random_state is not None:
            torch.Generator().set_state(random_state)  # before anything is changed
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}); use another checkpoint") from error
    if optimizer is not None and random_state is None:
        raise ValueError(f"{path} holds no optimizer state, so training cannot go on from it; use last.safetensors")
    _load_model(path, model, _part(tensors, "model."))
    if optimizer is not None and random_state is not None:
        _load_optimizer(model, optimizer, _part(tensors, "optimizer."))
        torch.set_rng_state(random_state)
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
    return progress, memory


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def _describe(memory: Any, leaves: list[Tensor]) -> Any:
    """The structure of a memory for JSON, with a number in the place of each tensor, which goes to `leaves`."""
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


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or is no safetensors file ({error}); use another checkpoint") from error


def _load_model(path: Path, model: nn.Module, saved: dict[str, Tensor]) -> None:
    wanted = model.state_dict()
    wrong = sorted(set(wanted) ^ set(saved)) or [n for n in wanted if wanted[n].shape != saved[n].shape]
    if wrong:
        raise ValueError(
            f"{path} belongs to another model: {wrong[0]} differs (and {len(wrong) - 1} more); "
            "use the configuration in its own run folder"
        )
    model.load_state_dict(saved)


def _load_optimizer(model: nn.Module, optimizer: Optimizer, saved: dict[str, Tensor]) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = _part(saved, f"{names[parameter]}/")
            if state:
                optimizer.state[parameter] = {key: _place(value, parameter) for key, value in state.items()}


def _states(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _place(value: Tensor, parameter: Tensor) -> Tensor:
    # Adam's step counters stay on the CPU; its moments live beside their parameter.
    return value.to(parameter.device) if value.shape == parameter.shape else value
