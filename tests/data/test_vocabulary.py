"""Vocabularies: order of the tokens, encoding and decoding, files, and the sentences of their errors."""

import json
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepeq.data import Vocabulary

# The same cases in every run, whatever the machine's speed.
REPEATABLE = settings(deadline=None, derandomize=True, database=None)
# A literal <eos> is the end of a line and no word.
WORDS = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=5).filter(lambda w: w != "<eos>")
LINES = st.lists(st.lists(WORDS, max_size=6), max_size=6)


def test_characters_are_sorted_after_the_unknown_one():
    vocabulary = Vocabulary.from_text("banana\n", "character")
    assert vocabulary.tokens == ("<unk>", "\n", "a", "b", "n")
    assert vocabulary.encode("nab\n").tolist() == [4, 2, 3, 1]


def test_words_are_sorted_by_falling_frequency_then_alphabetically():
    vocabulary = Vocabulary.from_text("d b a\nb c d\nd e\n", "word")
    assert vocabulary.tokens == ("<eos>", "<unk>", "d", "b", "a", "c", "e")
    assert vocabulary.encode("a d\n\nb").tolist() == [4, 2, 0, 0, 3]


def test_counted_tokens_make_the_vocabulary_of_their_text():
    counts = {"d": 3, "<eos>": 3, "e": 1, "b": 2, "c": 1, "a": 1}
    assert Vocabulary.from_counts(counts, "word") == Vocabulary.from_text("d b a\nb c d\nd e\n", "word")
    assert Vocabulary.from_counts({"n": 2, "a": 3}, "character") == Vocabulary.from_text("nanaa", "character")


def test_unknown_word_of_the_corpus_is_the_one_that_unseen_words_become():
    vocabulary = Vocabulary.from_text("a <unk> <unk>\n", "word")
    assert vocabulary.tokens == ("<eos>", "<unk>", "a")
    assert vocabulary.encode("zebra <unk> a").tolist() == [1, 1, 2]


def test_literal_end_of_line_among_the_words_ends_a_line():
    vocabulary = Vocabulary.from_text("a <eos> b\n", "word")
    assert vocabulary.tokens == ("<eos>", "<unk>", "a", "b")
    assert vocabulary.decode(vocabulary.encode("b <eos> a <eos>")) == "b\na\n"


def test_unseen_character_is_decoded_as_the_replacement_character():
    vocabulary = Vocabulary.from_text("abc", "character")
    assert vocabulary.encode("aéb").tolist() == [1, 0, 2]
    assert vocabulary.decode(vocabulary.encode("aéb")) == "a\ufffdb"


@REPEATABLE
@given(text=st.text())
def test_characters_survive_encoding_and_decoding(text: str):
    vocabulary = Vocabulary.from_text(text, "character")
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.encode(text).shape == (len(text),)


@REPEATABLE
@given(lines=LINES)
def test_words_survive_encoding_and_decoding_with_single_blanks(lines: list[list[str]]):
    text = "\n".join(" ".join(line) for line in lines)
    vocabulary = Vocabulary.from_text(text, "word")
    assert vocabulary.decode(vocabulary.encode(text)) == text
    spread = "\n".join("\t " + "  ".join(line) + " " for line in lines)
    assert torch.equal(vocabulary.encode(spread), vocabulary.encode(text))


@REPEATABLE
@given(ids=st.lists(st.integers(0, 4)), level=st.sampled_from(["character", "word"]))
def test_known_ids_survive_decoding_and_encoding(ids: list[int], level: str):
    vocabulary = (
        Vocabulary.from_text("abcd", "character") if level == "character" else Vocabulary.from_text("a b c", "word")
    )
    known = [index for index in ids if vocabulary.tokens[index] != "<unk>"]
    assert vocabulary.encode(vocabulary.decode(known)).tolist() == known
    assert vocabulary.decode(torch.tensor(known, dtype=torch.int64)) == vocabulary.decode(known)


def test_encoding_has_integers_of_64_bits_even_without_tokens():
    vocabulary = Vocabulary.from_text("ab", "character")
    assert vocabulary.encode("").shape == (0,)
    assert vocabulary.encode("").dtype == vocabulary.encode("ab").dtype == torch.int64


def test_encoding_takes_not_much_longer_than_looking_each_character_up():
    text = "".join(chr(0x4E00 + index * 7919 % 5_000) for index in range(20_000))  # each of 5,000 characters four times
    vocabulary = Vocabulary.from_text(text, "character")
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}

    def seconds(encode: Callable[[], object]) -> float:
        """The least processor time of a few tries: both times are of this machine, at this moment."""
        times = []
        for _ in range(5):
            start = time.process_time()
            encode()
            times.append(time.process_time() - start)
        return min(times)

    # A scan of the tokens for each character would take a thousand times as long.
    assert seconds(lambda: vocabulary.encode(text)) < 30 * seconds(lambda: [ids.get(token, 0) for token in text])


