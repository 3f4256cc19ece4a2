"""Corpora: a text as ids in three splits with its tokenizer, prepared where that is needed, or downloaded.

Letters: N tokens of one split, V size of the vocabulary.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch
import torch
from torch import Tensor

from deepeq.data.batches import SPLITS, SegmentStream, Split
from deepeq.data.config import PUBLISHED, Archive, DataConfig, PublishedName
from deepeq.data.copy_memory import CopyMemory
from deepeq.data.preparation import CORPUS, Record, open_prepared, prepare
from deepeq.data.text import Text, find_in_folder, find_text, published_folder, split_files, text_folder
from deepeq.data.tokenizer import Tokenizer, Unit
from deepeq.files import Progress

PREPARED = "prepared"
"""Name of the prepared corpus inside the folder of its text."""

_CHUNK_BYTES = 1 << 20
_USER_AGENT = "deepeq"  # One of the hosts refuses the default of Python's libraries.


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as ids: three splits, each a memory map (N,) int32, and the tokenizer of the first."""

    name: str
    tokenizer: Tokenizer
    train: Tensor
    valid: Tensor
    test: Tensor
    fingerprint: str
    """A checksum of the tokenizer and all ids."""
    num_bytes: dict[Split, int]
    """Size of each split's text in UTF-8."""

    @property
    def unit(self) -> Unit:
        """What one token is."""
        return self.tokenizer.unit

    @property
    def vocab_size(self) -> int:
        """V, the number of types."""
        return len(self.tokenizer)

    def split(self, split: Split) -> Tensor:
        """Return the ids of a split, (N,) int32."""
        return {"train": self.train, "valid": self.valid, "test": self.test}[split]

    def bytes_per_token(self, split: Split) -> float | None:
        """Return the UTF-8 bytes per token of a split of byte pairs; None for other units."""
        return self.num_bytes[split] / len(self.split(split)) if self.unit == "bpe" else None

    def stream(self, split: Split, *, batch_size: int, segment_len: int) -> SegmentStream:
        """Return a split as parallel streams of text, cut into segments.

        Args:
            split: "train", "valid" or "test".
            batch_size: Number of streams.
            segment_len: Number of tokens in a segment.

        Raises:
            ValueError: The split is too short for batch_size streams, or a number is not a positive integer.
        """
        return SegmentStream(self.split(split), batch_size=batch_size, segment_len=segment_len)


DataSource = Corpus | CopyMemory
"""What a model is trained on and tested with: a text, or a generated task, with the same attributes and streams."""


def load_corpus(config: DataConfig, *, progress: Progress | None = None) -> DataSource:
    """Return the data that a configuration names; a text that is not prepared yet is prepared in the cache.

    Every split is encoded by the training split's tokenizer. A published corpus must have the published number of types
    and tokens.

    Args:
        config: Which data.
        progress: Called with what is being done, and the fraction of it that is done.

    Raises:
        OSError: A file or folder is missing, or the cache cannot be written.
        ValueError: A file is empty or not UTF-8, a split has fewer than two tokens, a prepared file is damaged, or the
            text is not the one that its name says.
    """
    if config.is_copy_memory:
        return CopyMemory(config.copy_memory)
    folder = None
    if not config.files and config.corpus != "pydoc":
        folder = _prepared_folder(text_folder(config), config)
    if folder is None:
        folder = _prepared_in_cache(find_text(config), config, progress)
    return _open(folder, config)[0]


