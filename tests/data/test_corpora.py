"""Corpora: what is read and where from, how it is split, the unigram bound, and the sentences of the errors."""

import math
import os
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepeq.data import (
    SPLITS,
    CopyMemory,
    CopyMemoryConfig,
    Corpus,
    DataConfig,
    DataSource,
    known_vocab_size,
    load_corpus,
    unigram_bits,
)

PTB_FINGERPRINT = "6334efacec041c1e1d8169cb628908a1c3c8953022ee9310cee97e5422bbdff9"
"""What version 0.1 gives: one checksum of the vocabulary and the ids."""


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def load_text(config: DataConfig) -> Corpus:
    corpus = load_corpus(config)
    assert isinstance(corpus, Corpus)
    return corpus


def texts(corpus: Corpus) -> list[str]:
    return [corpus.tokenizer.decode(ids) for ids in (corpus.train, corpus.valid, corpus.test)]


def error_of(config: DataConfig, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        load_corpus(config)
    assert "\n" not in str(caught.value)
    assert not str(caught.value).endswith(".")
    return str(caught.value)


@pytest.fixture(scope="module")
def penn_treebank() -> Corpus:
    root = os.environ.get("DEEPEQ_DATA")
    if not root or not (Path(root) / "ptb").is_dir():
        pytest.skip("Penn Treebank is not here: DEEPEQ_DATA names no folder that holds ptb")
    return load_text(DataConfig(corpus="penn_treebank", unit="word"))


def test_penn_treebank_has_the_published_counts(penn_treebank: Corpus):
    assert penn_treebank.name == "penn_treebank"
    assert len(penn_treebank.tokenizer) == 10_000
    assert penn_treebank.train.shape == (929_589,)
    assert penn_treebank.valid.shape == (73_760,)
    assert penn_treebank.test.shape == (82_430,)


def test_penn_treebank_has_the_ids_of_version_0_1(penn_treebank: Corpus):
    assert penn_treebank.fingerprint == PTB_FINGERPRINT


def test_penn_treebank_has_its_own_unknown_word_and_line_ends(penn_treebank: Corpus):
    assert penn_treebank.tokenizer.tokens[:5] == ("<eos>", "<unk>", "the", "N", "of")
    counts = torch.bincount(penn_treebank.train)
    assert counts[:2].tolist() == [42_068, 45_020]
    assert counts[2:].diff().le(0).all()
    opening = penn_treebank.tokenizer.decode(penn_treebank.valid[:20])
    assert opening.startswith("consumers may want to move their telephones")


def test_quickstart_is_the_sorted_language_reference_split_80_10_10():
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    corpus = load_text(DataConfig())
    assert corpus.name == "pydoc"
    assert [len(ids) for ids in (corpus.train, corpus.valid, corpus.test)] == pytest.approx(
        [0.8 * len(text), 0.1 * len(text), 0.1 * len(text)], abs=1
    )
    train, valid, test = texts(corpus)
    assert train == text[: len(train)]
    # A later CPython may spell its last topics with characters that its first ones lack.
    assert [a for a, b in zip(valid + test, text[len(train) :], strict=True) if a not in (b, "\ufffd")] == []


def test_quickstart_unigram_bound_is_about_4_7_bits():
    corpus = load_text(DataConfig())
    bits = unigram_bits(corpus.train, corpus.test, len(corpus.tokenizer))
    assert bits == pytest.approx(4.67, abs=0.05)


def test_unigram_bits_of_a_case_worked_by_hand():
    # Counts plus one are 3, 2, 1, 2 of 8.
    train, test = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 2, 1])
    expected = (math.log2(8 / 3) + 3 + 2) / 3
    assert unigram_bits(train, test, 4) == pytest.approx(expected, abs=1e-12)


def test_unigram_bits_without_training_are_those_of_the_uniform_distribution():
    empty = torch.tensor([], dtype=torch.int64)
    assert unigram_bits(empty, torch.tensor([5, 7, 7]), 8) == pytest.approx(3.0, abs=1e-12)


