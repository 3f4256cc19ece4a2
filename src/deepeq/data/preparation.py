"""Preparation of a text: a folder with its ids and its tokenizer.

corpus.safetensors    train, valid and test, each (N,) int32, and a record of what they are
tokenizer.json        what `Tokenizer.save` writes
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepeq.data.batches import SPLITS, Split
from deepeq.data.text import Text
from deepeq.data.tokenizer import Tokenizer, Unit
from deepeq.files import Progress, new_folder, read_tensors, sha256_of, write_tensors

CORPUS, TOKENIZER = "corpus.safetensors", "tokenizer.json"

_FORMAT = "deepeq.corpus.v2"
_MIN_TOKENS = 2  # One to read and one to predict.
_CHECKED_IDS = 1 << 20  # Enough to tell a file of something else, without reading a large corpus.
_LONG_NAMES: dict[Split, str] = {"train": "training", "valid": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the file of ids says about itself."""

    name: str
    unit: Unit
    wanted_vocab_size: int | None
    """Number of byte-pair tokens that was asked for; None for other units."""
    tokenizer_sha256: str
    """Checksum of the tokenizer's file."""
    sha256: dict[Split, str]
    """Checksum of each split's ids as little-endian int32."""
    num_bytes: dict[Split, int]
    """Size of each split's text in UTF-8."""
    sources: list[dict[str, Any]]
    """Path, size, time of the last change and checksum of each file that the text came from."""

    @property
    def fingerprint(self) -> str:
        """One checksum of the tokenizer and all ids."""
        parts = [self.tokenizer_sha256, *(self.sha256[split] for split in SPLITS)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @classmethod
    def load(cls, folder: Path) -> "Record":
        """Return the record of a prepared folder.

        Raises:
            FileNotFoundError: The folder holds no file of ids.
            ValueError: The file is damaged, or of another format.
        """
        return _open(folder, verify=False)[0]


def prepare(text: Text, folder: Path, progress: Progress | None = None) -> None:
    """Write a text as ids into a new folder, which appears only when it is whole.

    The training split is read twice, for the tokenizer and for the ids. A text that must first be cut into splits is
    also read to find the cuts. Memory holds a block of the text and the vocabulary. If several processes prepare the
    same folder at once, the first to end provides it.

    Args:
        text: The text.
        folder: The folder.
        progress: Called with what is being done, and the fraction of the preparation that is done.

    Raises:
        OSError: A source cannot be read, or the folder cannot be written.
        ValueError: A source is not UTF-8, is empty or changed meanwhile, or a split has fewer than two tokens.
    """
    states = [source.state() for source in text.sources]
    reader = _Reader(text, sum(int(state["bytes"]) for state in states), progress)
    with new_folder(folder) as temporary:
        training = reader.blocks("train", "counting the tokens of", start=0.0)
        tokenizer = Tokenizer.from_text(training, text.unit, vocab_size=text.vocab_size)
        tokenizer.save(temporary / TOKENIZER)
        parts, sha256 = {}, {}
        for split in SPLITS:
            path = temporary / f"{split}.ids"
            sha256[split] = _write_ids(path, reader.blocks(split, "encoding", start=0.5), tokenizer)
            parts[split] = _map(path, text, split)
        sources = [state | {"sha256": source.sha256()} for source, state in zip(text.sources, states, strict=True)]
        if [source.state() for source in text.sources] != states:
            raise ValueError(f"{text.place} changed while it was read; start again when it is written")
        record = Record(
            name=text.name,
            unit=text.unit,
            wanted_vocab_size=text.vocab_size,
            tokenizer_sha256=sha256_of(temporary / TOKENIZER),
            sha256=sha256,
            num_bytes=reader.num_bytes,
            sources=sources,
        )
        write_tensors(temporary / CORPUS, parts, {"format": _FORMAT, "record": json.dumps(asdict(record))})
        del parts  # Windows does not delete a file that is mapped
        for split in SPLITS:
            (temporary / f"{split}.ids").unlink()


def open_prepared(folder: Path, *, verify: bool = False) -> tuple[Record, Tokenizer, dict[Split, Tensor]]:
    """Return record, tokenizer and splits of a prepared folder; the splits are memory maps, (N,) int32.

    Sizes, the tokenizer's checksum and the range of each split's first million ids are checked. Writing to a split
    changes a private copy, never the file.

    Args:
        folder: The folder.
        verify: Whether to compare the checksum of all ids too.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, truncated, or not the one that was recorded.
    """
    record, ids = _open(folder, verify=verify)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    if sha256_of(folder / TOKENIZER) != record.tokenizer_sha256:
        raise _damaged(folder / TOKENIZER, "its checksum is not the recorded one")
    for part in ids.values():
        low, high = part[:_CHECKED_IDS].aminmax()
        if low < 0 or high >= len(tokenizer):
            raise _damaged(folder / CORPUS, f"its ids {int(low)} .. {int(high)} are outside 0 .. {len(tokenizer) - 1}")
    return record, tokenizer, ids


class _Reader:
    """The blocks of a text's splits; counts their bytes and reports how much of the text has been read."""

    def __init__(self, text: Text, total: int, progress: Progress | None) -> None:
        self._text, self._total, self._progress = text, total, progress
        self.num_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)

    def blocks(self, split: Split, what: str, *, start: float) -> Iterator[str]:
        self.num_bytes[split] = 0
        for block in self._text.blocks(split):
            self.num_bytes[split] += len(block.encode())
            if self._progress is not None:
                done = min(sum(self.num_bytes.values()) / max(1, self._total), 1.0)
                self._progress(f"{what} the {_LONG_NAMES[split]} text", start + done / 2)
            yield block


def _write_ids(path: Path, blocks: Iterable[str], tokenizer: Tokenizer) -> str:
    """Write the ids of a text and return their checksum."""
    checksum = hashlib.sha256()
    with path.open("wb") as file:
        for block in blocks:
            data = tokenizer.encode(block).numpy().astype("<i4").tobytes()
            file.write(data)
            checksum.update(data)
    return checksum.hexdigest()


def _map(path: Path, text: Text, split: Split) -> Tensor:
    num_tokens = path.stat().st_size // 4
    if num_tokens < _MIN_TOKENS:
        more = "characters" if text.unit == "character" else "lines"
        raise ValueError(
            f"{text.place} is too short: its {_LONG_NAMES[split]} split needs at least {_MIN_TOKENS} tokens, got "
            f"{num_tokens}; give a text of more {more}"
        )
    return torch.from_file(str(path), shared=False, size=num_tokens, dtype=torch.int32)


def _open(folder: Path, *, verify: bool) -> tuple[Record, dict[Split, Tensor]]:
    path = folder / CORPUS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a prepared corpus, because it holds no {CORPUS}; name another")
    try:
        tensors, metadata = read_tensors(path, verify=verify)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is not of the format {_FORMAT!r}")
        record = Record(**json.loads(metadata["record"]))
        return record, {split: tensors[split] for split in SPLITS}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{error}; delete {folder} and prepare the corpus again") from error


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged: {reason}; delete {path.parent} and prepare the corpus again")
