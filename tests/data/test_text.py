"""Streams of text: the same text whatever the blocks, and the sentences of the errors."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepeq.data import SPLITS, DataConfig
from deepeq.data import text as text_module
from deepeq.data.text import FileSource, find_text, whole_tokens
from deepeq.data.tokenizer import Unit, split_tokens

REPEATABLE = settings(deadline=None, derandomize=True, database=None)


@pytest.fixture(params=[1, 2, 3, 5, 64])
def block_chars(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(text_module, "BLOCK_CHARS", request.param)
    return request.param


@pytest.mark.usefixtures("block_chars")
@pytest.mark.parametrize("content", ["caf\u00e9 \u20ac \U0001f600\n", "a\r\nb\rc\n\r\n", "x\r", "\ufeffa\ufeff"])
def test_blocks_of_any_size_make_what_python_reads_at_once(tmp_path: Path, content: str):
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    with path.open(encoding="utf-8-sig") as file:
        assert "".join(FileSource(path).blocks()) == file.read()


@pytest.mark.parametrize(
    ("content", "byte"),
    [
        (b"abcdefgh\xe9 i", "byte 8 is 0xe9"),
        (b"abc\xe2\x82x", "byte 3 is 0xe2"),
        (b"\xef\xbb\xbfab\xff", "byte 5 is 0xff"),
        (b"abcde\xe2\x82", "byte 5 is 0xe2"),
        (b"a" * 100_000 + b"\xe2\x82" + b"a" * 100_000, "byte 100000 is 0xe2"),
        (b"\xef\xbb\xbf" + b"a" * 8188 + b"\xe2\x82b", "byte 8191 is 0xe2"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_first_wrong_byte_is_counted_from_the_start_of_the_file(tmp_path: Path, name: str, content: bytes, byte: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text \({byte}\); convert it to UTF-8$"):
        list(FileSource(path).blocks())


@REPEATABLE
@given(
    blocks=st.lists(st.text(st.sampled_from("ab \n\t\u3000"), max_size=6), max_size=8),
    unit=st.sampled_from(["character", "word"]),
)
def test_no_word_is_cut_by_the_end_of_a_block(blocks: list[str], unit: Unit):
    regrouped = list(whole_tokens(blocks, unit))
    assert "".join(regrouped) == "".join(blocks)
    tokens = [token for block in regrouped for token in split_tokens(block, unit)]
    assert tokens == list(split_tokens("".join(blocks), unit))


def split_at_once(text: str, unit: Unit) -> list[str]:
    """The 80/10/10 split of a text in memory, with the line starts listed."""
    ideal = cuts = [len(text) * 8 // 10, len(text) * 9 // 10]
    for end in ("\n", " ") if unit == "word" else ():
        starts = [0, *(index + 1 for index, char in enumerate(text) if char == end), len(text)]
        # Of two starts at the same distance the earlier one; a start at the cut itself is "before" it.
        cuts = [min((start for start in starts), key=lambda start, cut=cut: (abs(start - cut), start)) for cut in ideal]
        if 0 < cuts[0] < cuts[1] < len(text):
            break
    return [text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]]


@REPEATABLE
@given(
    parts=st.lists(st.text(st.sampled_from("ab \n"), max_size=30).map(lambda part: f"a{part}"), min_size=1, max_size=4),
    unit=st.sampled_from(["character", "word"]),
)
def test_streamed_split_is_that_of_the_joined_text(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], unit: Unit
):
    folder = tmp_path_factory.mktemp("parts")
    for index, part in enumerate(parts):
        (folder / f"{index}.txt").write_text(part, newline="")
    text = find_text(DataConfig(files=tuple(str(folder / f"{index}.txt") for index in range(len(parts))), unit=unit))
    streamed = ["".join(text.blocks(split)) for split in ("train", "valid", "test")]
    assert streamed == split_at_once("\n".join(parts), unit)


def test_stream_can_be_read_again(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("some words\n" * 20)
    text = find_text(DataConfig(files=(str(path),), unit="word"))
    assert [list(text.blocks("train")) for _ in range(2)] == [["some words\n" * 16]] * 2


@pytest.mark.usefixtures("block_chars")
def test_lines_of_json_give_one_document_each(tmp_path: Path):
    documents = ["one\ntwo", "caf\u00e9 \u20ac", "", "three\r\nfour\n", "\u2028"]
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"id": 7, "text": text}, ensure_ascii=index % 2 == 0) for index, text in enumerate(documents)]
    path.write_text("\n".join([rows[0], "", *rows[1:]]) + "\n", encoding="utf-8")
    expected = "one\ntwo\ncaf\u00e9 \u20ac\n\nthree\nfour\n\u2028\n"
    assert "".join(FileSource(path).blocks()) == expected
    text = find_text(DataConfig(files=str(path)))
    assert "".join("".join(text.blocks(split)) for split in ("train", "valid", "test")) == expected


def test_documents_may_be_in_another_field(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "body": "b"}\n' * 10)
    text = find_text(DataConfig(files=str(path), text_field="body"))
    assert "".join(text.blocks("train")) == "b\n" * 8


def test_folder_may_hold_lines_of_json(tmp_path: Path):
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split}))
    text = find_text(DataConfig(corpus="folder", folder=str(tmp_path)))
    assert ["".join(text.blocks(split)) for split in SPLITS] == ["train\n", "valid\n", "test\n"]


@pytest.mark.parametrize(
    "line", ["text", '{"body": "a"}', '{"text": 3}', '["text"]', '{"text": "a"', r'{"text": "\ud800"}', "[" * 100_000]
)
def test_line_that_is_no_document_is_named(tmp_path: Path, line: str):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"^line 3 of .*a\.jsonl is not a JSON object with a text in the field 'text'"):
        list(FileSource(path).blocks())


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_text_in_another_encoding_without_a_mark_is_refused(tmp_path: Path, encoding: str) -> None:
    """Its bytes are valid UTF-8, in which half of the characters and more are NUL."""
    path = tmp_path / "text.txt"
    path.write_bytes(("the quick brown fox\n" * 300).encode(encoding))
    with pytest.raises(ValueError, match="holds NUL characters; if it is UTF-16 or UTF-32"):
        list(FileSource(path).blocks())


@pytest.mark.parametrize("unit", ["word", "bpe"])
def test_a_text_in_one_line_is_split_between_words(tmp_path: Path, unit: Unit) -> None:
    path, words = tmp_path / "text8.txt", [f"w{i}" for i in range(3000)]
    path.write_text(" ".join(words))
    text = find_text(DataConfig(files=(str(path),), unit=unit, vocab_size=300 if unit == "bpe" else None))
    splits = ["".join(text.blocks(split)) for split in SPLITS]
    assert "".join(splits).split() == words
    sizes = [len(split.split()) for split in splits]
    assert sum(sizes) == len(words)
    assert sizes[0] > 2000
    assert min(sizes) > 200
