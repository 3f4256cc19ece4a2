"""Corpora: a text in three splits (training, validation, test) and the vocabulary of its training split.

Shapes: N tokens of one split, V size of the vocabulary.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from deepeq.data.batches import Batches, Split
from deepeq.data.config import DataConfig
from deepeq.data.copy_memory import CopyMemory
from deepeq.data.files import Progress
from deepeq.data.prepared import Record, open_prepared, prepare
from deepeq.data.published import PUBLISHED
from deepeq.data.segments import SegmentStream
from deepeq.data.sources import cached_folder, find
from deepeq.data.text import Text
from deepeq.data.vocabulary import Level, Vocabulary


class DataSource(Protocol):
    """What a model is trained on and tested with: a text, or a generated task."""

    @property
    def name(self) -> str:
        """What the data is called."""
        ...

    @property
    def level(self) -> str:
        """What one token is: `character`, `word` or `symbol`."""
        ...

    @property
    def vocab_size(self) -> int:
        """V, the number of types."""
        ...

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The map between text and ids, or None if there is no text."""
        ...

    @property
    def fingerprint(self) -> str:
        """A checksum that tells this data from any other."""
        ...

    def stream(self, split: Split, *, batch_size: int, segment_len: int) -> Batches:
        """Return a split as batches."""
        ...


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as ids: three splits, each a memory map (N,) int32, and the vocabulary of the first."""

    name: str
    vocabulary: Vocabulary
    train: Tensor
    valid: Tensor
    test: Tensor
    fingerprint: str
    """A checksum of the vocabulary and all ids."""

    @property
    def level(self) -> Level:
        """What one token is."""
        return self.vocabulary.level

    @property
    def vocab_size(self) -> int:
        """V, the number of types."""
        return len(self.vocabulary)

    def split(self, split: Split) -> Tensor:
        """Return the ids of a split, (N,) int32."""
        return {"train": self.train, "valid": self.valid, "test": self.test}[split]

    def stream(self, split: Split, *, batch_size: int, segment_len: int) -> SegmentStream:
        """Return a split as batch_size parallel streams, cut into segments of segment_len tokens.

        Raises:
            ValueError: the split is too short for batch_size streams, or a number is not a positive integer.
        """
        return SegmentStream(self.split(split), batch_size=batch_size, segment_len=segment_len)


def load_corpus(config: DataConfig, *, progress: Progress | None = None) -> Corpus | CopyMemory:
    """Return the data that a configuration names; a text that is not prepared yet is prepared in the cache.

    The language reference and the user's files are split 80/10/10 by characters in reading order, for words
    at the ends of lines nearest to that; every split is encoded by the training split's vocabulary. A published
    corpus must have the published number of types and tokens.

    Raises:
        OSError: a file or folder is missing, or the cache cannot be written.
        ValueError: a file is empty or not UTF-8, a split has fewer than two tokens, a prepared file is damaged, or
            the text is not the one that its name says.
    """
    if config.is_copy_memory:
        return CopyMemory(config.copy_memory)
    found = find(config)
    folder = found if isinstance(found, Path) else cached_folder(found, config.cache)
    if not isinstance(found, Path) and not folder.exists():
        _prepare_in_cache(found, folder, progress)
    record, vocabulary, ids = open_prepared(folder)
    if not config.files:
        check_identity(record, folder, config)
    return Corpus(record.name, vocabulary, ids["train"], ids["valid"], ids["test"], record.fingerprint)


def check_identity(record: Record, folder: Path, config: DataConfig) -> None:
    """Check that a prepared text is the one that a configuration names.

    Raises:
        ValueError: its level, its name, or the number of its types or tokens is another.
    """
    if record.level != config.level:
        raise ValueError(
            f"{folder} holds {record.level}s, but data.level is {config.level!r}; set data.level to {record.level!r}."
        )
    if config.corpus not in PUBLISHED:
        return
    if record.name != config.corpus:
        raise ValueError(
            f"{folder} holds the corpus {record.name!r}, but data.corpus is {config.corpus!r}; set data.corpus to "
            f"{record.name if record.name in PUBLISHED else 'folder'!r}."
        )
    differences = PUBLISHED[config.corpus].differences(record.vocab_size, record.splits)
    if differences:
        raise ValueError(
            f"{folder} holds {', '.join(differences)}, so it is not {PUBLISHED[config.corpus].title}; "
            "get the published text, or set data.corpus to 'folder' for a text of your own."
        )


def unigram_bits(train_ids: Tensor, test_ids: Tensor, vocab_size: int) -> float:
    """Return the cross-entropy of test ids, in bits a token, under the training ids' counts plus one each.

    A model that learned how frequent tokens are, and nothing of their order, reaches this; others should do
    better.

    Args:
        train_ids: (N,) integers in 0 .. vocab_size-1.
        test_ids: The same, at least one.
        vocab_size: V, the number of types.

    Raises:
        ValueError: ids are not one-dimensional or lie outside 0 .. vocab_size-1, or there are no test ids.

    References:
        Laplace's rule of succession: p(token) = (count + 1) / (N + V).
    """
    for name, ids in (("train_ids", train_ids), ("test_ids", test_ids)):
        if ids.ndim != 1:
            raise ValueError(f"{name} must be one-dimensional, got the shape {tuple(ids.shape)}.")
        if ids.numel() and not (ids.min() >= 0 and ids.max() < vocab_size):
            low, high = int(ids.min()), int(ids.max())
            raise ValueError(f"{name} must lie in 0 .. {vocab_size - 1} (vocab_size - 1), got {low} .. {high}.")
    if not test_ids.numel():
        raise ValueError("test_ids must hold at least one id, got none.")
    counts = torch.bincount(train_ids, minlength=vocab_size).double() + 1  # (V,)
    bits = -torch.log2(counts / counts.sum())  # (V,)
    return bits[test_ids].mean().item()


def _prepare_in_cache(text: Text, folder: Path, progress: Progress | None) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        raise OSError(
            f"the cache {folder.parent} cannot be written ({error}); name another folder as --data.cache or in the "
            "environment variable DEEPEQ_CACHE."
        ) from error
    prepare(text, folder, progress)