def unigram_bits(train_ids: Tensor, test_ids: Tensor, vocab_size: int) -> float:
    """Return the cross-entropy of test ids, in bits per token, under the training ids' counts plus one each.

    A model that learned how frequent tokens are, and nothing of their order, reaches this.

    Args:
        train_ids: (N,) integers in 0 .. vocab_size - 1.
        test_ids: The same, at least one.
        vocab_size: V, the number of types.

    Raises:
        ValueError: Ids are not one-dimensional or lie outside 0 .. vocab_size - 1, or there are no test ids.

    References:
        Laplace's rule of succession: p(token) = (count + 1) / (N + V).
    """
    for name, ids in (("train_ids", train_ids), ("test_ids", test_ids)):
        if ids.ndim != 1:
            raise ValueError(f"{name} must be one-dimensional, got the shape {tuple(ids.shape)}")
        if ids.numel() and not (ids.min() >= 0 and ids.max() < vocab_size):
            low, high = int(ids.min()), int(ids.max())
            raise ValueError(f"{name} must lie in 0 .. {vocab_size - 1} (vocab_size - 1), got {low} .. {high}")
    if not test_ids.numel():
        raise ValueError("test_ids must hold at least one id, got none")
    counts = torch.bincount(train_ids, minlength=vocab_size).double() + 1  # (V,)
    bits = -torch.log2(counts / counts.sum())  # (V,)
    return bits[test_ids].mean().item()


