"""The one-to-one map between the tokens of a text (characters or words) and integer ids.

Shapes: N tokens of one text, V size of the vocabulary.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from deepeq.data.files import write_atomically

Level = Literal["character", "word"]

UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"
REPLACEMENT_CHARACTER = "\ufffd"

_SPECIALS: dict[str, tuple[str, ...]] = {"character": (UNKNOWN,), "word": (END_OF_LINE, UNKNOWN)}
_FORMAT = "deepeq.vocabulary.v1"


@dataclass(frozen=True, kw_only=True, repr=False)
class Vocabulary:
    """An immutable list of V tokens; a token's id is its place in the list.

    Characters: `<unk>` (id 0) stands for every character never seen in training and is decoded as U+FFFD; the
    others follow alphabetically. Words are what whitespace separates: `<eos>` (id 0) stands for a newline,
    `<unk>` (id 1) for every word never seen; the others follow by falling frequency, ties alphabetically, as
    adaptive embeddings and softmaxes need them. Two vocabularies are equal when level and tokens are.

    Raises:
        ValueError: the level is unknown, a special token is not at its place, a token is there twice, or is
            nothing that a text of that level could hold.

    References:
        Mikolov et al. (2010), Recurrent neural network based language model, Interspeech: Penn Treebank with
        `<eos>` and `<unk>`.
    """

    level: Level
    """What one token is."""
    tokens: tuple[str, ...]
    """The tokens in the order of their ids, special tokens first."""
    _ids: dict[str, int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Check the fields and index the tokens."""
        if self.level not in get_args(Level):
            raise ValueError(f"level must be 'character' or 'word', got {self.level!r}.")
        specials = _SPECIALS[self.level]
        if self.tokens[: len(specials)] != specials:
            raise ValueError(f"tokens must begin with {specials}, got {self.tokens[: len(specials)]}.")
        for token in self.tokens[len(specials) :]:
            if not _is_readable(token, self.level):
                raise ValueError(f"each of the tokens must be one {self.level}, got {token!r}.")
        ids = {token: index for index, token in enumerate(self.tokens)}
        if len(ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if ids[token] != index)
            raise ValueError(f"tokens must differ from each other, got {twice!r} more than once.")
        object.__setattr__(self, "_ids", ids)

    @classmethod
    def from_text(cls, text: str, level: Level) -> "Vocabulary":
        """Return the vocabulary of all tokens of a (training) text, special tokens first.

        Raises:
            ValueError: the level is unknown.
        """
        return cls.from_counts(Counter(split_tokens(text, level)), level)

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], level: Level) -> "Vocabulary":
        """Return the vocabulary of tokens that were counted in a (training) text, special tokens first.

        Raises:
            ValueError: the level is unknown, or a token is nothing that a text of that level could hold.
        """
        specials = _SPECIALS.get(level, ())
        ordered = sorted(counts, key=lambda word: (-counts[word], word)) if level == "word" else sorted(counts)
        return cls(level=level, tokens=(*specials, *(token for token in ordered if token not in specials)))

    def encode(self, text: str) -> Tensor:
        """Return the ids of a text's tokens, (N,) int64; what the vocabulary lacks becomes `<unk>`.

        Every newline of a text of words becomes `<eos>`; a last line without newline is left open, so that a
        prompt can be continued. A literal `<eos>` among the words ends a line too.
        """
        tokens = split_tokens(text, self.level)
        unknown = self._ids[UNKNOWN]
        look_up = self._ids.get
        return torch.tensor([look_up(token, unknown) for token in tokens], dtype=torch.int64)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Return the text of ids (N,): words joined by single blanks, `<eos>` as a newline.

        Raises:
            ValueError: ids is not one-dimensional, or an id lies outside 0 .. V-1.
        """
        if isinstance(ids, Tensor) and ids.ndim != 1:
            raise ValueError(f"ids must be one-dimensional, got the shape {tuple(ids.shape)}.")
        indices: Sequence[int] = ids.tolist() if isinstance(ids, Tensor) else ids
        for index in indices:
            if not 0 <= index < len(self.tokens):
                raise ValueError(f"ids must lie in 0 .. {len(self.tokens) - 1}, got {index}.")
        tokens = [self.tokens[index] for index in indices]
        if self.level == "word":
            # No word holds whitespace, so these replacements touch only what stood around <eos>.
            text = " ".join("\n" if token == END_OF_LINE else token for token in tokens)
            return text.replace(" \n", "\n").replace("\n ", "\n")
        return "".join(REPLACEMENT_CHARACTER if token == UNKNOWN else token for token in tokens)

    def save(self, path: str | Path) -> None:
        """Write the vocabulary as JSON, under a temporary name that is then renamed.

        Raises:
            FileNotFoundError: the folder of `path` does not exist.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: create the folder {path.parent} first.")
        content = {"format": _FORMAT, "level": self.level, "tokens": self.tokens}
        write_atomically(path, json.dumps(content, indent=0))

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Return the vocabulary that `save` wrote to `path`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is broken, or is not a vocabulary.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; give the file that Vocabulary.save wrote.")
        hint = "give a file that Vocabulary.save wrote"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        # Deep nesting exhausts the parser's stack before it is a syntax error.
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not readable as JSON ({error}); {hint}.") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a vocabulary of the format {_FORMAT!r}; {hint}.")
        level, tokens = content.get("level", ""), content.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise ValueError(f"{path} is damaged: its tokens are not a list of strings; {hint}.")
        try:
            return cls(level=level, tokens=tuple(tokens))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {str(error).rstrip('.')}; {hint}.") from error

    def __len__(self) -> int:
        """Return V, special tokens included."""
        return len(self.tokens)

    def __repr__(self) -> str:
        """Return level and size, as the tokens themselves would fill pages."""
        return f"Vocabulary(level={self.level!r}, {len(self.tokens)} tokens)"


def split_tokens(text: str, level: Level) -> Sequence[str]:
    """Return the tokens of a text: its characters, or its words with `<eos>` for every newline."""
    return text.replace("\n", f" {END_OF_LINE} ").split() if level == "word" else text


def _is_readable(token: str, level: Level) -> bool:
    return len(token) == 1 if level == "character" else token.split() == [token]
