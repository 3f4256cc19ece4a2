"""A stream of text into a file of ids: int32, little endian, nothing else.

Shapes: N tokens of a split, V size of the vocabulary.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from deepeq.data.text import whole_tokens
from deepeq.data.vocabulary import Level, Vocabulary, split_tokens

ID_TYPE = np.dtype("<i4")
_BLOCK_IDS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class IdsFile:
    """What a file of ids holds."""

    tokens: int
    """N."""
    sha256: str
    """The checksum of the 4 N bytes."""


class _Numbering(dict[str, int]):
    """Numbers 0, 1, 2, ... for tokens in the order of their first look-up."""

    def __missing__(self, token: str) -> int:
        number = self[token] = len(self)
        return number


class _Writer:
    """Writes blocks of ids one after the other, with their number and checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._tokens, self._checksum = file, 0, hashlib.sha256()

    def write(self, ids: NDArray[np.integer]) -> None:
        data = ids.astype(ID_TYPE, copy=False).tobytes()
        self._file.write(data)
        self._checksum.update(data)
        self._tokens += len(ids)

    def result(self) -> IdsFile:
        return IdsFile(tokens=self._tokens, sha256=self._checksum.hexdigest())


def write_training_ids(blocks: Iterable[str], level: Level, path: Path) -> tuple[Vocabulary, IdsFile]:
    """Write the ids of a training text and return its vocabulary.

    The text is read once: tokens are numbered as they appear and counted; the file is then renumbered in place,
    block by block, in the order of the vocabulary.
    """
    numbering = _Numbering()
    counts = np.zeros(0, dtype=np.int64)  # (tokens seen so far,)
    with path.open("wb") as file:
        writer = _Writer(file)
        for block in whole_tokens(blocks, level):
            tokens = split_tokens(block, level)
            numbers = np.fromiter(map(numbering.__getitem__, tokens), dtype=ID_TYPE, count=len(tokens))
            grown = np.bincount(numbers, minlength=len(numbering))
            grown[: len(counts)] += counts
            counts = grown
            writer.write(numbers)
    vocabulary = Vocabulary.from_counts(dict(zip(numbering, counts.tolist(), strict=True)), level)
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    table = np.fromiter((ids[token] for token in numbering), dtype=ID_TYPE, count=len(numbering))
    return vocabulary, _renumber(path, table)


def write_ids(blocks: Iterable[str], vocabulary: Vocabulary, path: Path) -> IdsFile:
    """Write the ids that a vocabulary gives to a text."""
    with path.open("wb") as file:
        writer = _Writer(file)
        for block in whole_tokens(blocks, vocabulary.level):
            writer.write(vocabulary.encode(block).numpy())
    return writer.result()


def _renumber(path: Path, table: NDArray[np.integer]) -> IdsFile:
    with path.open("r+b") as file:
        writer = _Writer(file)
        while True:
            start = file.tell()
            data = file.read(_BLOCK_IDS * ID_TYPE.itemsize)
            if not data:
                return writer.result()
            file.seek(start)
            writer.write(table[np.frombuffer(data, dtype=ID_TYPE)])
