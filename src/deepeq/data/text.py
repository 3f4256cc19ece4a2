"""Text as streams of blocks, so that none is ever in memory as a whole.

A stream is a function that returns a new iterator over the blocks of one text; the blocks joined are the text. Line
ends are newlines, whatever they are in the file.
"""

import codecs
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from deepeq.data.batches import SPLITS, Split
from deepeq.data.files import sha256_of
from deepeq.data.vocabulary import Level

BLOCK_BYTES = 1 << 21
"""Small enough that a block's words, about 60 bytes each as Python strings, take little memory."""

Stream = Callable[[], Iterator[str]]


class Source(Protocol):
    """Where text comes from."""

    def blocks(self) -> Iterator[str]:
        """Yield the text in blocks."""
        ...

    def state(self) -> dict[str, str | int]:
        """Return what tells quickly whether the source is still the same."""
        ...

    def sha256(self) -> str:
        """Return the checksum of the source's bytes."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A UTF-8 file; a byte order mark, which some editors write, is no part of the text."""

    path: Path

    def blocks(self) -> Iterator[str]:
        """Yield the text in blocks of about 2 MiB.

        Raises:
            ValueError: the file is not UTF-8, or holds nothing but whitespace.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        translator = io.IncrementalNewlineDecoder(decoder, translate=True)
        is_start, is_blank, position = True, True, 0
        with self.path.open("rb") as file:
            while True:
                data = file.read(BLOCK_BYTES)
                pending = len(decoder.getstate()[0])
                try:
                    text = translator.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    byte = f"byte {position - pending + error.start} is {error.object[error.start]:#04x}"
                    raise ValueError(f"{self.path} is not UTF-8 text ({byte}); convert it to UTF-8.") from error
                position += len(data)
                is_blank = is_blank and not text.strip()
                if text:
                    yield text.removeprefix("\ufeff") if is_start else text
                    is_start = False
                if not data:
                    break
        if is_blank:
            raise ValueError(f"{self.path} is empty; give a file that holds text.")

    def state(self) -> dict[str, str | int]:
        """Return the path, the size and the time of the last change.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is missing or not a file; check the path.")
        status = self.path.stat()
        return {"path": str(self.path.resolve()), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}

    def sha256(self) -> str:
        """Return the checksum of the file."""
        return sha256_of(self.path)


@dataclass(frozen=True)
class StringSource:
    """A text that is in memory anyhow, such as the language reference in every CPython."""

    name: str
    text: str

    def blocks(self) -> Iterator[str]:
        """Yield the text."""
        yield self.text

    def state(self) -> dict[str, str | int]:
        """Return the name, the size and the checksum."""
        return {"path": self.name, "bytes": len(self.text.encode()), "sha256": self.sha256()}

    def sha256(self) -> str:
        """Return the checksum of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text in three splits that is not prepared yet."""

    name: str
    level: Level
    sources: tuple[Source, ...]
    splits: dict[Split, Stream]

    @property
    def place(self) -> str:
        """Where the text lies, for messages."""
        return ", ".join(str(source.state()["path"]) for source in self.sources)

    @classmethod
    def from_splits(cls, name: str, level: Level, sources: dict[Split, FileSource]) -> "Text":
        """Return the text of three files, one a split."""
        splits: dict[Split, Stream] = {split: sources[split].blocks for split in SPLITS}
        return cls(name=name, level=level, sources=tuple(sources[split] for split in SPLITS), splits=splits)

    @classmethod
    def from_sources(cls, name: str, level: Level, sources: tuple[Source, ...]) -> "Text":
        """Return sources joined by newlines and split 80/10/10 by characters, for words at the nearest line ends."""
        joined = partial(_join, sources)
        splits: dict[Split, Stream] = {split: partial(_tenths, joined, split, level) for split in SPLITS}
        return cls(name=name, level=level, sources=sources, splits=splits)


def whole_tokens(blocks: Iterable[str], level: Level) -> Iterator[str]:
    """Yield the same text in blocks that no word spans."""
    rest = ""
    for block in blocks:
        text = rest + block
        end = max(text.rfind(" "), text.rfind("\n")) + 1 if level == "word" else len(text)
        rest = text[end:]
        if end:
            yield text[:end]
    if rest:
        yield rest


def _join(sources: tuple[Source, ...]) -> Iterator[str]:
    for index, source in enumerate(sources):
        if index:
            yield "\n"
        yield from source.blocks()


def _tenths(stream: Stream, split: Split, level: Level) -> Iterator[str]:
    length = sum(map(len, stream()))
    bounds = [0, length * 8 // 10, length * 9 // 10, length]
    if level == "word":
        bounds[1:3] = [_nearest_line_start(stream, cut, length) for cut in bounds[1:3]]
    place = SPLITS.index(split)
    return _slice(stream, bounds[place], bounds[place + 1])


def _slice(stream: Stream, start: int, stop: int) -> Iterator[str]:
    position = 0
    for block in stream():
        piece = block[max(start - position, 0) : max(stop - position, 0)]
        if piece:
            yield piece
        position += len(block)
        if position >= stop:
            return


def _nearest_line_start(stream: Stream, cut: int, length: int) -> int:
    before, after, position = 0, length, 0
    for block in stream():
        place = max(cut - position, 0)
        newline = block.rfind("\n", 0, place)
        before = position + newline + 1 if newline >= 0 else before
        newline = block.find("\n", place)
        if newline >= 0:
            after = position + newline + 1
            break
        position += len(block)
    return before if cut - before <= after - cut else after