def test_unigram_bits_refuses_ids_it_cannot_count():
    ids = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"train_ids must lie in 0 \.\. 1 \(vocab_size - 1\), got 0 \.\. 2"):
        unigram_bits(torch.tensor([0, 2]), ids, 2)
    with pytest.raises(ValueError, match=r"test_ids must lie in 0 \.\. 1 .*, got -1 \.\. 0"):
        unigram_bits(ids, torch.tensor([0, -1]), 2)
    with pytest.raises(ValueError, match="test_ids must hold at least one id"):
        unigram_bits(ids, ids[:0], 2)
    with pytest.raises(ValueError, match=r"train_ids must be one-dimensional, got the shape \(1, 2\)"):
        unigram_bits(ids[None], ids, 2)


def test_files_are_joined_in_order_by_newlines_and_split_by_characters(tmp_path: Path):
    first, second = write(tmp_path / "one.txt", "abcdefghij"), write(tmp_path / "two.txt", "klmnopqrs")
    corpus = load_text(DataConfig(files=(second, first)))
    assert corpus.name == "two.txt+one.txt"
    # All twenty characters differ, so nothing outside the first sixteen is in the training tokenizer.
    assert texts(corpus) == ["klmnopqrs\nabcdef", "\ufffd\ufffd", "\ufffd\ufffd"]
    assert len(corpus.tokenizer) == 17


def test_files_of_words_are_split_at_the_nearest_line_ends(tmp_path: Path):
    lines = [f"word {index}\n" for index in range(10)]
    # Of 72 characters, the cuts 57 and 64 fall into line 8, beside its start (56) and its end (65).
    lines[8] = "a word 8\n"
    text = "".join(lines)
    corpus = load_text(DataConfig(files=(write(tmp_path / "a.txt", text),), unit="word"))
    assert [len(ids) for ids in (corpus.train, corpus.valid, corpus.test)] == [24, 4, 3]
    assert texts(corpus)[0] == "".join(lines[:8])


def test_cut_moves_to_the_nearer_of_two_line_ends(tmp_path: Path):
    early = "a" * 78 + "\n" + "b" * 9 + "\n" + "c c\n" + "d" * 3 + " d\n"
    late = "a" * 70 + "\n" + "b" * 9 + "\n" + "c c c c c\n" + "d d d d d\n"
    for text, length in ((early, 79), (late, 81)):
        corpus = load_text(DataConfig(files=(write(tmp_path / "a.txt", text),), unit="word"))
        assert len(texts(corpus)[0]) == length


def test_cut_that_already_is_a_line_end_stays(tmp_path: Path):
    text = "a b c d\n" * 8 + "a b\nc d\n" + "a\nb\nc d\n"
    corpus = load_text(DataConfig(files=(write(tmp_path / "a.txt", text),), unit="word"))
    assert texts(corpus) == ["a b c d\n" * 8, "a b\nc d\n", "a\nb\nc d\n"]


def test_byte_order_mark_and_windows_line_ends_are_not_part_of_the_text(tmp_path: Path):
    plain = write(tmp_path / "plain.txt", "ab\n" * 10)
    windows = write(tmp_path / "windows.txt", b"\xef\xbb\xbf" + b"ab\r\n" * 10)
    one, other = (load_text(DataConfig(files=(path,))) for path in (plain, windows))
    assert one.tokenizer == other.tokenizer
    assert torch.equal(one.train, other.train)


def test_files_replace_the_named_corpus(tmp_path: Path):
    file = write(tmp_path / "a.txt", "ab\n" * 10)
    assert load_text(DataConfig(corpus="penn_treebank", files=(file,))).name == "a.txt"


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path / "a.txt", "ab\n" * 10)
    assert load_text(DataConfig(files=("~/a.txt",))).train.shape == (24,)


def test_missing_file_is_named(tmp_path: Path):
    absent = tmp_path / "absent.txt"
    files = (write(tmp_path / "a.txt", "ab\n" * 10), str(absent))
    assert error_of(DataConfig(files=files), FileNotFoundError).startswith(f"{absent} is missing")
    assert error_of(DataConfig(files=(str(tmp_path),)), FileNotFoundError).startswith(f"{tmp_path} is missing")


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_empty_file_is_named(tmp_path: Path, content: str):
    files = (write(tmp_path / "a.txt", "ab\n" * 10), write(tmp_path / "empty.txt", content))
    assert error_of(DataConfig(files=files)).startswith(f"{files[1]} is empty")


