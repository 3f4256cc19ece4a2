"""Vocabularies: order of the tokens, encoding and decoding, files, and the sentences of their errors."""

import json
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepeq.data import Tokenizer
from deepeq.data.tokenizer import Unit

# The same cases in every run, whatever the machine's speed.
REPEATABLE = settings(deadline=None, derandomize=True, database=None)
# A literal <eos> is the end of a line and no word.
WORDS = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=5).filter(lambda w: w != "<eos>")
LINES = st.lists(st.lists(WORDS, max_size=6), max_size=6)


def test_characters_are_sorted_after_the_unknown_one():
    tokenizer = Tokenizer.from_text("banana\n", "character")
    assert tokenizer.tokens == ("<unk>", "\n", "a", "b", "n")
    assert tokenizer.encode("nab\n").tolist() == [4, 2, 3, 1]


def test_words_are_sorted_by_falling_frequency_then_alphabetically():
    tokenizer = Tokenizer.from_text("d b a\nb c d\nd e\n", "word")
    assert tokenizer.tokens == ("<eos>", "<unk>", "d", "b", "a", "c", "e")
    assert tokenizer.encode("a d\n\nb").tolist() == [4, 2, 0, 0, 3]


@pytest.mark.parametrize("unit", ["word", "character"])
def test_blocks_of_a_text_make_the_tokenizer_of_the_text(unit: Unit):
    assert Tokenizer.from_text(["d b a\nb", " c d\nd e\n"], unit) == Tokenizer.from_text("d b a\nb c d\nd e\n", unit)


def test_unknown_word_of_the_corpus_is_the_one_that_unseen_words_become():
    tokenizer = Tokenizer.from_text("a <unk> <unk>\n", "word")
    assert tokenizer.tokens == ("<eos>", "<unk>", "a")
    assert tokenizer.encode("zebra <unk> a").tolist() == [1, 1, 2]


def test_literal_end_of_line_among_the_words_ends_a_line():
    tokenizer = Tokenizer.from_text("a <eos> b\n", "word")
    assert tokenizer.tokens == ("<eos>", "<unk>", "a", "b")
    assert tokenizer.decode(tokenizer.encode("b <eos> a <eos>")) == "b\na\n"


def test_unseen_character_is_decoded_as_the_replacement_character():
    tokenizer = Tokenizer.from_text("abc", "character")
    assert tokenizer.encode("aéb").tolist() == [1, 0, 2]
    assert tokenizer.decode(tokenizer.encode("aéb")) == "a\ufffdb"


@REPEATABLE
@given(text=st.text())
def test_characters_survive_encoding_and_decoding(text: str):
    tokenizer = Tokenizer.from_text(text, "character")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text).shape == (len(text),)


@REPEATABLE
@given(lines=LINES)
def test_words_survive_encoding_and_decoding_with_single_blanks(lines: list[list[str]]):
    text = "\n".join(" ".join(line) for line in lines)
    tokenizer = Tokenizer.from_text(text, "word")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    spread = "\n".join("\t " + "  ".join(line) + " " for line in lines)
    assert torch.equal(tokenizer.encode(spread), tokenizer.encode(text))


@REPEATABLE
@given(ids=st.lists(st.integers(0, 4)), unit=st.sampled_from(["character", "word"]))
def test_known_ids_survive_decoding_and_encoding(ids: list[int], unit: str):
    tokenizer = (
        Tokenizer.from_text("abcd", "character") if unit == "character" else Tokenizer.from_text("a b c", "word")
    )
    known = [index for index in ids if tokenizer.tokens[index] != "<unk>"]
    assert tokenizer.encode(tokenizer.decode(known)).tolist() == known
    assert tokenizer.decode(torch.tensor(known, dtype=torch.int64)) == tokenizer.decode(known)


def test_encoding_has_integers_of_64_bits_even_without_tokens():
    tokenizer = Tokenizer.from_text("ab", "character")
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode("").dtype == tokenizer.encode("ab").dtype == torch.int64


