"""Prepared folders: the ids of the text whatever the blocks, made whole or not at all, and damage that is named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepeq.data import SPLITS, Corpus, DataConfig, Tokenizer, load_corpus, preparation
from deepeq.data import text as text_module
from deepeq.data.preparation import open_prepared, prepare
from deepeq.data.text import StringSource, Text
from deepeq.data.tokenizer import Unit
from deepeq.files import Progress, sha256_of

REPEATABLE = settings(deadline=None, derandomize=True, database=None)
LINES = "the cat sat\n\non the mat\nthe end\n"


@pytest.fixture
def text_folder(write_splits: Callable[..., Path]) -> Path:
    return write_splits(LINES, "the dog sat\n", "the mat\n")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(
    folder: Path,
    cache: Path,
    *,
    unit: Unit = "word",
    vocab_size: int | None = None,
    progress: Progress | None = None,
) -> Corpus:
    config = DataConfig(corpus="folder", folder=str(folder), unit=unit, vocab_size=vocab_size, cache=str(cache))
    corpus = load_corpus(config, progress=progress)
    assert isinstance(corpus, Corpus)
    return corpus


@pytest.fixture
def prepared(text_folder: Path, cache: Path) -> Path:
    """A prepared folder of LINES."""
    load(text_folder, cache)
    (folder,) = cache.iterdir()
    return folder


def edit_record(folder: Path, **changes: object) -> None:
    path = folder / "corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path, kind: type[Exception] = ValueError, *, verify: bool = False) -> str:
    with pytest.raises(kind) as caught:
        open_prepared(folder, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


def text_of(unit: Unit, train: list[str], valid: list[str]) -> Text:
    """A text whose splits come in given blocks."""
    source = StringSource("blocks", "".join([*train, *valid]))
    splits = {"train": lambda: iter(train), "valid": lambda: iter(valid), "test": lambda: iter(["b a\nb"])}
    size = 300 if unit == "bpe" else None
    return Text(name="blocks", unit=unit, vocab_size=size, sources=(source,), splits=splits)  # pyright: ignore


@REPEATABLE
@given(
    blocks=st.lists(st.text(st.sampled_from("ab c\n"), max_size=8), max_size=8),
    other=st.text(st.sampled_from("ab d\n\u20ac"), max_size=20),
    unit=st.sampled_from(["character", "word"]),
)
def test_streamed_ids_are_those_of_the_text_at_once(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[str], other: str, unit: Unit
):
    folder = tmp_path_factory.mktemp("ids") / "prepared"
    train, valid = ["a a\n", *blocks], ["b\nb", other]
    prepare(text_of(unit, train, valid), folder)
    record, tokenizer, ids = open_prepared(folder, verify=True)
    expected = Tokenizer.from_text("".join(train), unit)
    assert tokenizer == expected
    for split, text in (("train", "".join(train)), ("valid", "".join(valid))):
        assert ids[split].tolist() == expected.encode(text).tolist()
        assert record.splits[split].num_bytes == len(text.encode())


def test_ids_are_renumbered_over_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preparation, "BLOCK_IDS", 3)
    text = "e d d c c c b b b b a a a a a\n" * 2
    prepare(text_of("word", [text], ["a b"]), tmp_path / "prepared")
    _, tokenizer, ids = open_prepared(tmp_path / "prepared")
    assert ids["train"].tolist() == tokenizer.encode(text).tolist()


def test_byte_pairs_decode_to_the_text_and_count_its_bytes(tmp_path: Path):
    train, valid = ["the cat sat on the mat\n", "\u20ac and the hat\n"] * 20, ["zebras \U0001f993 graze\r\n"]
    prepare(text_of("bpe", train, valid), tmp_path / "prepared")
    record, tokenizer, ids = open_prepared(tmp_path / "prepared")
    assert 256 < len(tokenizer) <= 300
    assert tokenizer.decode(ids["train"]) == "".join(train)
    assert tokenizer.decode(ids["valid"]) == "".join(valid)
    assert record.splits["valid"].num_bytes == len("".join(valid).encode())
    assert record.wanted_vocab_size == 300


def test_byte_pairs_of_another_size_are_prepared_for_themselves(text_folder: Path, cache: Path):
    sizes = [load(text_folder, cache, unit="bpe", vocab_size=size).vocab_size for size in (256, 260, 256)]
    assert sizes == [256, 260, 256]
    assert len(list(cache.iterdir())) == 2


def test_prepared_folder_holds_ids_vocabulary_and_a_record(prepared: Path, text_folder: Path):
    assert sorted(path.name for path in prepared.iterdir()) == [
        "corpus.json",
        "test.ids",
        "tokenizer.json",
        "train.ids",
        "valid.ids",
    ]
    record = json.loads((prepared / "corpus.json").read_text())
    assert (record["format"], record["name"], record["unit"]) == ("deepeq.corpus.v2", "text", "word")
    assert record["vocab_size"] == len(Tokenizer.load(prepared / "tokenizer.json")) == 8
    for split, source in zip(SPLITS, record["sources"], strict=True):
        path, ids = text_folder / f"{split}.txt", prepared / f"{split}.ids"
        assert source["path"] == str(path)
        assert source["bytes"] == path.stat().st_size
        assert source["sha256"] == sha256_of(path)
        expected = {"tokens": ids.stat().st_size // 4, "sha256": sha256_of(ids), "num_bytes": path.stat().st_size}
        assert record["splits"][split] == expected


def test_splits_are_memory_maps_that_no_write_reaches(prepared: Path):
    _, _, ids = open_prepared(prepared)
    assert {split: part.dtype for split, part in ids.items()} == dict.fromkeys(SPLITS, torch.int32)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(prepared / "train.ids") in maps.read_text()
    ids["train"].fill_(1)
    assert open_prepared(prepared, verify=True)[2]["train"].unique().numel() > 1


def test_memory_holds_a_block_of_the_text_and_not_all(
    write_splits: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(preparation, "BLOCK_IDS", 1 << 12)
    train = "".join(f"word{index % 997} of a line that goes on\n" for index in range(60_000))  # 2 MB
    folder = write_splits(train, "a b\n", "c d\n")
    tracemalloc.start()
    corpus = load(folder, cache)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus.train) == 480_000
    # As Python strings the words would take 30 MB, as 64-bit ids 4 MB.
    assert peak < 1_500_000


def test_second_load_reads_what_the_first_prepared(text_folder: Path, cache: Path):
    seen: list[tuple[str, float]] = []
    first = load(text_folder, cache, progress=lambda what, fraction: seen.append((what, fraction)))
    assert {what for what, _ in seen} == {f"reading the {name} text" for name in ("training", "validation", "test")}
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < fractions[-1] == 1
    seen.clear()
    second = load(text_folder, cache, progress=lambda what, fraction: seen.append((what, fraction)))
    assert not seen
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.train, second.train)
    assert len(list(cache.iterdir())) == 1


def test_changed_text_is_prepared_again(text_folder: Path, cache: Path):
    first = load(text_folder, cache)
    (text_folder / "train.txt").write_text(LINES.replace("cat", "cow"))
    os.utime(text_folder / "train.txt", ns=(1, 1))  # of the same size, so that the time alone tells
    second = load(text_folder, cache)
    assert "cow" in second.tokenizer.tokens
    assert first.fingerprint != second.fingerprint


def test_each_level_is_prepared_for_itself(text_folder: Path, cache: Path):
    assert load(text_folder, cache, unit="word").unit == "word"
    assert load(text_folder, cache, unit="character").unit == "character"
    assert len(list(cache.iterdir())) == 2


def test_fingerprint_tells_ids_and_vocabularies_apart(write_splits: Callable[..., Path], cache: Path):
    splits = [
        ("a b\n", "a\n", "b\n"),
        ("a c\n", "a\n", "c\n"),  # the same ids, other words
        ("a b\n", "b\n", "b\n"),
        ("a b\n", "a\n", "a\n"),
        ("b a\n", "a\n", "b\n"),
    ]
    prints = [load(write_splits(*parts, folder=str(index)), cache).fingerprint for index, parts in enumerate(splits)]
    assert len(set(prints)) == 5
    assert load(write_splits(*splits[0], folder="elsewhere"), cache).fingerprint == prints[0]


def test_text_in_a_folder_that_cannot_be_written_is_prepared_elsewhere(text_folder: Path, cache: Path):
    text_folder.chmod(0o500)
    try:
        before = sorted(text_folder.iterdir())
        assert load(text_folder, cache).name == "text"
        assert sorted(text_folder.iterdir()) == before
    finally:
        text_folder.chmod(0o700)


def test_prepared_folder_is_a_folder_to_load_from(prepared: Path, text_folder: Path, cache: Path, tmp_path: Path):
    fingerprint = load(text_folder, cache).fingerprint
    moved = tmp_path / "moved"
    shutil.copytree(prepared, moved)
    shutil.rmtree(text_folder)
    assert load(moved, cache).fingerprint == fingerprint
    # As `deepeq data` leaves it: the prepared folder inside that of the text.
    (tmp_path / "whole").mkdir()
    moved.rename(tmp_path / "whole" / "prepared")
    assert load(tmp_path / "whole", cache).fingerprint == fingerprint


def test_prepared_folder_beside_a_changed_text_is_not_used(prepared: Path, text_folder: Path, cache: Path):
    prepared.rename(text_folder / "prepared")
    load(text_folder, cache)
    assert list(cache.iterdir()) == []
    (text_folder / "valid.txt").write_text("a new text\n")
    assert load(text_folder, cache).valid.tolist() == [1, 1, 1, 0]


def test_prepared_folder_of_another_level_beside_the_text_is_not_used(prepared: Path, text_folder: Path, cache: Path):
    prepared.rename(text_folder / "prepared")
    corpus = load(text_folder, cache, unit="character")
    assert corpus.tokenizer.decode(corpus.train) == LINES


def test_folder_of_another_level_or_corpus_is_refused(prepared: Path, cache: Path):
    with pytest.raises(
        ValueError, match=r"of the unit 'word', but data\.unit is 'character'; set data\.unit to 'word'$"
    ):
        load(prepared, cache, unit="character")
    config = DataConfig(corpus="wikitext103", folder=str(prepared), unit="word")
    with pytest.raises(
        ValueError, match=r"holds the corpus 'text', but .* 'wikitext103'; set data\.corpus to 'folder'"
    ):
        load_corpus(config)


def test_interrupted_preparation_leaves_nothing(text_folder: Path, cache: Path):
    def interrupt(what: str, fraction: float) -> None:
        if "test" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(text_folder, cache, progress=interrupt)
    assert list(cache.iterdir()) == []
    load(text_folder, cache)


KILLED = """
import os, signal, sys
from deepeq.data import DataConfig, load_corpus
config = DataConfig(corpus="folder", folder=sys.argv[1], unit="word", cache=sys.argv[2])
load_corpus(config, progress=lambda what, fraction: os.kill(os.getpid(), signal.SIGKILL) if "test" in what else None)
"""


def test_killed_preparation_leaves_nothing_that_is_taken_for_whole(text_folder: Path, cache: Path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(text_folder), str(cache)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (rest,) = cache.iterdir()
    assert rest.name.startswith(".")
    corpus = load(text_folder, cache)
    assert corpus.test.tolist() == corpus.tokenizer.encode("the mat\n").tolist()


def test_two_preparations_at_once_give_one_folder(text_folder: Path, cache: Path):
    others: list[Corpus] = []

    def prepare_too(what: str, fraction: float) -> None:
        if "test" in what and not others:
            others.append(load(text_folder, cache))

    corpus = load(text_folder, cache, progress=prepare_too)
    assert corpus.fingerprint == others[0].fingerprint
    assert len(list(cache.iterdir())) == 1
    assert torch.equal(corpus.train, others[0].train)


def test_text_that_changes_while_it_is_read_is_refused(text_folder: Path, cache: Path):
    def append(what: str, fraction: float) -> None:
        if "test" in what:  # once, or the reader would never arrive at the end
            with (text_folder / "train.txt").open("a") as file:
                file.write("more\n")

    with pytest.raises(ValueError, match="changed while it was read"):
        load(text_folder, cache, progress=append)
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_written_is_named(text_folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"the cache .*file.*inside cannot be written .*--data\.cache .*DEEPEQ_CACHE"):
        load(text_folder, tmp_path / "file" / "inside")


def test_cache_that_is_read_only_is_named(text_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not bind every user
    with pytest.raises(OSError, match=r"the cache .* cannot be written \(it is read-only\)"):
        load(text_folder, cache)


def test_cache_is_where_the_environment_says(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = DataConfig(corpus="folder", folder=str(text_folder), unit="word")
    monkeypatch.setenv("DEEPEQ_CACHE", str(tmp_path / "named"))
    load_corpus(config)
    assert len(list((tmp_path / "named").iterdir())) == 1
    monkeypatch.delenv("DEEPEQ_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    load_corpus(config)
    assert len(list((tmp_path / ".cache" / "deepeq").iterdir())) == 1


@pytest.mark.parametrize("name", ["corpus.json", "tokenizer.json", "train.ids", "valid.ids", "test.ids"])
def test_missing_file_is_named(prepared: Path, name: str):
    (prepared / name).unlink()
    assert name in refusal(prepared, FileNotFoundError)


@pytest.mark.parametrize("change", [-1, 4])
def test_file_of_ids_of_another_size_is_named(prepared: Path, change: int):
    path = prepared / "valid.ids"
    os.truncate(path, path.stat().st_size + change)
    message = refusal(prepared)
    assert message.startswith(f"{path} is damaged: it has {16 + change} bytes instead of 16")
    assert f"delete {prepared} and prepare" in message


def test_ids_outside_the_vocabulary_are_named(prepared: Path):
    path = prepared / "test.ids"
    for wrong in (8, -1):
        np.array([2, wrong, 0], dtype="<i4").tofile(path)
        assert refusal(prepared).startswith(f"{path} is damaged: its ids")


def test_changed_id_is_found_by_verification(prepared: Path):
    path = prepared / "train.ids"
    ids = np.fromfile(path, dtype="<i4")
    ids[5] = 1
    ids.tofile(path)
    open_prepared(prepared)
    assert refusal(prepared, verify=True).startswith(f"{path} is damaged: its checksum is not the recorded one")


def test_changed_vocabulary_is_named(prepared: Path):
    path = prepared / "tokenizer.json"
    path.write_text(path.read_text().replace("cat", "cow"))
    assert refusal(prepared).startswith(f"{path} is damaged: its checksum is not the recorded one")


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 9},
        {"vocab_size": "8"},
        {"unit": "byte"},
        {"unit": ["word"]},
        {"name": 3},
        {"wanted_vocab_size": "3"},
        {"splits": {}},
        {"splits": []},
        {"splits": {key: {"tokens": "16", "sha256": "0", "num_bytes": 3} for key in SPLITS}},
        {"splits": {key: {"tokens": -4, "sha256": "0", "num_bytes": 3} for key in SPLITS}},
        {"splits": {key: {"tokens": 4} for key in SPLITS}},
        {"sources": None},
        {"unknown": 1},
        {"tokenizer_sha256": "0"},
    ],
)
def test_damaged_record_is_named(prepared: Path, changes: dict):
    edit_record(prepared, **changes)
    assert "is damaged: " in refusal(prepared)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 1_000_000])
def test_record_that_is_not_json_is_named(prepared: Path, content: bytes):
    (prepared / "corpus.json").write_bytes(content)
    assert refusal(prepared).startswith(f"{prepared / 'corpus.json'} is damaged: it is not readable as JSON")


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "deepeq.corpus.v1"}', '{"model": "bert"}'])
def test_foreign_record_is_named(prepared: Path, content: str):
    (prepared / "corpus.json").write_text(content)
    assert "corpus.json is not of the format 'deepeq.corpus.v2'" in refusal(prepared)