def test_vocabulary_cannot_be_changed():
    vocabulary = Vocabulary.from_text("ab", "character")
    with pytest.raises(FrozenInstanceError):
        vocabulary.tokens = ()  # pyright: ignore[reportAttributeAccessIssue]


def test_vocabularies_are_equal_when_level_and_tokens_are():
    one, other = Vocabulary.from_text("a b\n", "word"), Vocabulary.from_text("b a\n", "word")
    assert one == other
    assert hash(one) == hash(other)
    assert one != Vocabulary.from_text("a c\n", "word")
    assert len(one) == 4
    assert repr(one) == "Vocabulary(level='word', 4 tokens)"


@pytest.mark.parametrize("level", ["character", "word"])
def test_saved_vocabulary_is_loaded_unchanged_and_alone_in_its_folder(tmp_path: Path, level):
    vocabulary = Vocabulary.from_text('é "quoted" \\ \u2028 \U0001f600\n', level)
    vocabulary.save(tmp_path / "vocabulary.json")
    vocabulary.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary
    assert [path.name for path in tmp_path.iterdir()] == ["vocabulary.json"]


def test_failed_save_leaves_the_earlier_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "vocabulary.json"
    Vocabulary.from_text("ab", "character").save(path)
    earlier = path.read_bytes()

    def write_half(self: Path, data: str, encoding: str) -> int:
        self.write_bytes(data[: len(data) // 2].encode(encoding))
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="disk is full"):
        Vocabulary.from_text("abcdef", "character").save(path)
    assert path.read_bytes() == earlier
    assert list(tmp_path.iterdir()) == [path]


def saved(**changes: object) -> str:
    content = {"format": "deepeq.vocabulary.v1", "level": "character", "tokens": ["<unk>", "a", "b"]}
    return json.dumps(content | changes)


def test_handwritten_file_of_the_format_is_loaded(tmp_path: Path):
    path = tmp_path / "vocabulary.json"
    path.write_text(saved())
    assert Vocabulary.load(path).encode("ba").tolist() == [2, 1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not readable as JSON"),
        (saved().encode()[:-4], "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        (b"[" * 1_000_000, "not readable as JSON"),
        (b"[]", "not a vocabulary"),
        (b'{"model": "bert"}', "not a vocabulary"),
        (saved(format="deepeq.vocabulary.v2").encode(), "not a vocabulary"),
        (saved(tokens=["<unk>", 1]).encode(), "not a list of strings"),
        (saved(tokens="<unk>").encode(), "not a list of strings"),
        (saved(level=["word"]).encode(), "level must be"),
        (saved(level="byte").encode(), "level must be"),
        (saved(level="word").encode(), "must begin with"),
        (saved(tokens=["a", "<unk>"]).encode(), "must begin with"),
        (saved(tokens=["<unk>", "a", "a"]).encode(), "'a' more than once"),
        (saved(tokens=["<unk>", "ab"]).encode(), "must be one character"),
    ],
)
def test_broken_or_foreign_file_is_named_in_one_sentence(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "vocabulary.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        Vocabulary.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith("give a file that Vocabulary.save wrote.")
    assert "\n" not in message


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json is not a file"):
        Vocabulary.load(tmp_path / "absent.json")


def test_missing_folder_to_save_in_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"create the folder .*absent first"):
        Vocabulary.from_text("ab", "character").save(tmp_path / "absent" / "vocabulary.json")


def test_unknown_level_is_refused():
    with pytest.raises(ValueError, match="level must be 'character' or 'word', got 'byte'"):
        Vocabulary.from_text("ab", "byte")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("word", ["", "two words", "line\n"])
def test_words_with_whitespace_are_refused(word: str):
    with pytest.raises(ValueError, match="must be one word"):
        Vocabulary(level="word", tokens=("<eos>", "<unk>", word))


@pytest.mark.parametrize("index", [-1, 3])
def test_ids_outside_the_vocabulary_are_not_decoded(index: int):
    vocabulary = Vocabulary.from_text("ab", "character")
    with pytest.raises(ValueError, match=rf"ids must lie in 0 \.\. 2, got {index}"):
        vocabulary.decode([0, index])


def test_ids_of_a_batch_are_not_decoded():
    with pytest.raises(ValueError, match=r"one-dimensional, got the shape \(1, 2\)"):
        Vocabulary.from_text("ab", "character").decode(torch.tensor([[1, 2]]))
