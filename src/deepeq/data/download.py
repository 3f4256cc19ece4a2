"""Published corpora: downloaded with their checksums, unpacked, and prepared."""

import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pooch

from deepeq.data.batches import SPLITS
from deepeq.data.config import DataConfig
from deepeq.data.corpora import check_identity
from deepeq.data.files import Progress
from deepeq.data.prepared import RECORD, Record, open_prepared, prepare
from deepeq.data.published import PUBLISHED, Archive, PublishedName
from deepeq.data.sources import PREPARED, find_in_folder, find_text, published_folder
from deepeq.data.text import Text

_CHUNK_BYTES = 1 << 20
_USER_AGENT = "deepeq"  # One of the hosts refuses the default of Python's libraries.


def prepare_corpus(
    name: str, folder: Path, *, download: bool = True, progress: Progress | None = None
) -> dict[str, Any]:
    """Prepare a published corpus in `folder`/prepared and return a summary of it that JSON can hold.

    The text is looked for in `folder`, then in the folder that DEEPEQ_DATA names, and else downloaded into `folder`.
    What is prepared already is only verified, every checksum included.

    Args:
        name: `penn_treebank`, `wikitext2` or `wikitext103`.
        folder: Is created if it is not there; afterwards a value for `DataConfig.folder`.
        download: Whether the text may be downloaded.
        progress: Called with what is being done and the share of it that is done.

    Raises:
        OSError: the text is not there, or cannot be downloaded or written.
        ValueError: there is no published corpus of this name; a file is damaged, or is not the published one.
    """
    published_name, folder = _published_name(name), Path(folder).expanduser()
    start = time.perf_counter()
    found = _find(published_name, folder)
    downloaded = found is None
    if found is None:
        if not download:
            raise FileNotFoundError(
                f"the text of {PUBLISHED[published_name].title} is neither in {folder} nor where DEEPEQ_DATA says; "
                "allow the download, or name the folder that holds it."
            )
        download_text(published_name, folder, progress)
        found = find_in_folder(folder, name, "word")
    if isinstance(found, Text):
        _prepare(found, folder / PREPARED, progress)
    record, _, _ = open_prepared(folder / PREPARED, verify=True)
    check_identity(record, folder / PREPARED, DataConfig(corpus=published_name, level="word"))
    return _summary(record, folder) | {"downloaded": downloaded, "seconds": round(time.perf_counter() - start, 3)}


def download_text(name: PublishedName, folder: Path, progress: Progress | None = None) -> None:
    """Download the three files of a published corpus into a folder.

    Raises:
        OSError: an address cannot be reached, or a file not be written.
        ValueError: a download has another checksum, is no zip archive, or lacks a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for archive in PUBLISHED[name].archives:
        path = _retrieve(archive, folder, progress)
        try:
            for _, member in archive.members:
                _extract(archive, path, member, folder)
        finally:
            path.unlink()


class _ProgressBar:
    """What pooch calls while it downloads, as one call of a function."""

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
        """Nothing is left to do: the last update was reported already."""


def _retrieve(archive: Archive, folder: Path, progress: Progress | None) -> Path:
    # Any: pooch's annotations leave out progress bars and downloaders that its documentation describes.
    bar: Any = _ProgressBar(f"downloading {archive.url}", progress) if progress is not None else False
    downloader: Any = pooch.HTTPDownloader(bar, _CHUNK_BYTES, headers={"User-Agent": _USER_AGENT})
    name = f".{archive.url.rsplit('/', 1)[-1]}.download"
    try:
        path = pooch.retrieve(archive.url, f"sha256:{archive.sha256}", name, folder, downloader=downloader)
    except ValueError as error:
        raise ValueError(
            f"{archive.url} has not the checksum {archive.sha256[:12]}..., so the download is incomplete or the file "
            f"was replaced; try again, or put the text into {folder} yourself."
        ) from error
    except OSError as error:
        response = getattr(error, "response", None)
        if response is not None:  # pooch leaves the connection open after a refusal
            response.close()
        raise OSError(
            f"{archive.url} cannot be downloaded into {folder} ({' '.join(str(error).split())}); try again, or put "
            "the text there yourself."
        ) from error
    return Path(path)


def _extract(archive: Archive, path: Path, member: str, folder: Path) -> None:
    target = folder / (member or archive.url).rsplit("/", 1)[-1]
    temporary = target.with_name(f".{target.name}.part")
    try:
        with _opened(path, member) as source, temporary.open("wb") as file:
            shutil.copyfileobj(source, file, _CHUNK_BYTES)
        temporary.replace(target)
    except KeyError as error:
        raise ValueError(f"{archive.url} lacks the file {member}; put the text into {folder} yourself.") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{archive.url} is not a whole zip archive ({error}); put the text into {folder} yourself."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path, member: str) -> Iterator[IO[bytes]]:
    if not member:
        with path.open("rb") as file:
            yield file
    else:
        with zipfile.ZipFile(path) as zipped, zipped.open(member) as file:
            yield file


def _published_name(name: str) -> PublishedName:
    for published_name in PUBLISHED:
        if name == published_name:
            return published_name
    raise ValueError(f"name must be {' or '.join(map(repr, PUBLISHED))}, got {name!r}.")


def _find(name: PublishedName, folder: Path) -> Path | Text | None:
    """Return what is prepared in the folder, or the text there or in the folder of DEEPEQ_DATA, or None."""
    try:
        return find_in_folder(folder, name, "word")
    except FileNotFoundError:
        elsewhere = published_folder(name)
    if elsewhere is None:
        return None
    try:
        return find_text(elsewhere, name, "word")
    except FileNotFoundError:
        return None


def _prepare(text: Text, folder: Path, progress: Progress | None) -> None:
    if (folder / RECORD).is_file():  # of another text, or of this one before it changed
        shutil.rmtree(folder)
    prepare(text, folder, progress)


def _summary(record: Record, folder: Path) -> dict[str, Any]:
    return {
        "name": record.name,
        "level": record.level,
        "types": record.vocab_size,
        "tokens": {split: record.splits[split].tokens for split in SPLITS},
        "folder": str(folder),
        "prepared": str(folder / PREPARED),
        "sources": [source["path"] for source in record.sources],
        "fingerprint": record.fingerprint,
    }
