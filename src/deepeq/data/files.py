"""Writing files and folders so that a reader never sees half of one."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, in 0 .. 1."""


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name beside `path`, then rename it.

    Raises:
        OSError: the folder does not exist, or the disk is full; an older file stays whole.
    """
    # The process id keeps processes that write the same file at once apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path` that gets this name when the block ends without an error.

    If another process was faster, its folder stays and this one is dropped.

    Raises:
        OSError: the folder cannot be created or renamed.
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
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
