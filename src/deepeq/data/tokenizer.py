"""The map between the tokens of a text (characters, words or byte pairs) and integer ids.

Letters: N tokens of one text, V size of the vocabulary.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from deepeq.checks import check_choice
from deepeq.files import write_atomically

Unit = Literal["character", "word", "bpe"]

UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"
REPLACEMENT_CHARACTER = "\ufffd"
NUM_BYTES = 256
"""Byte-pair tokens include every single byte."""

_SPECIALS: dict[str, tuple[str, ...]] = {"character": (UNKNOWN,), "word": (END_OF_LINE, UNKNOWN), "bpe": ()}
# Format and field names of version 0.1 are kept: its files stay readable, and fingerprints of corpora stay the same.
_FORMAT = "deepeq.vocabulary.v1"


@dataclass(frozen=True, kw_only=True, repr=False)
class Tokenizer:
    """An immutable list of V tokens; the id of a token is its place in the list.

    - Characters: `<unk>` (id 0) stands for every character that training did not see and is decoded as U+FFFD; the
      others follow alphabetically.
    - Words are what whitespace separates: `<eos>` (id 0) stands for a newline, `<unk>` (id 1) for every word that
      training did not see; the others follow by falling frequency, ties alphabetically, as adaptive embeddings and
      softmaxes need them.
    - Byte pairs (`bpe`): single bytes and frequent sequences of them, so any text is encoded, and decoded exactly.

    Two tokenizers are equal when their units and tokens are.

    Raises:
        ValueError: The unit is unknown, a special token is not at its place, a token is there twice, or is nothing that
            a text of this unit could hold.

    References:
        Mikolov et al. (2010), Recurrent neural network based language model, Interspeech: words with `<eos>` and
        `<unk>`. Sennrich, Haddow, Birch (2016), Neural machine translation of rare words with subword units, ACL.
    """

    unit: Unit
    """What one token is."""
    tokens: tuple[str, ...]
    """The tokens in the order of their ids, special tokens first."""
    byte_pairs: str = ""
    """JSON of the byte-pair model as the library `tokenizers` writes it; empty for other units."""
    _ids: dict[str, int] = field(init=False, compare=False)
    _library: tokenizers.Tokenizer | None = field(init=False, compare=False, default=None)

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, Unit)
        specials = _SPECIALS[self.unit]
        if self.tokens[: len(specials)] != specials:
            raise ValueError(f"tokens must begin with {specials}, got {self.tokens[: len(specials)]}")
        for token in self.tokens[len(specials) :] if self.unit != "bpe" else ():
            if (token.split() != [token]) if self.unit == "word" else (len(token) != 1):
                raise ValueError(f"each of the tokens must be one {self.unit}, got {token!r}")
        ids = {token: index for index, token in enumerate(self.tokens)}
        if len(ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if ids[token] != index)
            raise ValueError(f"tokens must differ from each other, got {twice!r} more than once")
        object.__setattr__(self, "_ids", ids)
        if (self.unit == "bpe") != bool(self.byte_pairs):
            raise ValueError(f"byte_pairs must be given for the unit 'bpe' and no other, got unit={self.unit!r}")
        if self.byte_pairs:
            library = tokenizers.Tokenizer.from_str(self.byte_pairs)
            if library.get_vocab() != ids:
                raise ValueError("tokens must be those of byte_pairs in the order of their ids")
            object.__setattr__(self, "_library", library)

    @classmethod
    def from_text(cls, text: str | Iterable[str], unit: Unit, *, vocab_size: int | None = None) -> "Tokenizer":
        """Return the tokenizer of a training text: all its characters or words, or the byte pairs that suit it best.

        Args:
            text: The text, or blocks of it that cut no token.
            unit: What one token is.
            vocab_size: Number of byte-pair tokens, the 256 single bytes included; a short text gives fewer. Only for
                `bpe`, which needs it.

        Raises:
            ValueError: The unit is unknown.
        """
        blocks = [text] if isinstance(text, str) else text
        if unit == "bpe":
            library = tokenizers.Tokenizer(models.BPE())
            library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
            library.decoder = decoders.ByteLevel()  # pyright: ignore
            trainer = trainers.BpeTrainer(
                vocab_size=vocab_size or NUM_BYTES,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            library.train_from_iterator((line for block in blocks for line in _lines(block)), trainer)
            return cls._of_library(library)
        counts: Counter[str] = Counter()
        for block in blocks:
            counts.update(split_tokens(block, unit))
        specials = _SPECIALS.get(unit, ())
        ordered = sorted(counts, key=lambda word: (-counts[word], word)) if unit == "word" else sorted(counts)
        return cls(unit=unit, tokens=(*specials, *(token for token in ordered if token not in specials)))

    @property
    def unknown(self) -> int | None:
        """Id of the token for what training did not see; None for byte pairs, which know every text."""
        return self._ids.get(UNKNOWN) if self.unit != "bpe" else None

    def encode(self, text: str) -> Tensor:
        """Return the ids of a text's tokens, (N,) int64.

        Every newline of a text of words becomes `<eos>`; a last line without newline is left open, so that a prompt can
        be continued. A literal `<eos>` among the words ends a line too. Byte pairs never cross a line end.
        """
        if self._library is not None:
            lines = self._library.encode_batch_fast(_lines(text), add_special_tokens=False)
            return torch.tensor([index for line in lines for index in line.ids], dtype=torch.int64)
        tokens = split_tokens(text, self.unit)
        # Iterators of C code alone: a Python loop over the tokens takes twice as long.
        ids = map(self._ids.get, tokens, repeat(self._ids[UNKNOWN]))
        return torch.from_numpy(np.fromiter(ids, dtype=np.int64, count=len(tokens)))

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Return the text of ids (N,): words joined by single blanks, `<eos>` as a newline.

        Byte pairs that are not UTF-8, such as the first byte of a character, give U+FFFD.

        Raises:
            ValueError: `ids` is not one-dimensional, or an id lies outside 0 .. V - 1.
        """
        if isinstance(ids, Tensor) and ids.ndim != 1:
            raise ValueError(f"ids must be one-dimensional, got the shape {tuple(ids.shape)}")
        indices: Sequence[int] = ids.tolist() if isinstance(ids, Tensor) else ids
        for index in indices:
            if not 0 <= index < len(self.tokens):
                raise ValueError(f"ids must lie in 0 .. {len(self.tokens) - 1}, got {index}")
        if self._library is not None:
            return self._library.decode(list(indices), skip_special_tokens=False)
        tokens = [self.tokens[index] for index in indices]
        if self.unit == "word":
            # No word holds whitespace, so these replacements change only what is next to <eos>.
            text = " ".join("\n" if token == END_OF_LINE else token for token in tokens)
            return text.replace(" \n", "\n").replace("\n ", "\n")
        return "".join(REPLACEMENT_CHARACTER if token == UNKNOWN else token for token in tokens)

    def decode_stream(self, before: str, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text that the ids add one by one; a character of several byte pairs comes with its last one.

        Args:
            before: The text before them.
            ids: The ids.
        """
        pending: list[int] = []
        for index in ids:
            pending.append(index)
            piece = self.decode(pending)
            if self.unit == "bpe" and piece.endswith(REPLACEMENT_CHARACTER):
                continue
            glue = self.unit == "word" and not before.endswith("\n") and not piece.startswith("\n")
            yield " " * glue + piece
            before, pending = piece, []
        if pending:
            yield self.decode(pending)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, under a temporary name that is then renamed.

        Byte pairs are written in the format of the library `tokenizers`, which other programs read too.

        Raises:
            FileNotFoundError: The folder of `path` does not exist.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: create the folder {path.parent} first")
        content = {"format": _FORMAT, "level": self.unit, "tokens": self.tokens}
        write_atomically(path, self.byte_pairs or json.dumps(content, indent=0))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Return the tokenizer that `save` wrote to `path`; the vocabularies of version 0.1 are read too.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or is not a tokenizer.
        """
        path, hint = Path(path), "give a file that Tokenizer.save wrote"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; {hint}")
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            if isinstance(content, dict) and "model" in content:
                return cls._of_library(tokenizers.Tokenizer.from_str(text))
            if not isinstance(content, dict) or content.get("format") != _FORMAT:
                raise ValueError(f"it is not of the format {_FORMAT!r}")
            tokens = content.get("tokens")
            if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
                raise ValueError("its tokens are not a list of strings")
            return cls(unit=content.get("level", ""), tokens=tuple(tokens))
        # Deep nesting exhausts the parser's stack; the library raises bare exceptions at damaged models.
        except Exception as error:
            raise ValueError(f"{path} is damaged ({error}); {hint}") from error

    @classmethod
    def _of_library(cls, library: tokenizers.Tokenizer) -> "Tokenizer":
        vocab = library.get_vocab()
        return cls(unit="bpe", tokens=tuple(sorted(vocab, key=vocab.__getitem__)), byte_pairs=library.to_str())

    def __len__(self) -> int:
        """Return V, special tokens included."""
        return len(self.tokens)

    def __repr__(self) -> str:
        """Return unit and size, because the tokens themselves would fill pages."""
        return f"Tokenizer(unit={self.unit!r}, {len(self.tokens)} tokens)"


def split_tokens(text: str, unit: Unit) -> Sequence[str]:
    """Return the characters of a text, or its words with `<eos>` for every newline."""
    return text.replace("\n", f" {END_OF_LINE} ").split() if unit == "word" else text


def _lines(text: str) -> list[str]:
    # Byte pairs are counted and encoded by line: the library encodes many short texts faster than one long text, and
    # then the ids of a long text do not depend on the blocks in which it is read.
    return text.splitlines(keepends=True)
