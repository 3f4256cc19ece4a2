"""Prepared folders: the ids of the text whatever the blocks, made whole or not at all, and damage that is named."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from deepeq.data import SPLITS, Corpus, DataConfig, Split, Tokenizer, load_corpus
from deepeq.data import text as text_module
from deepeq.data.preparation import open_prepared, prepare
from deepeq.data.text import StringSource, Text
from deepeq.data.tokenizer import Unit
from deepeq.files import Progress, read_tensors, sha256_of, write_tensors

REPEATABLE = settings(deadline=None, derandomize=True, database=None, max_examples=60)
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


def rewrite(folder: Path, ids: dict[str, Tensor] | None = None, **changes: object) -> None:
    """Writes the file of ids again with other ids or another record, and a checksum that fits."""
    tensors, metadata = read_tensors(folder / "corpus.safetensors")
    tensors = {name: (ids or {}).get(name, part).clone() for name, part in tensors.items()}
    record = {key: value for key, value in (json.loads(metadata["record"]) | changes).items() if value != "gone"}
    write_tensors(folder / "corpus.safetensors", tensors, metadata | {"record": json.dumps(record)})


def refusal(folder: Path, kind: type[Exception] = ValueError, *, verify: bool = False) -> str:
    with pytest.raises(kind) as caught:
        open_prepared(folder, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


class Blocks(StringSource):
    """A text that is read in the blocks that a separator marks."""

    def blocks(self) -> Iterator[str]:
        yield from self.text.split("|")


def text_of(unit: Unit, train: list[str], valid: list[str]) -> Text:
    """A text whose splits come in given blocks."""
    sources = tuple(Blocks("blocks", "|".join(blocks)) for blocks in (train, valid, ["b a\nb"]))
    return Text(name="blocks", unit=unit, vocab_size=300 if unit == "bpe" else None, sources=sources, is_split=True)


@REPEATABLE
@given(
    blocks=st.lists(st.text(st.sampled_from("ab c\n"), max_size=8), max_size=8),
    other=st.text(st.sampled_from("ab d\n\u20ac"), max_size=20),
    unit=st.sampled_from(["character", "word", "bpe"]),
)
def test_streamed_ids_are_those_of_the_text_at_once(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[str], other: str, unit: Unit
):
    folder = tmp_path_factory.mktemp("ids") / "prepared"
    train, valid = ["a a\n", *blocks], ["b\nb", other]
    prepare(text_of(unit, train, valid), folder)
    record, tokenizer, ids = open_prepared(folder, verify=True)
    expected = Tokenizer.from_text("".join(train), unit, vocab_size=300)
    assert tokenizer == expected
    texts: dict[Split, str] = {"train": "".join(train), "valid": "".join(valid)}
    for split, text in texts.items():
        assert ids[split].tolist() == expected.encode(text).tolist()
        assert record.num_bytes[split] == len(text.encode())


def test_byte_pairs_decode_to_the_text_and_count_its_bytes(tmp_path: Path):
    train, valid = ["the cat sat on the mat\n", "\u20ac and the hat\n"] * 20, ["zebras \U0001f993 graze\r\n"]
    prepare(text_of("bpe", train, valid), tmp_path / "prepared")
    record, tokenizer, ids = open_prepared(tmp_path / "prepared")
    assert 256 < len(tokenizer) <= 300
    assert tokenizer.decode(ids["train"]) == "".join(train)
    assert tokenizer.decode(ids["valid"]) == "".join(valid)
    assert record.num_bytes["valid"] == len("".join(valid).encode())
    assert record.wanted_vocab_size == 300


def test_byte_pairs_of_another_size_are_prepared_for_themselves(text_folder: Path, cache: Path):
    sizes = [load(text_folder, cache, unit="bpe", vocab_size=size).vocab_size for size in (256, 260, 256)]
    assert sizes == [256, 260, 256]
    assert len(list(cache.iterdir())) == 2


def test_prepared_folder_holds_ids_tokenizer_and_a_record(prepared: Path, text_folder: Path):
    assert sorted(path.name for path in prepared.iterdir()) == ["corpus.safetensors", "tokenizer.json"]
    record, tokenizer, ids = open_prepared(prepared)
    assert (record.name, record.unit, record.wanted_vocab_size, len(tokenizer)) == ("text", "word", None, 8)
    for split, source in zip(SPLITS, record.sources, strict=True):
        path = text_folder / f"{split}.txt"
        assert source["path"] == str(path)
        assert source["bytes"] == record.num_bytes[split] == path.stat().st_size
        assert source["sha256"] == sha256_of(path)
        assert record.sha256[split] == hashlib.sha256(ids[split].numpy().astype("<i4").tobytes()).hexdigest()


def test_splits_are_memory_maps_that_no_write_reaches(prepared: Path):
    _, _, ids = open_prepared(prepared)
    assert {split: part.dtype for split, part in ids.items()} == dict.fromkeys(SPLITS, torch.int32)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(prepared / "corpus.safetensors") in maps.read_text()
    ids["train"].fill_(1)
    assert open_prepared(prepared, verify=True)[2]["train"].unique().numel() > 1


@pytest.mark.parametrize(
    ("unit", "fingerprint"),
    [
        ("word", "50a9fc7c850adac17098f4cd24ce395e1506f29ed1c12588d3660279e3dace48"),
        ("character", "5e650b06592c27e7438bc733663caa52c5ad082d9d7930af821c3778919af00c"),
    ],
)
def test_fingerprint_is_that_of_version_0_1(text_folder: Path, cache: Path, unit: Unit, fingerprint: str):
    assert load(text_folder, cache, unit=unit).fingerprint == fingerprint


def test_memory_holds_a_block_of_the_text_and_not_all(
    write_splits: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text_module, "BLOCK_CHARS", 1 << 14)
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
    assert list(dict.fromkeys(what for what, _ in seen)) == [
        "counting the tokens of the training text",
        *(f"encoding the {name} text" for name in ("training", "validation", "test")),
    ]
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


def test_each_unit_is_prepared_for_itself(text_folder: Path, cache: Path):
    assert load(text_folder, cache, unit="word").unit == "word"
    assert load(text_folder, cache, unit="character").unit == "character"
    assert len(list(cache.iterdir())) == 2


def test_fingerprint_tells_ids_and_tokenizers_apart(write_splits: Callable[..., Path], cache: Path):
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


def test_prepared_folder_of_another_unit_beside_the_text_is_not_used(prepared: Path, text_folder: Path, cache: Path):
    prepared.rename(text_folder / "prepared")
    corpus = load(text_folder, cache, unit="character")
    assert corpus.tokenizer.decode(corpus.train) == LINES


def test_folder_of_another_unit_or_corpus_is_refused(prepared: Path, cache: Path):
    with pytest.raises(ValueError, match=r"was prepared with data\.unit='word'; set that, or name another folder$"):
        load(prepared, cache, unit="character")
    config = DataConfig(corpus="wikitext103", folder=str(prepared), unit="word")
    with pytest.raises(
        ValueError, match=r"holds the corpus 'text', but .* 'wikitext103'; set data\.corpus to 'folder'"
    ):
        load_corpus(config)


def test_folder_of_another_number_of_byte_pairs_is_refused(text_folder: Path, cache: Path):
    load(text_folder, cache, unit="bpe", vocab_size=260)
    (folder,) = cache.iterdir()
    assert load(folder, cache, unit="bpe", vocab_size=260).vocab_size == 260
    with pytest.raises(ValueError, match=r"was prepared with data\.unit='bpe' and data\.vocab_size=260; set that"):
        load(folder, cache, unit="bpe", vocab_size=300)


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


@pytest.mark.parametrize("name", ["corpus.safetensors", "tokenizer.json"])
def test_missing_file_is_named(prepared: Path, name: str):
    (prepared / name).unlink()
    assert name in refusal(prepared, FileNotFoundError)


@pytest.mark.parametrize("change", [-1, 4])
def test_file_of_ids_of_another_size_is_named(prepared: Path, change: int):
    path = prepared / "corpus.safetensors"
    os.truncate(path, path.stat().st_size + change)
    message = refusal(prepared)
    assert message.startswith(f"{path} is damaged")
    assert message.endswith(f"delete {prepared} and prepare the corpus again")


@pytest.mark.parametrize("wrong", [8, -1])
def test_ids_outside_the_vocabulary_are_named(prepared: Path, wrong: int):
    rewrite(prepared, {"test": torch.tensor([2, wrong, 0], dtype=torch.int32)})
    path = prepared / "corpus.safetensors"
    assert refusal(prepared).startswith(f"{path} is damaged: its ids {min(wrong, 0)} .. {max(wrong, 2)} are outside")


def test_changed_id_is_found_by_verification(prepared: Path):
    path = prepared / "corpus.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    open_prepared(prepared)
    assert refusal(prepared, verify=True).startswith(f"{path} is damaged")


def test_changed_tokenizer_is_named(prepared: Path):
    path = prepared / "tokenizer.json"
    path.write_text(path.read_text().replace("cat", "cow"))
    assert refusal(prepared).startswith(f"{path} is damaged: its checksum is not the recorded one")


@pytest.mark.parametrize("changes", [{"unknown": 1}, {"sources": "gone"}])
def test_record_of_other_fields_is_named(prepared: Path, changes: dict):
    rewrite(prepared, **changes)
    assert refusal(prepared).endswith(f"delete {prepared} and prepare the corpus again")


def test_foreign_files_are_named(prepared: Path):
    path = prepared / "corpus.safetensors"
    for content in (b"", b"{", b"\xff" * 100, b"[" * 1_000):
        path.write_bytes(content)
        assert refusal(prepared).startswith(f"{path} is damaged")
    save_file({"weight": torch.zeros(3)}, path)
    assert refusal(prepared).startswith(f"{path} is damaged or was not written by deepeq")
    write_tensors(path, {"weight": torch.zeros(3)}, {"format": "pt"})
    assert "corpus.safetensors is not of the format 'deepeq.corpus.v2'" in refusal(prepared)
