"""Published corpora: found, downloaded from a server of the test's own, prepared; and what fails is named."""

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deepeq.data import DataConfig, load_corpus
from deepeq.data.config import PUBLISHED, Archive
from deepeq.data.corpora import prepare_corpus

SPLITS = {"train": "a b\n\nb\n", "valid": "a\n", "test": "b c\n"}
COUNTS = (4, (6, 2, 3))


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DEEPEQ_DATA", raising=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which it is served."""
    root = tmp_path / "served"
    root.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(root))) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield root, f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture
def serve(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, set_published_counts: Callable[..., None]
) -> Callable[..., None]:
    """Makes bytes the archive of WikiText-2."""

    def publish(content: bytes, sha256: str | None = None) -> None:
        root, address = server
        (root / "wikitext-2-v1.zip").write_bytes(content)
        archive = replace(
            PUBLISHED["wikitext2"].archives[0],
            url=f"{address}/wikitext-2-v1.zip",
            sha256=sha256 or hashlib.sha256(content).hexdigest(),
        )
        set_published_counts("wikitext2", *COUNTS)
        monkeypatch.setitem(PUBLISHED, "wikitext2", replace(PUBLISHED["wikitext2"], archives=(archive,)))

    return publish


def zipped(*, without: str = "", compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("wikitext-2/", "")
        for split, text in SPLITS.items():
            if split != without:
                archive.writestr(f"wikitext-2/wiki.{split}.tokens", text)
    return buffer.getvalue()


def refusal(name: str, folder: Path, kind: type[Exception], **options) -> str:
    with pytest.raises(kind) as caught:
        prepare_corpus(name, folder, **options)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("server")
def test_corpus_is_downloaded_prepared_and_then_only_verified(serve: Callable[..., None], tmp_path: Path):
    serve(zipped())
    folder = tmp_path / "new" / "wikitext-2"
    seen: list[tuple[str, float]] = []
    summary = prepare_corpus("wikitext2", folder, progress=lambda what, fraction: seen.append((what, fraction)))
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["name"], summary["types"], summary["downloaded"]) == ("wikitext2", 4, True)
    assert summary["tokens"] == {"train": 6, "valid": 2, "test": 3}
    assert any(what.startswith("downloading http://127.0.0.1") and fraction == 1 for what, fraction in seen)
    assert contents(folder) == ["prepared", "wiki.test.tokens", "wiki.train.tokens", "wiki.valid.tokens"]
    again = prepare_corpus("wikitext2", folder, download=False)
    assert again["fingerprint"] == summary["fingerprint"]
    assert not again["downloaded"]
    corpus = load_corpus(DataConfig(corpus="wikitext2", unit="word", folder=str(folder), cache=str(tmp_path / "none")))
    assert corpus.fingerprint == summary["fingerprint"]
    assert not (tmp_path / "none").exists()


def test_three_plain_files_are_downloaded(
    server: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    set_published_counts: Callable[..., None],
):
    root, address = server
    archives = []
    for (split, text), published in zip(SPLITS.items(), PUBLISHED["penn_treebank"].archives, strict=True):
        assert published.members == ()
        (root / f"ptb.{split}.txt").write_text(text)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        archives.append(Archive(url=f"{address}/ptb.{split}.txt", sha256=sha256))
    set_published_counts("penn_treebank", *COUNTS)
    monkeypatch.setitem(PUBLISHED, "penn_treebank", replace(PUBLISHED["penn_treebank"], archives=tuple(archives)))
    summary = prepare_corpus("penn_treebank", tmp_path / "ptb")
    assert summary["tokens"]["train"] == 6
    assert contents(tmp_path / "ptb") == ["prepared", "ptb.test.txt", "ptb.train.txt", "ptb.valid.txt"]
    for split, text in SPLITS.items():
        path = tmp_path / "ptb" / f"ptb.{split}.txt"
        assert path.read_text() == text
        assert path.stat().st_mode & 0o044  # others may read it, as any file


