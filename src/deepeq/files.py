"""Writing files and folders so that a reader never sees half of one, and tensors with their checksum."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Progress = Callable[[str, float], None]
"""Called with what is being done, and the fraction of it that is done, from 0 to 1."""


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name beside `path`, then rename it.

    Raises:
        OSError: The folder does not exist, or the disk is full; an older file stays whole.
    """
    # The process id separates processes that write the same file at once.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")  # the same bytes, and checksum, on every system
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, which gets this name when the block ends without an error.

    If another process was faster, its folder stays and this one is deleted.

    Raises:
        OSError: The folder cannot be created or renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError:
            if not any(path.glob("*")):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal digits.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write CPU tensors and metadata as one safetensors file with a checksum; an older file stays whole until then.

    Args:
        path: The file.
        tensors: Contiguous tensors that share no memory.
        metadata: Texts by name.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata=metadata | {"sha256": _digest(tensors, metadata)})
        temporary.chmod(mode)  # the library's files are readable by their owner alone
        with temporary.open("rb+") as file:  # Windows synchronizes only what is open for writing
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path, *, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata that `write_tensors` wrote; the tensors are private memory maps.

    Args:
        path: The file.
        verify: Whether to compare the checksum, which reads all of the file; its size is always compared.

    Raises:
        ValueError: The file is damaged or foreign.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        checksum = metadata.pop("sha256", None)
        if checksum is None or (verify and checksum != _digest(tensors, metadata)):
            raise ValueError("its checksum differs")
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged or was not written by deepeq ({error})") from error
    return tensors, metadata


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