def test_file_that_is_not_utf8_is_named_with_its_first_wrong_byte(tmp_path: Path):
    file = write(tmp_path / "latin.txt", "caf\u00e9".encode("latin-1"))
    assert error_of(DataConfig(files=(file,))).startswith(f"{file} is not UTF-8 text (byte 3 is 0xe9)")


@pytest.mark.parametrize("content", ["a", "abcdefghi"])
def test_too_short_file_of_characters_is_named(tmp_path: Path, content: str):
    file = write(tmp_path / "a.txt", content)
    message = error_of(DataConfig(files=(file,)))
    assert message.startswith(f"{file} is too short: its ")
    assert "split needs at least 2 tokens" in message


def test_file_of_words_on_one_line_is_too_short(tmp_path: Path):
    file = write(tmp_path / "a.txt", "many words on one line\n")
    message = error_of(DataConfig(files=(file,), unit="word"))
    assert "validation split needs at least 2 tokens, got 0; give a text of more lines" in message


def test_missing_penn_treebank_says_where_it_was_sought_and_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = DataConfig(corpus="penn_treebank", unit="word")
    monkeypatch.setenv("DEEPEQ_DATA", str(tmp_path))
    sought = error_of(config, FileNotFoundError)
    assert str(tmp_path / "ptb") in sought
    elsewhere = DataConfig(corpus="penn_treebank", unit="word", folder=str(tmp_path / "elsewhere"))
    named = error_of(elsewhere, FileNotFoundError)
    assert str(tmp_path / "elsewhere") in named
    monkeypatch.delenv("DEEPEQ_DATA")
    unset = error_of(config, FileNotFoundError)
    assert "no folder is named" in unset
    for message in (sought, named, unset):
        assert "--data.folder" in message
        assert "DEEPEQ_DATA" in message


def test_penn_treebank_is_read_from_the_folder_or_else_from_the_data_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_splits: Callable[..., Path],
    set_published_counts: Callable[..., None],
):
    monkeypatch.setenv("DEEPEQ_DATA", str(tmp_path))
    set_published_counts("penn_treebank", 4, (9, 3, 6))
    for folder, word in (("ptb", "default"), ("own", "given")):
        splits = (f" {word} {split} \n" * count for split, count in (("train", 3), ("valid", 1), ("test", 2)))
        write_splits(*splits, folder=folder)
    config = DataConfig(corpus="penn_treebank", unit="word", folder=str(tmp_path / "own"))
    by_default = load_text(DataConfig(corpus="penn_treebank", unit="word"))
    assert texts(by_default) == ["default train\n" * 3, "default <unk>\n", "default <unk>\n" * 2]
    assert texts(load_text(config))[0] == "given train\n" * 3
    (tmp_path / "own" / "valid.txt").unlink()
    missing = error_of(config, FileNotFoundError)
    assert missing.startswith(f"{tmp_path / 'own' / 'valid.txt'} is missing")
    assert "deepeq data penn_treebank" in missing


def test_text_that_is_not_the_published_one_is_refused_under_its_name(write_splits: Callable[..., Path]):
    folder = str(write_splits("a b\n" * 5, "a\n", "b\n"))
    message = error_of(DataConfig(corpus="penn_treebank", unit="word", folder=folder))
    assert "4 instead of 10,000 types, 15 instead of 929,589 tokens in train" in message
    assert "set data.corpus to 'folder'" in message
    assert load_text(DataConfig(corpus="folder", unit="word", folder=folder)).name == "text"


@pytest.mark.parametrize("names", ["{}.txt", "wiki.{}.tokens", "ptb.{}.txt"])
def test_folder_is_read_under_any_of_the_published_file_names(write_splits: Callable[..., Path], names: str):
    folder = write_splits(" a b \n \n c\n", "a d\n", "\nb\n", names=names)
    words = load_text(DataConfig(corpus="folder", unit="word", folder=str(folder)))
    assert texts(words) == ["a b\n\nc\n", "a <unk>\n", "\nb\n"]
    characters = load_text(DataConfig(corpus="folder", folder=str(folder)))
    assert texts(characters) == [" a b \n \n c\n", "a \ufffd\n", "\nb\n"]


