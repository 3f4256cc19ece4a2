"""Text as streams of blocks, so that it is never in memory as a whole; and where the text of a configuration is found.

A stream is a function that returns a new iterator over the blocks of one text; the blocks joined are the text. Line
ends are newlines, whatever they are in the file.
"""

import codecs
import hashlib
import io
import json
import os
import pydoc_data.topics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from deepeq.data.batches import SPLITS, Split
from deepeq.data.config import PUBLISHED, DataConfig, PublishedName
from deepeq.data.tokenizer import Unit
from deepeq.files import sha256_of

BLOCK_BYTES = 1 << 21
"""Small enough that a block's words, about 60 bytes each as Python strings, take little memory."""

Stream = Callable[[], Iterator[str]]

# As deepeq documents them, as WikiText's archives hold them, and as Penn Treebank is published.
_FILE_NAMES = ("{}.txt", "wiki.{}.tokens", "ptb.{}.txt")


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
    """A UTF-8 file; a byte order mark, which some editors write, is not part of the text."""

    path: Path

    def blocks(self) -> Iterator[str]:
        """Yield the text in blocks of about 2 MiB, whatever the length of its lines.

        Raises:
            ValueError: The file is not UTF-8, or holds only whitespace.
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
                    raise ValueError(f"{self.path} is not UTF-8 text ({byte}); convert it to UTF-8") from error
                position += len(data)
                is_blank = is_blank and not text.strip()
                if text:
                    yield text.removeprefix("\ufeff") if is_start else text
                    is_start = False
                if not data:
                    break
        if is_blank:
            raise ValueError(f"{self.path} is empty; give a file that holds text")

    def state(self) -> dict[str, str | int]:
        """Return the path, the size and the time of the last change.

        Raises:
            FileNotFoundError: There is no such file.
        """
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is missing or not a file; check the path")
        status = self.path.stat()
        return {"path": str(self.path.resolve()), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}

    def sha256(self) -> str:
        """Return the checksum of the file."""
        return sha256_of(self.path)


class JsonLinesSource(FileSource):
    """A UTF-8 file with one JSON object per line, whose field `text` is a document; a newline ends each document."""

    def blocks(self) -> Iterator[str]:
        """Yield the documents, each with a newline at its end.

        Raises:
            ValueError: The file is not UTF-8, or a line is not a JSON object with a text.
        """
        for number, line in enumerate(_lines(super().blocks()), start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            # Deep nesting exhausts the parser's stack before it is a syntax error.
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise ValueError(
                    f"line {number} of {self.path} is not a JSON object with a string in the field 'text'; correct it"
                )
            yield text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n") + "\n"


@dataclass(frozen=True)
class StringSource:
    """A text that is in memory already, such as the language reference in every CPython."""

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
    unit: Unit
    vocab_size: int | None
    """Number of byte-pair tokens; None for other units."""
    sources: tuple[Source, ...]
    splits: dict[Split, Stream]

    @property
    def place(self) -> str:
        """Where the text lies, for messages."""
        return ", ".join(str(source.state()["path"]) for source in self.sources)


def find_text(config: DataConfig) -> Text:
    """Return the text that a configuration names.

    The language reference and the user's files are joined by newlines and split 80/10/10 by characters, for words and
    byte pairs at the nearest line ends.

    Raises:
        FileNotFoundError: A file or folder is missing.
    """
    sources: tuple[Source, ...]
    if config.files:
        paths = [Path(file).expanduser() for file in config.files]
        sources = tuple(JsonLinesSource(p) if p.suffix == ".jsonl" else FileSource(p) for p in paths)
        for source in sources:
            source.state()  # a missing file is named before any is read
        name = "+".join(path.name for path in paths)
    elif config.corpus == "pydoc":
        topics = pydoc_data.topics.topics
        text = "\n\n".join(topics[topic] for topic in sorted(topics))
        name, sources = "pydoc", (StringSource("pydoc_data.topics", text),)
    else:
        return find_in_folder(text_folder(config), config)
    joined = partial(_join, sources)
    splits: dict[Split, Stream] = {split: partial(_tenths, joined, split, config.unit) for split in SPLITS}
    return Text(name=name, unit=config.unit, vocab_size=config.vocab_size, sources=sources, splits=splits)


def find_in_folder(folder: Path, config: DataConfig) -> Text:
    """Return the text of the three files in a folder.

    Raises:
        FileNotFoundError: The file of a split is missing.
    """
    name = folder.resolve().name if config.corpus == "folder" else config.corpus
    paths = split_files(folder)
    for path in paths:
        if not path.is_file():
            names = " or ".join(pattern.format("train") for pattern in _FILE_NAMES)
            hint = f" (`deepeq data {name} --dir DIR` downloads them)" if name in PUBLISHED else ""
            raise FileNotFoundError(f"{path} is missing; {folder} must hold {names}, and valid and test likewise{hint}")
    sources = tuple(FileSource(path) for path in paths)
    splits: dict[Split, Stream] = {split: source.blocks for split, source in zip(SPLITS, sources, strict=True)}
    return Text(name=name, unit=config.unit, vocab_size=config.vocab_size, sources=sources, splits=splits)


def text_folder(config: DataConfig) -> Path:
    """Return the folder of a corpus that lies in one.

    Raises:
        FileNotFoundError: It is not there, or none is named.
    """
    if config.corpus not in PUBLISHED:
        path = Path(config.folder or "").expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder; give the folder of the text as --data.folder")
        return path
    published = PUBLISHED[config.corpus]
    advice = (
        "give the folder that holds train.txt, valid.txt and test.txt as --data.folder, or set the environment "
        f"variable DEEPEQ_DATA to the folder that holds it under the name {published.folder}, or download it with "
        f"`deepeq data {config.corpus} --dir DIR`"
    )
    path = Path(config.folder).expanduser() if config.folder is not None else published_folder(config.corpus)
    if path is None:
        raise FileNotFoundError(f"{published.title} was not looked for, because no folder is named: {advice}")
    if not path.is_dir():
        raise FileNotFoundError(f"{published.title} was looked for in {path}, which is not a folder: {advice}")
    return path


def published_folder(name: PublishedName) -> Path | None:
    """Return the folder of a published corpus in the one that DEEPEQ_DATA names, or None if that is not set."""
    root = os.environ.get("DEEPEQ_DATA")
    return Path(root).expanduser() / PUBLISHED[name].folder if root else None


def split_files(folder: Path) -> list[Path]:
    """Return the paths of the three splits, under the names that most of the files have."""
    candidates = [[folder / pattern.format(split) for split in SPLITS] for pattern in _FILE_NAMES]
    return max(candidates, key=lambda paths: sum(path.is_file() for path in paths))


def whole_tokens(blocks: Iterable[str], unit: Unit) -> Iterator[str]:
    """Yield the same text in blocks that no word spans; blanks stay with the word that follows them."""
    rest = ""
    for block in blocks:
        text = rest + block
        end = len(text) if unit == "character" else max(text.rfind(" "), text.rfind("\n"), 0)
        rest = text[end:]
        if end:
            yield text[:end]
    if rest:
        yield rest


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        yield from lines
    yield rest


def _join(sources: tuple[Source, ...]) -> Iterator[str]:
    for index, source in enumerate(sources):
        if index:
            yield "\n"
        yield from source.blocks()


def _tenths(stream: Stream, split: Split, unit: Unit) -> Iterator[str]:
    length = sum(map(len, stream()))
    bounds = [0, length * 8 // 10, length * 9 // 10, length]
    if unit != "character":
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
