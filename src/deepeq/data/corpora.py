"""Corpora: a text in three splits (training, validation, test) and the vocabulary of its training split.

Shapes: N tokens of one split, V size of the vocabulary.
"""

import os
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from deepeq.data.vocabulary import Level, Vocabulary

CorpusName = Literal["pydoc", "penn_treebank"]

_MIN_TOKENS = 2  # One to read and one to predict.


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is read, and in which units.

    Raises:
        ValueError: a field has a value that is not allowed, or two fields contradict each other; all of a
            configuration's mistakes are named together.
    """

    corpus: CorpusName = "pydoc"
    """The text: `pydoc` is the language reference in every CPython, `penn_treebank` lies in `folder`."""
    files: tuple[str, ...] | str = ()
    """Paths of the user's own UTF-8 text files, joined in this order by newlines; they replace `corpus`."""
    folder: str | None = None
    """Path of the folder of Penn Treebank's train.txt, valid.txt and test.txt; None means the folder `ptb`
    inside the one that the environment variable DEEPEQ_DATA names."""
    level: Level = "character"
    """The unit of a token in `files` and `pydoc`; Penn Treebank holds words, so it must be `word` there."""

    def __post_init__(self) -> None:
        """Check the fields, one by one and together."""
        if isinstance(self.files, str):  # one file, as on a command line
            object.__setattr__(self, "files", (self.files,))
        problems = self._type_problems() + self._conflicts()
        if problems:
            raise ValueError("; ".join(problems) + ".")

    def _type_problems(self) -> list[str]:
        problems = []
        for name, value, allowed in (
            ("corpus", self.corpus, get_args(CorpusName)),
            ("level", self.level, get_args(Level)),
        ):
            if value not in allowed:
                problems.append(f"data.{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
        if not isinstance(self.files, tuple) or not all(isinstance(f, str) and f for f in self.files):
            problems.append(f"data.files must be a tuple of paths as strings, got {self.files!r}")
        if self.folder is not None and not (isinstance(self.folder, str) and self.folder):
            problems.append(f"data.folder must be a path as a string, or None, got {self.folder!r}")
        return problems

    def _conflicts(self) -> list[str]:
        problems = []
        if self.corpus == "penn_treebank" and not self.files and self.level == "character":
            problems.append("data.level must be 'word' for the corpus 'penn_treebank', which is words, got 'character'")
        if self.corpus == "pydoc" and self.folder is not None:
            problems.append(
                f"data.folder is read only for the corpus 'penn_treebank', got {self.folder!r} with 'pydoc': "
                "set data.corpus to 'penn_treebank' or leave data.folder out"
            )
        return problems


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as ids: `name`, the `vocabulary` of its training split, and three splits, each (N,) int64."""

    name: str
    vocabulary: Vocabulary
    train: Tensor
    valid: Tensor
    test: Tensor


class _Text(NamedTuple):
    name: str
    source: str
    """Where the text lies, for error messages."""
    splits: tuple[str, ...]
    """The texts for training, validation and test."""


def load_corpus(config: DataConfig) -> Corpus:
    """Return the corpus that a configuration names, every split encoded by the training split's vocabulary.

    The language reference and the user's files are split 80/10/10 by characters in reading order, for words
    at the ends of lines nearest to that. Penn Treebank comes split: 929,589 tokens of 10,000 types for
    training, 73,760 tokens for validation, 82,430 for the test.

    Raises:
        FileNotFoundError: a file or the folder of Penn Treebank is missing.
        ValueError: a file is empty or not UTF-8, or a split has fewer than two tokens.

    References:
        Marcus et al. (1993), Building a large annotated corpus of English: the Penn Treebank; preprocessed by
        Mikolov et al. (2010), Recurrent neural network based language model, Interspeech.
    """
    text = _read_text(config)
    vocabulary = Vocabulary.from_text(text.splits[0], config.level)
    train, valid, test = (vocabulary.encode(split) for split in text.splits)
    for split, ids in (("training", train), ("validation", valid), ("test", test)):
        if ids.numel() < _MIN_TOKENS:
            unit = "lines" if config.level == "word" else "characters"
            raise ValueError(
                f"{text.source} is too short: its {split} split needs {_MIN_TOKENS} tokens at least, got "
                f"{ids.numel()}; give a text of more {unit}."
            )
    return Corpus(text.name, vocabulary, train, valid, test)


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


def _read_text(config: DataConfig) -> _Text:
    if config.files:
        paths = [Path(file).expanduser() for file in config.files]
        text = "\n".join(_read_file(path) for path in paths)
        name = "+".join(path.name for path in paths)
        return _Text(name, ", ".join(map(str, paths)), _split(text, config.level))
    if config.corpus == "pydoc":
        topics = pydoc_data.topics.topics
        text = "\n\n".join(topics[name] for name in sorted(topics))
        return _Text("pydoc", "pydoc_data.topics", _split(text, config.level))
    folder = _penn_treebank_folder(config.folder)
    splits = tuple(_read_file(folder / f"{split}.txt") for split in ("train", "valid", "test"))
    return _Text("penn_treebank", str(folder), splits)


def _penn_treebank_folder(folder: str | None) -> Path:
    advice = (
        "give the folder that holds train.txt, valid.txt and test.txt as --data.folder, "
        "or set the environment variable DEEPEQ_DATA to the folder that holds it under the name ptb"
    )
    root = os.environ.get("DEEPEQ_DATA")
    if folder is None and not root:
        raise FileNotFoundError(f"Penn Treebank was not looked for, as no folder is named: {advice}.")
    path = Path(folder).expanduser() if folder is not None else Path(root or "").expanduser() / "ptb"
    if not path.is_dir():
        raise FileNotFoundError(f"Penn Treebank was looked for in {path}, which is not a folder: {advice}.")
    return path


def _read_file(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or not a file; check the path.")
    try:
        # "utf-8-sig" also drops the byte order mark that some editors write, which is no part of the text.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise ValueError(f"{path} is not UTF-8 text ({byte}); convert it to UTF-8.") from error
    if not text.strip():
        raise ValueError(f"{path} is empty; give a file that holds text.")
    return text


def _split(text: str, level: Level) -> tuple[str, ...]:
    cuts = [len(text) * tenths // 10 for tenths in (8, 9)]
    if level == "word":
        cuts = [_nearest_line_start(text, cut) for cut in cuts]
    return text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]


def _nearest_line_start(text: str, cut: int) -> int:
    before = text.rfind("\n", 0, cut) + 1
    after = text.find("\n", cut) + 1 or len(text)
    return before if cut - before <= after - cut else after
