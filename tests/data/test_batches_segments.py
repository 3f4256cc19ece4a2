"""Segments: every target once, rows that continue, known small cases, and the sentences of the errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepeq.data import Batches, SegmentStream


def test_ten_tokens_in_two_rows_of_segments_of_three():
    stream = SegmentStream(torch.arange(11), batch_size=2, segment_len=3)
    segments = [(inputs.tolist(), targets.tolist()) for inputs, targets in stream]
    assert segments == [
        ([[0, 1, 2], [5, 6, 7]], [[1, 2, 3], [6, 7, 8]]),
        ([[3], [8]], [[4], [9]]),
    ]
    assert (stream.num_segments, stream.num_tokens) == (2, 8)


@st.composite
def streams(draw: st.DrawFn) -> SegmentStream:
    batch_size = draw(st.integers(1, 7))
    num_ids = draw(st.integers(2 * batch_size, 120))
    # All ids differ, so that an id tells its place in the text.
    return SegmentStream(torch.arange(num_ids), batch_size=batch_size, segment_len=draw(st.integers(1, 40)))


@settings(deadline=None, derandomize=True, database=None)
@given(stream=streams())
def test_every_target_is_predicted_once_after_its_own_predecessor_and_rows_continue(stream: SegmentStream):
    segments = list(stream)
    stream_len = len(stream.ids) // stream.batch_size
    inputs, targets = (torch.cat(parts, dim=1) for parts in zip(*segments, strict=True))
    kept = torch.arange(stream.batch_size * stream_len).reshape(stream.batch_size, stream_len)
    assert torch.equal(inputs, kept[:, :-1])
    assert torch.equal(targets, kept[:, 1:])
    assert len(segments) == stream.num_segments
    assert targets.numel() == stream.num_tokens
    assert all(part.shape[1] == stream.segment_len for part, _ in segments[:-1])
    assert 1 <= segments[-1][0].shape[1] <= stream.segment_len


def test_fewer_tokens_than_batch_size_are_dropped():
    for num_ids in range(6, 60):
        stream = SegmentStream(torch.arange(num_ids), batch_size=3, segment_len=4)
        read = {int(index) for pair in stream for part in pair for index in part.flatten()}
        assert read == set(range(num_ids - num_ids % 3))


def test_segments_are_the_same_in_any_order_and_in_every_pass():
    stream = SegmentStream(torch.arange(50), batch_size=2, segment_len=7)
    passes = [
        list(stream),
        list(stream),
        [stream.segment(i) for i in reversed(range(stream.num_segments))][::-1],
    ]
    for one, other, third in zip(*passes, strict=True):
        for part in (0, 1):
            assert torch.equal(one[part], other[part])
            assert torch.equal(one[part], third[part])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_segments_are_contiguous_copies_of_64_bits(batch_size: int, dtype: torch.dtype):
    ids = torch.arange(30, dtype=dtype)
    stream = SegmentStream(ids, batch_size=batch_size, segment_len=5)
    for part in stream.segment(0):
        assert part.is_contiguous()
        assert part.dtype == torch.int64
        part.fill_(-1)
    assert torch.equal(ids, torch.arange(30, dtype=dtype))


def test_stream_shares_the_memory_of_the_text():
    ids = torch.arange(30, dtype=torch.int32)
    stream = SegmentStream(ids, batch_size=3, segment_len=5)
    ids[0] = 77
    assert stream.segment(0)[0][0, 0] == 77


def test_a_text_is_continuous_and_has_one_order():
    stream: Batches = SegmentStream(torch.arange(30), batch_size=3, segment_len=5)
    assert stream.continuous
    for one, other in zip(stream.segment(1), stream.segment(1, epoch=7), strict=True):
        assert torch.equal(one, other)


def test_every_second_token_can_be_streamed():
    stream = SegmentStream(torch.arange(20)[::2], batch_size=2, segment_len=9)
    assert stream.segment(0)[0].tolist() == [[0, 2, 4, 6], [10, 12, 14, 16]]


@pytest.mark.parametrize("num_ids", [0, 1, 7])
def test_too_little_text_names_both_numbers(num_ids: int):
    with pytest.raises(ValueError, match=rf"text of {num_ids} tokens is too short for batch_size=4, .* 8 tokens"):
        SegmentStream(torch.arange(num_ids), batch_size=4, segment_len=2)
    assert SegmentStream(torch.arange(8), batch_size=4, segment_len=2).num_tokens == 4


@pytest.mark.parametrize("field", ["batch_size", "segment_len"])
@pytest.mark.parametrize("value", [0, -1, 2.0])
def test_counts_must_be_positive_integers(field: str, value: float):
    with pytest.raises(ValueError, match=f"{field}={value} must be a whole number >= 1"):
        SegmentStream(torch.arange(20), **({"batch_size": 2, "segment_len": 2} | {field: value}))  # pyright: ignore


@pytest.mark.parametrize("ids", [torch.zeros(4, 5, dtype=torch.int64), torch.zeros(20), torch.tensor(1)])
def test_ids_must_be_a_vector_of_integers(ids: torch.Tensor):
    with pytest.raises(ValueError, match="ids must be one-dimensional int32 or int64, got the shape"):
        SegmentStream(ids, batch_size=2, segment_len=2)


@pytest.mark.parametrize("index", [-1, 2])
def test_segment_outside_the_pass_is_refused(index: int):
    stream = SegmentStream(torch.arange(10), batch_size=2, segment_len=2)
    with pytest.raises(IndexError, match=rf"index must lie in 0 \.\. 1 \(num_segments - 1\), got {index}"):
        stream.segment(index)


def test_sizes_are_keyword_only():
    with pytest.raises(TypeError):
        SegmentStream(torch.arange(10), 2, 2)  # pyright: ignore[reportCallIssue]


def test_parts_of_a_stream_are_its_rows():
    stream = SegmentStream(torch.arange(101), batch_size=6, segment_len=4)
    parts = [stream.shard(index, 3) for index in range(3)]
    assert sum(part.num_tokens for part in parts) == stream.num_tokens
    for index, (inputs, targets) in enumerate(stream):
        pairs = [part.segment(index) for part in parts]
        assert torch.equal(torch.cat([pair[0] for pair in pairs]), inputs)
        assert torch.equal(torch.cat([pair[1] for pair in pairs]), targets)


def test_rows_that_cannot_be_dealt_out_evenly_are_refused():
    stream = SegmentStream(torch.arange(101), batch_size=6, segment_len=4)
    with pytest.raises(ValueError, match="batch_size=6 must be a multiple of 4"):
        stream.shard(0, 4)
    with pytest.raises(IndexError, match="index must lie in 0 .. 1"):
        stream.shard(2, 2)