def test_text_in_the_data_folder_is_prepared_without_download(
    write_splits: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    set_published_counts: Callable[..., None],
):
    set_published_counts("wikitext103", *COUNTS)
    monkeypatch.setenv("DEEPEQ_DATA", str(tmp_path))
    raw = write_splits(*SPLITS.values(), folder="wikitext-103")
    summary = prepare_corpus("wikitext103", tmp_path / "mine", download=False)
    assert summary["sources"][0] == str(raw / "train.txt")
    assert contents(tmp_path / "mine") == ["prepared"]
    assert len(contents(raw)) == 3


def test_changed_text_is_prepared_again(write_splits: Callable[..., Path], set_published_counts: Callable[..., None]):
    set_published_counts("wikitext2", *COUNTS)
    folder = write_splits(*SPLITS.values())
    first = prepare_corpus("wikitext2", folder)
    write_splits("a b\n\na\n", SPLITS["valid"], SPLITS["test"])
    (folder / "train.txt").touch()
    second = prepare_corpus("wikitext2", folder)
    assert first["fingerprint"] != second["fingerprint"]


def test_text_that_is_not_the_published_one_is_refused(write_splits: Callable[..., Path]):
    message = refusal("wikitext2", write_splits(*SPLITS.values()), ValueError)
    assert "4 instead of 33,278 types" in message
    assert "it is not WikiText-2" in message


def test_damaged_preparation_is_named(write_splits: Callable[..., Path], set_published_counts: Callable[..., None]):
    set_published_counts("wikitext2", *COUNTS)
    folder = write_splits(*SPLITS.values())
    prepare_corpus("wikitext2", folder)
    ids = folder / "prepared" / "corpus.safetensors"
    content = bytearray(ids.read_bytes())
    content[-1] ^= 1
    ids.write_bytes(content)
    assert refusal("wikitext2", folder, ValueError).startswith(f"{ids} is damaged")


def test_preparation_of_version_0_1_is_replaced(
    write_splits: Callable[..., Path], set_published_counts: Callable[..., None]
):
    set_published_counts("wikitext2", *COUNTS)
    folder = write_splits(*SPLITS.values())
    (folder / "prepared").mkdir()
    (folder / "prepared" / "corpus.json").write_text('{"format": "deepeq.corpus.v1"}')
    prepare_corpus("wikitext2", folder)
    assert contents(folder / "prepared") == ["corpus.safetensors", "tokenizer.json"]


@pytest.mark.usefixtures("server")
def test_wrong_checksum_is_named_and_nothing_kept(serve: Callable[..., None], tmp_path: Path):
    serve(zipped(), sha256="0" * 64)
    message = refusal("wikitext2", tmp_path / "new", ValueError)
    assert "wikitext-2-v1.zip does not have the checksum 000000000000..." in message
    assert contents(tmp_path / "new") == []


@pytest.mark.usefixtures("server")
def test_truncated_download_is_named(serve: Callable[..., None], tmp_path: Path):
    whole = zipped()
    serve(whole[:-30], sha256=hashlib.sha256(whole).hexdigest())
    assert "so the download is incomplete" in refusal("wikitext2", tmp_path / "new", ValueError)
    assert contents(tmp_path / "new") == []


@pytest.mark.usefixtures("server")
def test_address_without_the_file_is_named(serve: Callable[..., None], server: tuple[Path, str], tmp_path: Path):
    serve(zipped())
    (server[0] / "wikitext-2-v1.zip").unlink()
    message = refusal("wikitext2", tmp_path / "new", OSError)
    assert "wikitext-2-v1.zip cannot be downloaded (" in message
    assert "404" in message


def test_download_can_be_declined(tmp_path: Path):
    message = refusal("penn_treebank", tmp_path / "new", FileNotFoundError, download=False)
    assert message.startswith("the text of Penn Treebank is neither in ")
    assert not (tmp_path / "new").exists()


def test_unknown_corpus_is_named(tmp_path: Path):
    message = refusal("enwik8", tmp_path, ValueError)
    assert message == "name must be 'penn_treebank' or 'wikitext2' or 'wikitext103', got 'enwik8'"
