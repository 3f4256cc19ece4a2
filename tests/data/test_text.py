"""Streams of text: the same text whatever the blocks, and the sentences of the errors."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepeq.data import text as text_module
from deepeq.data.text import FileSource, StringSource, Text, whole_tokens
from deepeq.data.vocabulary import Level, split_tokens

REPEATABLE = settings(deadline=None, derandomize=True, database=None)


@pytest.fixture(params=[1, 2, 3, 5, 64])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(text_module, "BLOCK_BYTES", request.param)
    return request.param


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("content", ["caf\u00e9 \u20ac \U0001f600\n", "a\r\nb\rc\n\r\n", "x\r", "\ufeffa\ufeff"])
def test_blocks_of_any_size_make_what_python_reads_at_once(tmp_path: Path, content: str):
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    with path.open(encoding="utf-8-sig") as file:
        assert "".join(FileSource(path).blocks()) == file.read()


@pytest.mark.parametrize("size", [4, 5, 64])
@pytest.mark.parametrize(
    ("content", "byte"),
    [
        (b"abcdefgh\xe9 i", "byte 8 is 0xe9"),
        (b"abc\xe2\x82x", "byte 3 is 0xe2"),
        (b"\xef\xbb\xbfab\xff", "byte 5 is 0xff"),
        (b"abcde\xe2\x82", "byte 5 is 0xe2"),
    ],
)
def test_first_wrong_byte_is_counted_from_the_start_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, content: bytes, byte: str
):
    monkeypatch.setattr(text_module, "BLOCK_BYTES", size)
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt is not UTF-8 text \({byte}\); convert it to UTF-8\.$"):
        list(FileSource(path).blocks())


@REPEATABLE
@given(
    blocks=st.lists(st.text(st.sampled_from("ab \n\t\u3000"), max_size=6), max_size=8),
    level=st.sampled_from(["character", "word"]),
)
def test_no_word_is_cut_by_the_end_of_a_block(blocks: list[str], level: Level):
    regrouped = list(whole_tokens(blocks, level))
    assert "".join(regrouped) == "".join(blocks)
    tokens = [token for block in regrouped for token in split_tokens(block, level)]
    assert tokens == list(split_tokens("".join(blocks), level))


def split_at_once(text: str, level: Level) -> list[str]:
    """The 80/10/10 split of a text in memory, with the line starts listed."""
    starts = [0, *(index + 1 for index, char in enumerate(text) if char == "\n"), len(text)]
    cuts = [len(text) * 8 // 10, len(text) * 9 // 10]
    if level == "word":
        # Of two line starts at the same distance the earlier one; a start at the cut itself is "before" it.
        cuts = [min((start for start in starts), key=lambda start, cut=cut: (abs(start - cut), start)) for cut in cuts]
    return [text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]]


@REPEATABLE
@given(
    parts=st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=30), min_size=1, max_size=4),
    level=st.sampled_from(["character", "word"]),
)
def test_streamed_split_is_that_of_the_joined_text(parts: list[str], level: Level):
    sources = tuple(StringSource(str(index), part) for index, part in enumerate(parts))
    text = Text.from_sources("name", level, sources)
    streamed = ["".join(text.splits[split]()) for split in ("train", "valid", "test")]
    assert streamed == split_at_once("\n".join(parts), level)


def test_stream_can_be_read_again(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("some words\n")
    text = Text.from_sources("name", "word", (FileSource(path),))
    assert [list(text.splits["train"]()) for _ in range(2)] == [["some words\n"]] * 2