def test_files_of_one_naming_scheme_are_read_together(write_splits: Callable[..., Path]):
    folder = write_splits("a b\n", "a\n", "b\n", names="wiki.{}.tokens")
    write(folder / "valid.txt", "of another text\n")
    corpus = load_text(DataConfig(corpus="folder", unit="word", folder=str(folder)))
    assert texts(corpus)[1] == "a\n"


def test_missing_folder_is_named(tmp_path: Path):
    message = error_of(DataConfig(corpus="folder", folder=str(tmp_path / "absent")), FileNotFoundError)
    assert message == f"{tmp_path / 'absent'} is not a folder; give the folder of the text as --data.folder"


def test_wikitext_validation_and_test_text_have_the_published_counts(tmp_path: Path):
    root = os.environ.get("DEEPEQ_DATA")
    if not root or not (Path(root) / "wikitext-2" / "valid.txt").is_file():
        pytest.skip("WikiText-2 is not here: DEEPEQ_DATA names no folder that holds wikitext-2")
    for split in ("train", "valid", "test"):  # the training split is not at hand; another has its place
        source = "valid" if split == "train" else split
        (tmp_path / f"{split}.txt").symlink_to(Path(root) / "wikitext-2" / f"{source}.txt")
    corpus = load_text(DataConfig(corpus="folder", unit="word", folder=str(tmp_path)))
    assert (len(corpus.valid), len(corpus.test)) == (217_646, 245_569)
    assert corpus.tokenizer.tokens[:3] == ("<eos>", "<unk>", "the")
    # Ids of a split that made the tokenizer fall in frequency, as an adaptive softmax needs them.
    assert torch.bincount(corpus.valid)[2:].diff().le(0).all()


def test_text_and_task_offer_the_same_to_training(tmp_path: Path):
    file = write(tmp_path / "a.txt", "abcdefgh\n" * 40)
    sources: list[tuple[DataSource, int]] = [
        (load_corpus(DataConfig(files=(file,))), 7),
        (load_corpus(DataConfig(corpus="copy_memory", copy_memory=CopyMemoryConfig(num_train=5, num_test=3))), 420),
    ]
    for source, segment_len in sources:
        for split in SPLITS:
            batches = source.stream(split, batch_size=2, segment_len=segment_len)
            passes = list(batches)
            assert len(passes) == batches.num_segments
            assert sum(targets.numel() for _, targets in passes) == batches.num_tokens
            assert batches.segment(0)[0].dtype == torch.int64
            assert all(int(part.max()) < source.vocab_size for pair in passes for part in pair)
    (text, _), (task, _) = sources
    assert (text.unit, task.unit) == ("character", "symbol")
    assert text.tokenizer is not None
    assert task.tokenizer is None
    assert text.fingerprint != task.fingerprint


def test_stream_of_a_split_reads_its_ids(tmp_path: Path):
    corpus = load_text(DataConfig(files=(write(tmp_path / "a.txt", "abcdefgh\n" * 40),)))
    for split in SPLITS:
        inputs, _ = corpus.stream(split, batch_size=1, segment_len=4).segment(0)
        assert inputs[0].tolist() == corpus.split(split)[:4].tolist()


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (DataConfig(corpus="penn_treebank", unit="word"), 10_000),
        (DataConfig(corpus="wikitext2", unit="word"), 33_278),
        (DataConfig(corpus="wikitext103", unit="word"), 267_735),
        (DataConfig(corpus="copy_memory"), 10),
        (DataConfig(), None),
        (DataConfig(corpus="folder", folder="x"), None),
        (DataConfig(corpus="wikitext2", unit="bpe", vocab_size=500), None),
        (DataConfig(corpus="penn_treebank", unit="word", files="a.txt"), None),
    ],
)
def test_published_vocabulary_sizes_are_known_without_any_file(config: DataConfig, size: int | None):
    assert known_vocab_size(config) == size