def test_encoding_takes_not_much_longer_than_looking_each_character_up():
    text = "".join(chr(0x4E00 + index * 7919 % 5_000) for index in range(20_000))  # each of 5,000 characters four times
    tokenizer = Tokenizer.from_text(text, "character")
    ids = {token: index for index, token in enumerate(tokenizer.tokens)}

    def seconds(encode: Callable[[], object]) -> float:
        """The least processor time of a few tries: both times are of this machine, at this moment."""
        times = []
        for _ in range(5):
            start = time.process_time()
            encode()
            times.append(time.process_time() - start)
        return min(times)

    # A scan of the tokens for each character would take a thousand times as long.
    assert seconds(lambda: tokenizer.encode(text)) < 30 * seconds(lambda: [ids.get(token, 0) for token in text])


def test_vocabulary_cannot_be_changed():
    tokenizer = Tokenizer.from_text("ab", "character")
    with pytest.raises(FrozenInstanceError):
        tokenizer.tokens = ()  # pyright: ignore[reportAttributeAccessIssue]


def test_vocabularies_are_equal_when_unit_and_tokens_are():
    one, other = Tokenizer.from_text("a b\n", "word"), Tokenizer.from_text("b a\n", "word")
    assert one == other
    assert hash(one) == hash(other)
    assert one != Tokenizer.from_text("a c\n", "word")
    assert len(one) == 4
    assert repr(one) == "Tokenizer(unit='word', 4 tokens)"


@pytest.mark.parametrize("unit", ["character", "word"])
def test_saved_vocabulary_is_loaded_unchanged_and_alone_in_its_folder(tmp_path: Path, unit):
    tokenizer = Tokenizer.from_text('é "quoted" \\ \u2028 \U0001f600\n', unit)
    tokenizer.save(tmp_path / "tokenizer.json")
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json") == tokenizer
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_failed_save_leaves_the_earlier_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "tokenizer.json"
    Tokenizer.from_text("ab", "character").save(path)
    earlier = path.read_bytes()

    def write_half(self: Path, data: str, encoding: str, newline: str) -> int:
        self.write_bytes(data[: len(data) // 2].encode(encoding))
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="disk is full"):
        Tokenizer.from_text("abcdef", "character").save(path)
    assert path.read_bytes() == earlier
    assert list(tmp_path.iterdir()) == [path]


def saved(**changes: object) -> str:
    content = {"format": "deepeq.vocabulary.v1", "level": "character", "tokens": ["<unk>", "a", "b"]}
    return json.dumps(content | changes)


def test_vocabulary_of_version_0_1_is_loaded(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text(saved())
    assert Tokenizer.load(path).encode("ba").tolist() == [2, 1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is damaged"),
        (saved().encode()[:-4], "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[" * 1_000_000, "is damaged"),
        (b"[]", "not of the format"),
        (b'{"model": "bert"}', "is damaged"),
        (saved(format="deepeq.vocabulary.v2").encode(), "not of the format"),
        (saved(tokens=["<unk>", 1]).encode(), "not a list of strings"),
        (saved(tokens="<unk>").encode(), "not a list of strings"),
        (saved(level=["word"]).encode(), "must be one of"),
        (saved(level="byte").encode(), "must be one of"),
        (saved(level="word").encode(), "must begin with"),
        (saved(tokens=["a", "<unk>"]).encode(), "must begin with"),
        (saved(tokens=["<unk>", "a", "a"]).encode(), "'a' more than once"),
        (saved(tokens=["<unk>", "ab"]).encode(), "must be one character"),
    ],
)
def test_broken_or_foreign_file_is_named_in_one_sentence(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        Tokenizer.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith("give a file that Tokenizer.save wrote")
    assert "\n" not in message


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json is not a file"):
        Tokenizer.load(tmp_path / "absent.json")


def test_missing_folder_to_save_in_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"create the folder .*absent first"):
        Tokenizer.from_text("ab", "character").save(tmp_path / "absent" / "tokenizer.json")


def test_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="unit='byte' must be one of 'character', 'word', 'bpe'"):
        Tokenizer.from_text("ab", "byte")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("word", ["", "two words", "line\n"])
def test_words_with_whitespace_are_refused(word: str):
    with pytest.raises(ValueError, match="must be one word"):
        Tokenizer(unit="word", tokens=("<eos>", "<unk>", word))


