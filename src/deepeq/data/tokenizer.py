"""The one-to-one map between the tokens of a text (characters, words or byte pairs) and integer ids.

Letters: N tokens of one text, V size of the vocabulary.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from deepeq.files import write_atomically

Unit = Literal["character", "word", "bpe"]

UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"
REPLACEMENT_CHARACTER = "\ufffd"
NUM_BYTES = 256
"""Byte-pair tokens include every single byte."""

_SPECIALS: dict[str, tuple[str, ...]] = {"character": (UNKNOWN,), "word": (END_OF_LINE, UNKNOWN), "bpe": ()}
_FORMAT = "deepeq.tokenizer.v1"


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
    merges: tuple[tuple[str, str], ...] = ()
    """Pairs of byte-pair tokens that are joined, the first ones first."""
    _ids: dict[str, int] = field(init=False, compare=False)
    _byte_pairs: tokenizers.Tokenizer | None = field(init=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be {' or '.join(map(repr, get_args(Unit)))}, got {self.unit!r}")
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
        if self.unit == "bpe":
            if not set(pre_tokenizers.ByteLevel.alphabet()) <= set(self.tokens):
                raise ValueError("tokens must hold all single bytes, and some are missing")
            object.__setattr__(self, "_byte_pairs", _byte_pairs(models.BPE(vocab=ids, merges=list(self.merges))))

    @classmethod
    def from_text(cls, text: str, unit: Unit) -> "Tokenizer":
        """Return the tokenizer with all characters or words of a training text."""
        return cls.from_counts(Counter(split_tokens(text, unit)), unit)

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], unit: Unit) -> "Tokenizer":
        """Return the tokenizer with characters or words that were counted in a training text, special tokens first.

        Raises:
            ValueError: The unit is unknown, or a token is nothing that a text of that unit could hold.
        """
        specials = _SPECIALS.get(unit, ())
        ordered = sorted(counts, key=lambda word: (-counts[word], word)) if unit == "word" else sorted(counts)
        return cls(unit=unit, tokens=(*specials, *(token for token in ordered if token not in specials)))

    @classmethod
    def train_byte_pairs(cls, blocks: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Return the tokenizer of at most `vocab_size` byte-pair tokens that suit a training text.

        A text that is too short for so many gives fewer.

        Args:
            blocks: The text, in blocks.
            vocab_size: Number of tokens, the 256 single bytes included.
        """
        library = _byte_pairs(models.BPE())
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        library.train_from_iterator(blocks, trainer)
        content = json.loads(library.to_str())["model"]
        tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
        return cls(
            unit="bpe", tokens=tuple(tokens), merges=tuple((first, second) for first, second in content["merges"])
        )

    @property
    def unknown(self) -> int | None:
        """Id of the token for what training did not see; None for byte pairs, which know every text."""
        return self._ids.get(UNKNOWN) if self.unit != "bpe" else None

    def encode(self, text: str) -> Tensor:
        """Return the ids of a text's tokens, (N,) int64.

        Every newline of a text of words becomes `<eos>`; a last line without newline is left open, so that a prompt can
        be continued. A literal `<eos>` among the words ends a line too.
        """
        if self._byte_pairs is not None:
            # In lines, which the library encodes twice as fast as one long text.
            lines = self._byte_pairs.encode_batch_fast(text.splitlines(keepends=True), add_special_tokens=False)
            return torch.tensor([index for line in lines for index in line.ids], dtype=torch.int64)
        look_up, unknown = self._ids.get, self._ids[UNKNOWN]
        return torch.tensor([look_up(token, unknown) for token in split_tokens(text, self.unit)], dtype=torch.int64)

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
        if self._byte_pairs is not None:
            return self._byte_pairs.decode(list(indices), skip_special_tokens=False)
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

        Raises:
            FileNotFoundError: The folder of `path` does not exist.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: create the folder {path.parent} first")
        content = {"format": _FORMAT, "unit": self.unit, "tokens": self.tokens, "merges": self.merges}
        write_atomically(path, json.dumps(content, indent=0))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Return the tokenizer that `save` wrote to `path`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or is not a tokenizer.
        """
        path, hint = Path(path), "give a file that Tokenizer.save wrote"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; {hint}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != _FORMAT:
                raise ValueError(f"it is not of the format {_FORMAT!r}")
            tokens, merges = content.get("tokens"), content.get("merges")
            if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
                raise ValueError("its tokens are not a list of strings")
            pairs = tuple((str(first), str(second)) for first, second in merges or ())
            return cls(unit=content.get("unit", ""), tokens=tuple(tokens), merges=pairs)
        # Deep nesting exhausts the parser's stack; the library raises bare exceptions at merges of unknown tokens.
        except Exception as error:
            raise ValueError(f"{path} is damaged ({error}); {hint}") from error

    def __len__(self) -> int:
        """Return V, special tokens included."""
        return len(self.tokens)

    def __repr__(self) -> str:
        """Return unit and size, because the tokens themselves would fill pages."""
        return f"Tokenizer(unit={self.unit!r}, {len(self.tokens)} tokens)"


def split_tokens(text: str, unit: Unit) -> Sequence[str]:
    """Return the characters of a text, or its words with `<eos>` for every newline."""
    return text.replace("\n", f" {END_OF_LINE} ").split() if unit == "word" else text


def _byte_pairs(model: models.BPE) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    library.decoder = decoders.ByteLevel()  # pyright: ignore
    return library
