"""Preparation of a text: a folder with three files of ids, the tokenizer, and a record of what they are.

train.ids valid.ids test.ids    int32, little endian
tokenizer.json                  what `Tokenizer.save` writes
corpus.json                     format, name, unit, sizes, checksums, and the sources of the text
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepeq.data.batches import SPLITS, Split
from deepeq.data.text import Text, whole_tokens
from deepeq.data.tokenizer import Tokenizer, Unit, split_tokens
from deepeq.files import Progress, new_folder, sha256_of, write_atomically

RECORD = "corpus.json"
TOKENIZER = "tokenizer.json"

_FORMAT = "deepeq.corpus.v2"
_ID_TYPE = np.dtype("<i4")
BLOCK_IDS = 1 << 20
"""Number of ids that are renumbered at once."""
_MIN_TOKENS = 2  # One to read and one to predict.
_CHECKED_IDS = 1 << 20  # Enough to tell a file of something else, without reading a large corpus.
_LONG_NAMES: dict[Split, str] = {"train": "training", "valid": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class IdsFile:
    """What a file of ids holds."""

    tokens: int
    """Number of ids."""
    sha256: str
    """Checksum of the file."""
    num_bytes: int
    """Size of the text in UTF-8."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What corpus.json says of the files beside it."""

    name: str
    unit: Unit
    wanted_vocab_size: int | None
    """Number of byte-pair tokens that was asked for; None for other units."""
    vocab_size: int
    tokenizer_sha256: str
    splits: dict[Split, IdsFile]
    sources: list[dict[str, Any]]
    """Path, size, time of the last change and checksum of each file that the text came from."""

    @property
    def fingerprint(self) -> str:
        """One checksum of the tokenizer and all ids."""
        parts = [self.tokenizer_sha256, *(self.splits[split].sha256 for split in SPLITS)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write corpus.json."""
        write_atomically(folder / RECORD, json.dumps({"format": _FORMAT} | asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Record":
        """Return what corpus.json holds.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or of another format.
        """
        path = folder / RECORD
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a prepared corpus, because it holds no {RECORD}; name another")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        # Deep nesting exhausts the parser's stack before it is a syntax error.
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"it is not readable as JSON, {error}") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise ValueError(
                f"{path} is not of the format {_FORMAT!r}; delete {folder}, or name a folder that this version prepared"
            )
        try:
            entries = content.pop("splits")
            record = cls(splits={split: IdsFile(**entries[split]) for split in SPLITS}, **content)
        except (KeyError, TypeError) as error:
            raise _damaged(path, f"a field is missing or unknown, {error}") from error
        if not record._is_well_typed():
            raise _damaged(path, "a field has a value of another type")
        return record

    def _is_well_typed(self) -> bool:
        splits = list(self.splits.values())
        texts = [self.name, self.tokenizer_sha256, *(split.sha256 for split in splits)]
        numbers = [self.vocab_size, *(split.tokens for split in splits), *(split.num_bytes for split in splits)]
        return (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(number, int) for number in numbers)
            and all(split.tokens >= _MIN_TOKENS for split in splits)
            and self.unit in get_args(Unit)
            and isinstance(self.wanted_vocab_size, int | None)
            and isinstance(self.sources, list)
            and all(isinstance(source, dict) for source in self.sources)
        )


def prepare(text: Text, folder: Path, progress: Progress | None = None) -> None:
    """Write a text as ids into a new folder, which appears only when it is whole.

    The text is streamed: memory holds a block of it and the vocabulary. If several processes prepare the same folder at
    once, the first to end provides it.

    Args:
        text: The text.
        folder: The folder.
        progress: Called with what is being done, and the fraction of it that is done.

    Raises:
        OSError: A source cannot be read, or the folder cannot be written.
        ValueError: A source is not UTF-8, is empty or changed meanwhile, or a split has fewer than two tokens.
    """
    states = [source.state() for source in text.sources]
    watched = _Watched(text, sum(int(state["bytes"]) for state in states), progress)
    with new_folder(folder) as temporary:
        splits: dict[Split, IdsFile] = {}
        train = temporary / "train.ids"
        if text.unit == "bpe":
            assert text.vocab_size is not None
            blocks = whole_tokens(text.splits["train"](), text.unit)
            tokenizer = Tokenizer.train_byte_pairs(blocks, text.vocab_size)
            splits["train"] = _write_ids(watched, "train", tokenizer, train)
        else:
            tokenizer, splits["train"] = _write_training_ids(watched, train)
        for split in SPLITS[1:]:
            splits[split] = _write_ids(watched, split, tokenizer, temporary / f"{split}.ids")
        tokenizer.save(temporary / TOKENIZER)
        _check_lengths(text, splits)
        sources = [state | {"sha256": source.sha256()} for source, state in zip(text.sources, states, strict=True)]
        if [source.state() for source in text.sources] != states:
            raise ValueError(f"{text.place} changed while it was read; start again when it is written")
        Record(
            name=text.name,
            unit=text.unit,
            wanted_vocab_size=text.vocab_size,
            vocab_size=len(tokenizer),
            tokenizer_sha256=sha256_of(temporary / TOKENIZER),
            splits=splits,
            sources=sources,
        ).save(temporary)


def open_prepared(folder: Path, *, verify: bool = False) -> tuple[Record, Tokenizer, dict[Split, Tensor]]:
    """Return record, tokenizer and splits of a prepared folder; the splits are memory maps, (N,) int32.

    Sizes, the tokenizer's checksum and the range of each split's first million ids are checked. Writing to a split
    changes a private copy, never the file.

    Args:
        folder: The folder.
        verify: Whether to compare the checksums of all ids too.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, truncated, or not the one that was recorded.
    """
    record = Record.load(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    if sha256_of(folder / TOKENIZER) != record.tokenizer_sha256:
        raise _damaged(folder / TOKENIZER, "its checksum is not the recorded one")
    if (tokenizer.unit, len(tokenizer)) != (record.unit, record.vocab_size):
        raise _damaged(folder / RECORD, "its unit or vocab_size is not that of the tokenizer")
    return record, tokenizer, {split: _map(folder, split, record, verify=verify) for split in SPLITS}


class _Watched:
    """The splits' blocks, which report how much of all the text has been read, and count the bytes of each split."""

    def __init__(self, text: Text, total: int, progress: Progress | None) -> None:
        self.text, self._total, self._progress = text, total, progress
        self.num_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)

    def blocks(self, split: Split) -> Iterator[str]:
        """Yield the blocks of a split, none of which cuts a token."""
        for block in whole_tokens(self.text.splits[split](), self.text.unit):
            self.num_bytes[split] += len(block.encode())
            if self._progress is not None:
                done = min(sum(self.num_bytes.values()) / max(1, self._total), 1.0)
                self._progress(f"reading the {_LONG_NAMES[split]} text", done)
            yield block