@pytest.mark.parametrize(("unit", "byte_pairs"), [("word", "{}"), ("bpe", "")])
def test_byte_pairs_are_for_their_own_unit(unit: Unit, byte_pairs: str):
    with pytest.raises(ValueError, match="byte_pairs must be given for the unit 'bpe' and no other"):
        Tokenizer(unit=unit, tokens=("<eos>", "<unk>"), byte_pairs=byte_pairs)


@pytest.mark.parametrize("index", [-1, 3])
def test_ids_outside_the_vocabulary_are_not_decoded(index: int):
    tokenizer = Tokenizer.from_text("ab", "character")
    with pytest.raises(ValueError, match=rf"ids must lie in 0 \.\. 2, got {index}"):
        tokenizer.decode([0, index])


def test_ids_of_a_batch_are_not_decoded():
    with pytest.raises(ValueError, match=r"one-dimensional, got the shape \(1, 2\)"):
        Tokenizer.from_text("ab", "character").decode(torch.tensor([[1, 2]]))


TEXTS = st.text(max_size=60) | st.text(st.sampled_from("the cat\r\n\t \u2028\x85\U0001f600\u00e9\x00"), max_size=60)


TRAINING_BLOCKS = ["the cat sat on the mat\n" * 50, "\u20ac \u20ac\n" * 9]


@pytest.fixture(scope="module")
def byte_pairs() -> Tokenizer:
    return Tokenizer.from_text(TRAINING_BLOCKS, "bpe", vocab_size=300)


@settings(deadline=None, derandomize=True, database=None)
@given(text=TEXTS)
def test_byte_pairs_decode_exactly_what_was_encoded(byte_pairs: Tokenizer, text: str):
    ids = byte_pairs.encode(text)
    assert byte_pairs.decode(ids) == text
    assert ids.dtype == torch.int64
    assert "".join(byte_pairs.decode_stream("", ids.tolist())) == text


def test_byte_pairs_join_what_is_frequent(byte_pairs: Tokenizer):
    assert len(byte_pairs.encode(" the cat")) == 2
    assert len(byte_pairs.encode("zyx")) == 3
    assert 256 < len(byte_pairs) <= 300
    assert byte_pairs.unknown is None


def test_byte_pairs_depend_on_the_text_alone(byte_pairs: Tokenizer):
    assert Tokenizer.from_text("".join(TRAINING_BLOCKS), "bpe", vocab_size=300) == byte_pairs
    assert Tokenizer.from_text(TRAINING_BLOCKS[0], "bpe", vocab_size=300) != byte_pairs


def test_byte_pairs_are_written_in_the_format_of_their_library(byte_pairs: Tokenizer, tmp_path: Path):
    byte_pairs.save(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode("the cat \u20ac").ids == byte_pairs.encode("the cat \u20ac").tolist()


def test_saved_byte_pairs_are_loaded_unchanged(byte_pairs: Tokenizer, tmp_path: Path):
    byte_pairs.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded == byte_pairs
    assert loaded.encode("the cat \u20ac").tolist() == byte_pairs.encode("the cat \u20ac").tolist()


@pytest.mark.parametrize(
    "change", [{"vocab": {"a": 0}}, {"vocab": {"a": 7}, "merges": []}, {"merges": [["no", "such"]]}, {"merges": 3}]
)
def test_damaged_byte_pairs_are_named(byte_pairs: Tokenizer, tmp_path: Path, change: dict):
    path = tmp_path / "tokenizer.json"
    byte_pairs.save(path)
    content = json.loads(path.read_text())
    content["model"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged \(.*\); give a file that Tokenizer\.save wrote$"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("unit", "text", "added"),
    [("word", "a", " b\nc d"), ("word", "a\n", "b c\n"), ("character", "ab", "ba")],
)
def test_streamed_text_continues_the_text_before_it(unit: Unit, text: str, added: str):
    tokenizer = Tokenizer.from_text("a b c d\n", unit)
    assert "".join(tokenizer.decode_stream(text, tokenizer.encode(added).tolist())) == added
