"""A prepared folder: a text as three files of ids, its vocabulary, and a record of what they are.

train.ids valid.ids test.ids    int32, little endian
vocabulary.json                 what `Vocabulary.save` writes
corpus.json                     format, name, level, sizes, checksums, and the sources of the text
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from deepeq.data.batches import SPLITS, Split
from deepeq.data.encoding import ID_TYPE, IdsFile, write_ids, write_training_ids
from deepeq.data.files import Progress, new_folder, sha256_of, write_atomically
from deepeq.data.text import Text
from deepeq.data.vocabulary import Level, Vocabulary

RECORD = "corpus.json"
VOCABULARY = "vocabulary.json"

_FORMAT = "deepeq.corpus.v1"
_MIN_TOKENS = 2  # One to read and one to predict.
_CHECKED_IDS = 1 << 20  # Enough to tell a file of something else, without reading a large corpus.
_LONG_NAMES: dict[Split, str] = {"train": "training", "valid": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What corpus.json says of the files beside it."""

    name: str
    level: Level
    vocab_size: int
    vocabulary_sha256: str
    splits: dict[Split, IdsFile]
    sources: list[dict[str, Any]]
    """Path, size, time of the last change and checksum of each file that the text came from."""

    @property
    def fingerprint(self) -> str:
        """One checksum of the vocabulary and all ids."""
        parts = [self.vocabulary_sha256, *(self.splits[split].sha256 for split in SPLITS)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write corpus.json."""
        write_atomically(folder / RECORD, json.dumps({"format": _FORMAT} | asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Record":
        """Return what corpus.json holds.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is broken, or of another format.
        """
        path = folder / RECORD
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a prepared corpus, as it holds no {RECORD}; name another folder.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        # Deep nesting exhausts the parser's stack before it is a syntax error.
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"it is not readable as JSON, {error}") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} is not of the format {_FORMAT!r}; name a folder that deepeq prepared.")
        try:
            entries = content.pop("splits")
            record = cls(splits={split: IdsFile(**entries[split]) for split in SPLITS}, **content)
        except (KeyError, TypeError) as error:
            raise _damaged(path, f"a field is missing or unknown, {error}") from error
        if not record._is_well_typed():
            raise _damaged(path, "a field has a value of another type")
        return record

    def _is_well_typed(self) -> bool:
        texts = [self.name, self.vocabulary_sha256, *(split.sha256 for split in self.splits.values())]
        numbers = [self.vocab_size, *(split.tokens for split in self.splits.values())]
        return (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(number, int) for number in numbers)
            and all(split.tokens >= _MIN_TOKENS for split in self.splits.values())
            and self.level in get_args(Level)
            and isinstance(self.sources, list)
            and all(isinstance(source, dict) for source in self.sources)
        )


def prepare(text: Text, folder: Path, progress: Progress | None = None) -> None:
    """Write a text as ids into a new folder, which appears only when it is whole.

    The text is streamed: memory holds a block of it and the vocabulary. Of processes that prepare the same folder
    at once, the first to end provides it.

    Raises:
        OSError: a source cannot be read or the folder not be written.
        ValueError: a source is not UTF-8, is empty or changed meanwhile, or a split has fewer than two tokens.
    """
    states = [source.state() for source in text.sources]
    total = sum(int(state["bytes"]) for state in states)
    with new_folder(folder) as temporary:
        watched = _watched(text, total, progress)
        vocabulary, train = write_training_ids(watched["train"], text.level, temporary / "train.ids")
        vocabulary.save(temporary / VOCABULARY)
        splits: dict[Split, IdsFile] = {"train": train}
        for split in SPLITS[1:]:
            splits[split] = write_ids(watched[split], vocabulary, temporary / f"{split}.ids")
        _check_lengths(text, splits)
        sources = [state | {"sha256": source.sha256()} for source, state in zip(text.sources, states, strict=True)]
        if [source.state() for source in text.sources] != states:
            raise ValueError(f"{text.place} changed while it was read; start again when it is written.")
        Record(
            name=text.name,
            level=text.level,
            vocab_size=len(vocabulary),
            vocabulary_sha256=sha256_of(temporary / VOCABULARY),
            splits=splits,
            sources=sources,
        ).save(temporary)


def open_prepared(folder: Path, *, verify: bool = False) -> tuple[Record, Vocabulary, dict[Split, Tensor]]:
    """Return record, vocabulary and splits of a prepared folder; the splits are memory maps, (N,) int32.

    Sizes, the vocabulary's checksum and the range of each split's first million ids are checked; `verify` also
    compares the checksums of all ids. Who writes to a split changes a private copy, never the file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, truncated, or not the one that was recorded.
    """
    record = Record.load(folder)
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    if sha256_of(folder / VOCABULARY) != record.vocabulary_sha256:
        raise _damaged(folder / VOCABULARY, "its checksum is not the recorded one")
    if (vocabulary.level, len(vocabulary)) != (record.level, record.vocab_size):
        raise _damaged(folder / RECORD, "its level or vocab_size is not that of the vocabulary")
    return record, vocabulary, {split: _map(folder, split, record, verify=verify) for split in SPLITS}


def _map(folder: Path, split: Split, record: Record, *, verify: bool) -> Tensor:
    path, expected = folder / f"{split}.ids", record.splits[split]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; delete {folder} and prepare the corpus again.")
    size = path.stat().st_size
    if size != expected.tokens * ID_TYPE.itemsize:
        raise _damaged(path, f"it has {size:,} bytes instead of {expected.tokens * ID_TYPE.itemsize:,}")
    if verify and sha256_of(path) != expected.sha256:
        raise _damaged(path, "its checksum is not the recorded one")
    ids = torch.from_file(str(path), shared=False, size=expected.tokens, dtype=torch.int32)
    low, high = ids[:_CHECKED_IDS].aminmax()
    if low < 0 or high >= record.vocab_size:
        raise _damaged(path, f"its ids {int(low)} .. {int(high)} are outside 0 .. {record.vocab_size - 1}")
    return ids


def _watched(text: Text, total: int, progress: Progress | None) -> dict[Split, Iterator[str]]:
    """Return the splits' blocks, which report how much of all the text has been read when they are taken."""
    done = 0

    def watch(split: Split) -> Iterator[str]:
        nonlocal done
        for block in text.splits[split]():
            done += len(block)
            if progress is not None:
                progress(f"reading the {_LONG_NAMES[split]} text", min(done / total, 1.0))
            yield block

    return {split: watch(split) for split in SPLITS}


def _check_lengths(text: Text, splits: dict[Split, IdsFile]) -> None:
    for split, ids in splits.items():
        if ids.tokens < _MIN_TOKENS:
            unit = "lines" if text.level == "word" else "characters"
            raise ValueError(
                f"{text.place} is too short: its {_LONG_NAMES[split]} split needs {_MIN_TOKENS} tokens at least, "
                f"got {ids.tokens}; give a text of more {unit}."
            )


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged: {reason}; delete {path.parent} and prepare the corpus again.")