class _Numbering(dict[str, int]):
    """Numbers 0, 1, 2, ... for tokens in the order of their first look-up."""

    def __missing__(self, token: str) -> int:
        number = self[token] = len(self)
        return number


class _Writer:
    """Writes blocks of ids one after the other, and counts them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._tokens, self._checksum = file, 0, hashlib.sha256()

    def write(self, ids: NDArray[np.integer]) -> None:
        data = ids.astype(_ID_TYPE, copy=False).tobytes()
        self._file.write(data)
        self._checksum.update(data)
        self._tokens += len(ids)

    def result(self, num_bytes: int) -> IdsFile:
        return IdsFile(tokens=self._tokens, sha256=self._checksum.hexdigest(), num_bytes=num_bytes)


def _write_training_ids(watched: _Watched, path: Path) -> tuple[Tokenizer, IdsFile]:
    """Write the ids of a training text of characters or words, and return its tokenizer.

    The text is read once: tokens are numbered as they appear and counted; the file is then renumbered in place, block
    by block, in the order of the tokenizer.
    """
    numbering, unit = _Numbering(), watched.text.unit
    counts = np.zeros(0, dtype=np.int64)  # (tokens seen so far,)
    with path.open("wb") as file:
        writer = _Writer(file)
        for block in watched.blocks("train"):
            tokens = split_tokens(block, unit)
            numbers = np.fromiter(map(numbering.__getitem__, tokens), dtype=_ID_TYPE, count=len(tokens))
            grown = np.bincount(numbers, minlength=len(numbering))
            grown[: len(counts)] += counts
            counts = grown
            writer.write(numbers)
    tokenizer = Tokenizer.from_counts(dict(zip(numbering, counts.tolist(), strict=True)), unit)
    ids = {token: index for index, token in enumerate(tokenizer.tokens)}
    table = np.fromiter((ids[token] for token in numbering), dtype=_ID_TYPE, count=len(numbering))
    with path.open("r+b") as file:
        writer = _Writer(file)
        while data := file.read(BLOCK_IDS * _ID_TYPE.itemsize):
            file.seek(-len(data), 1)
            writer.write(table[np.frombuffer(data, dtype=_ID_TYPE)])
    return tokenizer, writer.result(watched.num_bytes["train"])


def _write_ids(watched: _Watched, split: Split, tokenizer: Tokenizer, path: Path) -> IdsFile:
    with path.open("wb") as file:
        writer = _Writer(file)
        for block in watched.blocks(split):
            writer.write(tokenizer.encode(block).numpy())
    return writer.result(watched.num_bytes[split])


def _map(folder: Path, split: Split, record: Record, *, verify: bool) -> Tensor:
    path, expected = folder / f"{split}.ids", record.splits[split]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; delete {folder} and prepare the corpus again")
    size = path.stat().st_size
    if size != expected.tokens * _ID_TYPE.itemsize:
        raise _damaged(path, f"it has {size:,} bytes instead of {expected.tokens * _ID_TYPE.itemsize:,}")
    if verify and sha256_of(path) != expected.sha256:
        raise _damaged(path, "its checksum is not the recorded one")
    ids = torch.from_file(str(path), shared=False, size=expected.tokens, dtype=torch.int32)
    low, high = ids[:_CHECKED_IDS].aminmax()
    if low < 0 or high >= record.vocab_size:
        raise _damaged(path, f"its ids {int(low)} .. {int(high)} are outside 0 .. {record.vocab_size - 1}")
    return ids


def _check_lengths(text: Text, splits: dict[Split, IdsFile]) -> None:
    for split, ids in splits.items():
        if ids.tokens < _MIN_TOKENS:
            more = "characters" if text.unit == "character" else "lines"
            raise ValueError(
                f"{text.place} is too short: its {_LONG_NAMES[split]} split needs at least {_MIN_TOKENS} tokens, got "
                f"{ids.tokens}; give a text of more {more}"
            )


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged: {reason}; delete {path.parent} and prepare the corpus again")
