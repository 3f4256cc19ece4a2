"""Finding the text that a configuration names: as files, or already prepared."""

import hashlib
import json
import os
import pydoc_data.topics
from pathlib import Path

from deepeq.data.batches import SPLITS
from deepeq.data.config import DataConfig
from deepeq.data.prepared import RECORD, Record
from deepeq.data.published import PUBLISHED, PublishedName
from deepeq.data.text import FileSource, StringSource, Text
from deepeq.data.vocabulary import Level

PREPARED = "prepared"
"""Name of the prepared corpus inside the folder of its text."""

# As deepeq documents them, as WikiText's archives hold them, and as Penn Treebank is published.
_FILE_NAMES = ("{}.txt", "wiki.{}.tokens", "ptb.{}.txt")


def find(config: DataConfig) -> Path | Text:
    """Return the prepared folder that a configuration names, or the text that is to be prepared.

    Raises:
        FileNotFoundError: a file or folder is missing.
    """
    if config.files:
        files = tuple(FileSource(Path(file).expanduser()) for file in config.files)
        for file in files:
            file.state()  # a missing file is named before any is read
        return Text.from_sources("+".join(file.path.name for file in files), config.level, files)
    if config.corpus == "pydoc":
        topics = pydoc_data.topics.topics
        text = "\n\n".join(topics[name] for name in sorted(topics))
        return Text.from_sources("pydoc", config.level, (StringSource("pydoc_data.topics", text),))
    folder = _folder(config)
    if (folder / RECORD).is_file():
        return folder
    name = folder.resolve().name if config.corpus == "folder" else config.corpus
    return find_in_folder(folder, name, config.level)


def find_in_folder(folder: Path, name: str, level: Level) -> Path | Text:
    """Return the prepared corpus inside a folder of text if it is up to date, or else the text.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the record of the prepared corpus is damaged.
    """
    paths = _likeliest_files(folder)
    prepared = folder / PREPARED
    if (prepared / RECORD).is_file():
        record = Record.load(prepared)
        # The text itself may be elsewhere, or deleted by now.
        has_changed = all(path.is_file() for path in paths) and not _is_current(record, paths)
        if record.level == level and not has_changed:
            return prepared
    return find_text(folder, name, level)


def find_text(folder: Path, name: str, level: Level) -> Text:
    """Return the text of the three files in a folder.

    Raises:
        FileNotFoundError: the file of a split is missing.
    """
    paths = _likeliest_files(folder)
    for path in paths:
        if not path.is_file():
            names = " or ".join(pattern.format("train") for pattern in _FILE_NAMES)
            hint = f" (`deepeq data {name} --dir DIR` downloads them)" if name in PUBLISHED else ""
            raise FileNotFoundError(
                f"{path} is missing; {folder} must hold {names}, and valid and test likewise{hint}."
            )
    return Text.from_splits(name, level, {split: FileSource(path) for split, path in zip(SPLITS, paths, strict=True)})


def published_folder(name: PublishedName) -> Path | None:
    """Return the folder of a published corpus in the one that DEEPEQ_DATA names, or None if that is not set."""
    root = os.environ.get("DEEPEQ_DATA")
    return Path(root).expanduser() / PUBLISHED[name].folder if root else None


def cached_folder(text: Text, cache: str | None) -> Path:
    """Return where a text is prepared: a changed text, or another level, has another folder."""
    root = cache or os.environ.get("DEEPEQ_CACHE") or "~/.cache/deepeq"
    identity = json.dumps([text.name, *(source.state() for source in text.sources)], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Path(root).expanduser() / f"{text.level}-{key}"


def _folder(config: DataConfig) -> Path:
    if config.corpus not in PUBLISHED:
        path = Path(config.folder or "").expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder; give the folder of the text as --data.folder.")
        return path
    published = PUBLISHED[config.corpus]
    advice = (
        "give the folder that holds train.txt, valid.txt and test.txt as --data.folder, or set the environment "
        f"variable DEEPEQ_DATA to the folder that holds it under the name {published.folder}, or download it with "
        f"`deepeq data {config.corpus} --dir DIR`"
    )
    path = Path(config.folder).expanduser() if config.folder is not None else published_folder(config.corpus)
    if path is None:
        raise FileNotFoundError(f"{published.title} was not looked for, as no folder is named: {advice}.")
    if not path.is_dir():
        raise FileNotFoundError(f"{published.title} was looked for in {path}, which is not a folder: {advice}.")
    return path


def _likeliest_files(folder: Path) -> list[Path]:
    """Return the paths of the three splits under those names that most of the files have."""
    candidates = [[folder / pattern.format(split) for split in SPLITS] for pattern in _FILE_NAMES]
    return max(candidates, key=lambda paths: sum(path.is_file() for path in paths))


def _is_current(record: Record, paths: list[Path]) -> bool:
    """Whether the recorded sources have the sizes and times of the files, wherever the folder lies now."""
    recorded = [(source.get("bytes"), source.get("mtime_ns")) for source in record.sources]
    statuses = [path.stat() for path in paths]
    return recorded == [(status.st_size, status.st_mtime_ns) for status in statuses]