def test_copy_memory_is_made_as_configured():
    task = load_corpus(DataConfig(corpus="copy_memory", copy_memory=CopyMemoryConfig(blank_len=7, num_train=4)))
    assert isinstance(task, CopyMemory)
    assert task.sequences("train")[0].shape == (4, 27)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corpus": "enwik8"}, "data.corpus must be 'pydoc' or 'penn_treebank' or"),
        ({"unit": "byte"}, "data.unit must be 'character' or 'word' or 'bpe', got 'byte'"),
        ({"files": ["a.txt"]}, "data.files must be a tuple of paths as strings, got ['a.txt']"),
        ({"files": ("a.txt", "")}, "data.files must be a tuple of paths as strings, got ('a.txt', '')"),
        (
            {"corpus": "penn_treebank", "unit": "word", "folder": ""},
            "data.folder must be a string that is not empty",
        ),
        ({"corpus": "penn_treebank"}, "data.unit must be 'word' or 'bpe' for the corpus 'penn_treebank'"),
        (
            {"folder": "ptb"},
            "data.folder is read only for the corpora 'folder', 'penn_treebank', 'wikitext2', 'wikitext103', got 'ptb'",
        ),
        ({"corpus": "folder"}, "data.folder must name the folder of the text for the corpus 'folder', got None"),
        ({"corpus": "wikitext103"}, "data.unit must be 'word' or 'bpe' for the corpus 'wikitext103'"),
        ({"cache": ""}, "data.cache must be a string that is not empty, got ''"),
        ({"corpus": "copy_memory", "unit": "word"}, "data.unit must be left out for the corpus 'copy_memory'"),
        ({"corpus": "copy_memory", "folder": "x"}, "data.folder is read only for the corpora"),
        ({"copy_memory": CopyMemoryConfig(seed=3)}, "data.copy_memory is read only for the corpus 'copy_memory'"),
        ({"unit": "bpe"}, "data.vocab_size must be a whole number >= 256 for data.unit='bpe', got None"),
        (
            {"unit": "bpe", "vocab_size": 255},
            "data.vocab_size must be a whole number >= 256 for data.unit='bpe', got 255",
        ),
        ({"vocab_size": 300}, "data.vocab_size is read only for data.unit='bpe', got 300; leave it out"),
        ({"text_field": ""}, "data.text_field must be a string that is not empty, got ''"),
        ({"text_field": "body", "files": "a.txt"}, "data.text_field is read only for files named *.jsonl, got 'body'"),
        ({"copy_memory": {"seed": 3}}, "data.copy_memory must be a CopyMemoryConfig, got {'seed': 3}"),
    ],
)
def test_wrong_field_is_named_at_construction(fields: dict, message: str):
    with pytest.raises(ValueError, match="data") as caught:
        DataConfig(**fields)
    assert str(caught.value).startswith(message)


def test_all_wrong_fields_are_named_together():
    with pytest.raises(ValueError, match=r"data\.corpus must be .*; data\.unit must be .*; data\.files must be"):
        DataConfig(corpus="x", unit="y", files=[])  # pyright: ignore[reportArgumentType]


def test_unknown_field_is_refused():
    with pytest.raises(TypeError, match="lvel"):
        DataConfig(lvel="word")  # pyright: ignore[reportCallIssue]


def test_each_field_of_a_file_of_documents_is_a_text_of_its_own(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", '{"text": "ab", "body": "cd"}\n' * 20)
    assert texts(load_text(DataConfig(files=file)))[1] == "ab\n" * 2
    assert texts(load_text(DataConfig(files=file, text_field="body")))[1] == "cd\n" * 2


def test_byte_pairs_learn_from_the_training_split_alone(tmp_path: Path):
    file = write(tmp_path / "a.txt", "one two\n" * 90 + "zebra zebra\n" * 10)
    corpus = load_text(DataConfig(files=file, unit="bpe", vocab_size=400))
    assert any("two" in token for token in corpus.tokenizer.tokens)
    assert not any("ze" in token for token in corpus.tokenizer.tokens)
    assert "".join(texts(corpus)) == "one two\n" * 90 + "zebra zebra\n" * 10
    assert corpus.num_bytes == {split: len(text) for split, text in zip(SPLITS, texts(corpus), strict=True)}
    assert corpus.bytes_per_token("train") == pytest.approx(corpus.num_bytes["train"] / len(corpus.train))
    assert load_text(DataConfig(files=file)).bytes_per_token("train") is None
