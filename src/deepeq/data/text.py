"""Text in blocks, so that it is never in memory as a whole; and where the text of a configuration is found.

Joining the blocks gives the text. Line ends are newlines, whatever they are in the file.
"""

import hashlib
import json
import os
import pydoc_data.topics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from io import TextIOWrapper
from pathlib import Path

from deepeq.data.batches import SPLITS, Split
from deepeq.data.config import PUBLISHED, CorpusName, DataConfig
from deepeq.data.tokenizer import Unit
from deepeq.files import sha256_of

BLOCK_CHARS = 1 << 21
"""Number of characters in a block: its words, about 60 bytes each as Python strings, take little memory."""

# As deepeq documents them, as WikiText's archives hold them, and as Penn Treebank is published.
_FILE_NAMES = ("{}.txt", "wiki.{}.tokens", "ptb.{}.txt", "{}.jsonl")


@dataclass(frozen=True)
class FileSource:
    """A UTF-8 file; a byte order mark, which some editors write, is not part of the text.

    A file named `*.jsonl` holds one JSON object per line, each with a document in one field. A newline ends each
    document: the last character of the document for characters, `<eos>` for words, the last token for byte pairs.
    """

    path: Path
    text_field: str = "text"
    """Name of the field that holds the document, for JSON lines."""

    def blocks(self) -> Iterator[str]:
        """Yield the text in blocks of about two million characters, whatever the length of its lines.

        Raises:
            ValueError: The file is not UTF-8, holds NUL characters or only whitespace, or a line is not a JSON object
                with a document.
        """
        is_blank = True
        with self.path.open("rb") as raw, TextIOWrapper(raw, encoding="utf-8-sig") as file:
            is_json = self.path.suffix == ".jsonl"
            blocks = self._documents(file) if is_json else iter(partial(file.read, BLOCK_CHARS), "")
            try:
                for block in blocks:
                    is_blank = is_blank and not block.strip()
                    if "\0" in block:
                        raise ValueError(
                            f"{self.path} holds NUL characters; if it is UTF-16 or UTF-32, convert it to UTF-8"
                        )
                    yield block
            except UnicodeDecodeError as error:
                position = raw.tell() - len(error.object) + error.start
                byte = f"byte {position} is {error.object[error.start]:#04x}"
                raise ValueError(f"{self.path} is not UTF-8 text ({byte}); convert it to UTF-8") from error
        if is_blank:
            raise ValueError(f"{self.path} is empty; give a file that holds text")

    def _documents(self, file: TextIOWrapper) -> Iterator[str]:
        number = 0
        while lines := file.readlines(BLOCK_CHARS):
            yield "".join(self._document(line, number + place) for place, line in enumerate(lines, start=1))
            number += len(lines)

    def _document(self, line: str, number: int) -> str:
        if not line.strip():
            return ""
        try:
            text = json.loads(line)[self.text_field]
            text.encode()  # neither a number nor half of a surrogate pair is a text
        # Deep nesting exhausts the parser's stack before it is a syntax error.
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"line {number} of {self.path} is not a JSON object with a text in the field {self.text_field!r}; "
                "correct it, or name another field as data.text_field"
            ) from error
        return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n") + "\n"

    def state(self) -> dict[str, str | int]:
        """Return what tells quickly whether the text is the same: the path, the size, the time of the last change.

        Raises:
            FileNotFoundError: There is no such file.
        """
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path.absolute()} is missing or not a file; check the path")
        status = self.path.stat()
        state = {"path": str(self.path.resolve()), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        return state | ({"text_field": self.text_field} if self.path.suffix == ".jsonl" else {})

    def sha256(self) -> str:
        """Return the checksum of the file."""
        return sha256_of(self.path)


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


Source = FileSource | StringSource


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text in three splits that is not prepared yet.

    It comes in three files, one per split; or its sources are joined by newlines and split 80/10/10 by characters, for
    words and byte pairs at the nearest line ends, or spaces where there are no lines.
    """

    name: str
    unit: Unit
    vocab_size: int | None
    """Number of byte-pair tokens; None for other units."""
    sources: tuple[Source, ...]
    is_split: bool
    """Whether the sources are the splits."""

    @property
    def place(self) -> str:
        """Where the text lies, for messages."""
        return ", ".join(str(source.state()["path"]) for source in self.sources)

    def blocks(self, split: Split) -> Iterator[str]:
        """Yield a split in blocks that cut no token."""
        place = SPLITS.index(split)
        if self.is_split:
            return whole_tokens(self.sources[place].blocks(), self.unit)
        return whole_tokens(_slice(self._joined(), self._bounds[place], self._bounds[place + 1]), self.unit)

    def _joined(self) -> Iterator[str]:
        for index, source in enumerate(self.sources):
            if index:
                yield "\n"
            yield from source.blocks()

    @cached_property
    def _bounds(self) -> list[int]:
        length = sum(map(len, self._joined()))
        cuts = [length * 8 // 10, length * 9 // 10]
        if self.unit != "character":
            starts = [_nearest_start(self._joined(), cut, length, after="\n") for cut in cuts]
            if len({0, *starts, length}) < 4:  # a text of a few long lines, as text8 is
                starts = [_nearest_start(self._joined(), cut, length, after=" ") for cut in cuts]
            cuts = starts
        return [0, *cuts, length]


def find_text(config: DataConfig) -> Text:
    """Return the text that a configuration names.

    Raises:
        FileNotFoundError: A file or folder is missing.
    """
    sources: tuple[Source, ...]
    if config.files:
        sources = tuple(FileSource(Path(file).expanduser(), config.text_field) for file in config.files)
        for source in sources:
            source.state()  # a missing file is named before any is read
        name = "+".join(source.path.name for source in sources)
    elif config.corpus == "pydoc":
        topics = pydoc_data.topics.topics
        text = "\n\n".join(topics[topic] for topic in sorted(topics))
        name, sources = "pydoc", (StringSource("pydoc_data.topics", text),)
    else:
        return find_in_folder(text_folder(config), config)
    return Text(name=name, unit=config.unit, vocab_size=config.vocab_size, sources=sources, is_split=False)


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
            raise FileNotFoundError(
                f"{path.absolute()} is missing; {folder} must hold {names}, and valid and test likewise{hint}"
            )
    sources = tuple(FileSource(path, config.text_field) for path in paths)
    return Text(name=name, unit=config.unit, vocab_size=config.vocab_size, sources=sources, is_split=True)


def text_folder(config: DataConfig) -> Path:
    """Return the folder of a corpus that lies in one.

    Raises:
        FileNotFoundError: It is not there, or none is named.
    """
    folder = Path(config.folder).expanduser() if config.folder is not None else published_folder(config.corpus)
    if folder is not None and folder.is_dir():
        return folder
    if config.corpus not in PUBLISHED:
        place = folder and folder.absolute()
        raise FileNotFoundError(f"{place} is not a folder; give the folder of the text as --data.folder")
    published = PUBLISHED[config.corpus]
    search = (
        f"looked for in {folder.absolute()}, which is not a folder"
        if folder
        else "not looked for, because no folder is named"
    )
    raise FileNotFoundError(
        f"{published.title} was {search}: "
        "give the folder that holds train.txt, valid.txt and test.txt as --data.folder, or set the environment "
        f"variable DEEPEQ_DATA to the folder that holds it under the name {published.folder}, or download it with "
        f"`deepeq data {config.corpus} --dir DIR`"
    )


def published_folder(name: CorpusName) -> Path | None:
    """Return the folder of a corpus in `$DEEPEQ_DATA`, or None if the variable is not set."""
    root = os.environ.get("DEEPEQ_DATA")
    return Path(root).expanduser() / PUBLISHED[name].folder if root and name in PUBLISHED else None


def split_files(folder: Path) -> list[Path]:
    """Return the paths of the three splits, under the names that most of the files have."""
    candidates = [[folder / pattern.format(split) for split in SPLITS] for pattern in _FILE_NAMES]
    return max(candidates, key=lambda paths: sum(path.is_file() for path in paths))


def whole_tokens(blocks: Iterable[str], unit: Unit) -> Iterator[str]:
    """Yield the same text in blocks that cut no token: they end with a line or, within a long line, before blanks."""
    rest = ""
    for block in blocks:
        text = rest + block
        end = len(text) if unit == "character" else text.rfind("\n") + 1 or len(text[: text.rfind(" ") + 1].rstrip())
        rest = text[end:]
        if end:
            yield text[:end]
    if rest:
        yield rest


def _slice(blocks: Iterable[str], start: int, stop: int) -> Iterator[str]:
    position = 0
    for block in blocks:
        piece = block[max(start - position, 0) : max(stop - position, 0)]
        if piece:
            yield piece
        position += len(block)
        if position >= stop:
            return


def _nearest_start(blocks: Iterable[str], cut: int, length: int, *, after: str) -> int:
    """Return the place nearest to the cut that follows this character, or is an end of the text."""
    left, right, position = 0, length, 0
    for block in blocks:
        place = max(cut - position, 0)
        found = block.rfind(after, 0, place)
        left = position + found + 1 if found >= 0 else left
        found = block.find(after, place)
        if found >= 0:
            right = position + found + 1
            break
        position += len(block)
    return left if cut - left <= right - cut else right