def prepare_corpus(
    name: str, folder: Path, *, download: bool = True, progress: Progress | None = None
) -> dict[str, Any]:
    """Prepare a published corpus of words in `folder`/prepared and return a summary of it that JSON can hold.

    The text is looked for in `folder`, then in the folder that DEEPEQ_DATA names, and otherwise downloaded into
    `folder`. What is prepared already is only verified, with every checksum.

    Args:
        name: `penn_treebank`, `wikitext2` or `wikitext103`.
        folder: Is created if it is not there; afterwards a value for `DataConfig.folder`.
        download: Whether the text may be downloaded.
        progress: Called with what is being done, and the fraction of it that is done.

    Raises:
        OSError: The text is not there, or cannot be downloaded or written.
        ValueError: There is no published corpus of this name, or a file is damaged or is not the published one.
    """
    if name not in PUBLISHED:
        raise ValueError(f"name must be {' or '.join(map(repr, PUBLISHED))}, got {name!r}")
    published: PublishedName = name
    config, folder = DataConfig(corpus=published, unit="word"), Path(folder).expanduser()
    start, downloaded, prepared = time.perf_counter(), False, folder / PREPARED
    if _prepared_folder(folder, config) != prepared:
        elsewhere = published_folder(published)
        places = [place for place in (folder, elsewhere) if place is not None]
        found = next((place for place in places if all(path.is_file() for path in split_files(place))), None)
        if found is None:
            if not download:
                raise FileNotFoundError(
                    f"the text of {PUBLISHED[published].title} is neither in {folder} nor where DEEPEQ_DATA says; "
                    "allow the download, or name the folder that holds it"
                )
            _download(published, folder, progress)
            found, downloaded = folder, True
        # Of another text, of this one before it changed, or of version 0.1.
        if (prepared / CORPUS).is_file() or (prepared / "corpus.json").is_file():
            shutil.rmtree(prepared)
        prepare(find_in_folder(found, config), prepared, progress)
    corpus, record = _open(prepared, config, verify=True)
    return {
        "name": corpus.name,
        "unit": corpus.unit,
        "types": corpus.vocab_size,
        "tokens": {split: len(corpus.split(split)) for split in SPLITS},
        "folder": str(folder),
        "prepared": str(prepared),
        "sources": [source["path"] for source in record.sources],
        "fingerprint": corpus.fingerprint,
        "downloaded": downloaded,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _download(name: PublishedName, folder: Path, progress: Progress | None) -> None:
    """Download the three files of a published corpus into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for archive in PUBLISHED[name].archives:
        # What a killed download leaves behind begins with a dot and is never read.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            for path in _retrieve(archive, temporary, progress):
                path.chmod(0o644)  # pooch's downloads are readable by their owner alone
                path.replace(folder / path.name)


class _ProgressBar:
    """Adapts a progress function to the progress bar that pooch expects."""

    def __init__(self, what: str, progress: Progress) -> None:
        self._what, self._progress = what, progress
        self.total, self._done = 0, 0

    def update(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self.total:
            self._progress(self._what, min(self._done / self.total, 1.0))

    def reset(self) -> None:
        self._done = 0

    def close(self) -> None:
        """Do nothing: the last update was reported already."""


def _retrieve(archive: Archive, folder: str, progress: Progress | None) -> list[Path]:
    """Return the text files that an address provides."""
    # Any: pooch's annotations leave out progress bars and processors that its documentation describes.
    bar: Any = _ProgressBar(f"downloading {archive.url}", progress) if progress is not None else False
    downloader: Any = pooch.HTTPDownloader(bar, _CHUNK_BYTES, headers={"User-Agent": _USER_AGENT})
    unzip: Any = pooch.Unzip(members=list(archive.members)) if archive.members else None
    name, known = archive.url.rsplit("/", 1)[-1], f"sha256:{archive.sha256}"
    try:
        files: Any = pooch.retrieve(archive.url, known, name, folder, processor=unzip, downloader=downloader)
    except ValueError as error:
        raise ValueError(
            f"{archive.url} does not have the checksum {archive.sha256[:12]}..., so the download is incomplete or the "
            "file was replaced; try again, or get the text elsewhere"
        ) from error
    except OSError as error:
        response = getattr(error, "response", None)
        if response is not None:  # pooch leaves the connection open after a refusal
            response.close()
        raise OSError(
            f"{archive.url} cannot be downloaded ({' '.join(str(error).split())}); try again, or get the text elsewhere"
        ) from error
    return [Path(file) for file in (files if archive.members else [files])]


def _prepared_folder(folder: Path, config: DataConfig) -> Path | None:
    """Return `folder` if it is a prepared corpus, else `folder/prepared` if that is up to date, else None."""
    if (folder / CORPUS).is_file():
        return folder
    prepared, paths = folder / PREPARED, split_files(folder)
    if not (prepared / CORPUS).is_file():
        return None
    record = Record.load(prepared)
    recorded = [(source.get("bytes"), source.get("mtime_ns")) for source in record.sources]
    # The text itself may be elsewhere, or deleted by now.
    known = not all(path.is_file() for path in paths) or recorded == [
        (status.st_size, status.st_mtime_ns) for status in (path.stat() for path in paths)
    ]
    same = (record.unit, record.wanted_vocab_size) == (config.unit, config.vocab_size)
    return prepared if known and same else None


def _prepared_in_cache(text: Text, config: DataConfig, progress: Progress | None) -> Path:
    """Return where a text is prepared: a changed text, or another unit, has another folder."""
    root = Path(config.cache or os.environ.get("DEEPEQ_CACHE") or "~/.cache/deepeq").expanduser()
    state = [text.name, text.vocab_size, *(source.state() for source in text.sources)]
    key = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
    folder = root / f"{text.unit}-{key}-3"  # the last number changes with the format
    if folder.exists():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        raise OSError(
            f"the cache {root} cannot be written ({error}); name another folder as --data.cache or in the environment "
            "variable DEEPEQ_CACHE"
        ) from error
    prepare(text, folder, progress)
    return folder


def _open(folder: Path, config: DataConfig, *, verify: bool = False) -> tuple[Corpus, Record]:
    """Return a prepared text and its record, if it is the one that a configuration names."""
    record, tokenizer, ids = open_prepared(folder, verify=verify)
    corpus = Corpus(
        record.name, tokenizer, ids["train"], ids["valid"], ids["test"], record.fingerprint, record.num_bytes
    )
    if (record.unit, record.wanted_vocab_size) != (config.unit, config.vocab_size):
        size = "" if record.wanted_vocab_size is None else f" and data.vocab_size={record.wanted_vocab_size}"
        raise ValueError(
            f"{folder} was prepared with data.unit={record.unit!r}{size}; set that, or name another folder"
        )
    if config.corpus not in PUBLISHED or config.files:
        return corpus, record
    if record.name != config.corpus:
        raise ValueError(
            f"{folder} holds the corpus {record.name!r}, but data.corpus is {config.corpus!r}; set data.corpus to "
            f"{record.name if record.name in PUBLISHED else 'folder'!r}"
        )
    published = PUBLISHED[config.corpus]
    counts = [len(corpus.split(split)) for split in SPLITS]
    differences = published.differences(corpus.vocab_size, counts) if config.unit == "word" else []
    if differences:
        raise ValueError(
            f"{folder} holds {', '.join(differences)}, so it is not {published.title}; get the published text, or set "
            "data.corpus to 'folder' for a text of your own"
        )
    return corpus, record
