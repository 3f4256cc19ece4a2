"""Named tensors on disk: one safetensors file, or a folder with a file of shards for each process. Nothing is pickled.

A file or folder appears under its name when it is complete, and carries SHA-256 checksums of all that it holds.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from deepeq.data.files import sha256_of, write_atomically

TEMPORARY = ".tmp"
"""Suffix of what is not complete."""

_MANIFEST = "manifest.json"


class DamagedError(ValueError):
    """A file or folder is not what was written."""


class Stored(NamedTuple):
    """What a file or folder holds; a file's tensors are read already, those of a folder are not."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]  # on the device "meta" for a folder

    def read_into(self, targets: dict[str, Tensor]) -> None:
        """Fill tensors, which may be distributed ones, with those of the same names."""
        if self.path.is_dir():
            reader = HuggingFaceStorageReader(str(self.path))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is .* uninitialized", UserWarning)
                load(targets, storage_reader=reader, no_dist=not dist.is_initialized())
            return
        for name, target in targets.items():
            value = self.tensors[name]
            if isinstance(target, DTensor):
                value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
            target.copy_(value)


def write_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; an older one stays whole until this one is complete.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata=metadata | {"sha256": _digest(tensors, metadata)})
        temporary.chmod(mode)  # the library's files are for their owner alone
        _synchronize(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], fabric: Fabric) -> None:
    """Write a folder in which each process stores its shards of distributed tensors; all processes call this.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    if fabric.is_global_zero:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    fabric.barrier()
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    except CheckpointException as error:
        if fabric.is_global_zero:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{path} cannot be written: {next(iter(error.failures.values()))[0]}") from error
    files = list(temporary.glob(f"shard-{fabric.global_rank + 1:05d}-*"))
    for file in files:
        _synchronize(file)
    own = {file.name: sha256_of(file) for file in files}
    digests: list[dict[str, str]] = [{}] * fabric.world_size
    dist.all_gather_object(digests, own)
    if fabric.is_global_zero:
        content = {"metadata": metadata, "files": {name: sha for part in digests for name, sha in part.items()}}
        write_atomically(temporary / _MANIFEST, json.dumps(content | {"sha256": _json_digest(content)}))
        remove(path)
        temporary.rename(path)
    fabric.barrier()


def open_stored(path: Path) -> Stored:
    """A file or folder, with its checksums verified.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it is damaged, or no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; has the run saved a checkpoint yet?")
    try:
        return _open_folder(path) if path.is_dir() else _open_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged or is no checkpoint ({error}); use another checkpoint") from error


def remove(path: Path) -> None:
    """Delete a file or folder; one that is half deleted does not keep its name."""
    if path.is_dir():
        doomed = path.with_name(f"old-{path.name}{TEMPORARY}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Delete what killed processes left in a folder."""
    for path in folder.glob(f"*{TEMPORARY}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _open_file(path: Path) -> Stored:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise ValueError("its checksum is another")
    return Stored(path, metadata, tensors)


def _open_folder(path: Path) -> Stored:
    content = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    if content.pop("sha256") != _json_digest(content):
        raise ValueError(f"the checksum of {_MANIFEST} is another")
    for name, digest in content["files"].items():
        if sha256_of(path / name) != digest:
            raise ValueError(f"the checksum of {name} is another")
    held = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in held.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    return Stored(path, content["metadata"], tensors)


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _json_digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _synchronize(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
