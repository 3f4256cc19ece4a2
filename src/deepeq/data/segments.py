"""A long text as a batch of parallel streams, read segment by segment.

Shapes: N tokens of the text, B batch_size (streams), L = N // B tokens a stream, T tokens a segment.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from deepeq.data.batches import check_index, check_positive, check_shard


@dataclass(frozen=True, eq=False)
class SegmentStream:
    """Pairs of inputs and targets that walk through a text in B rows side by side.

    The text is cut into B streams of L consecutive tokens, one a row; the last N - B L tokens are dropped.
    Row b of segment i + 1 begins where row b of segment i ends, so that the memory of segment i is what comes
    before segment i + 1. In one pass every token of the streams is a target exactly once, but for each
    stream's first token, which nothing precedes. The text is never copied as a whole, so it may be a memory
    map.

    Raises:
        ValueError: ids is not (N,) int32 or int64, a number is not a positive integer, or a stream would have
            fewer than two tokens.
    """

    ids: Tensor = field(repr=False)
    """The tokens of the text, (N,) int32 or int64."""
    _: KW_ONLY
    batch_size: int
    """B, the number of streams."""
    segment_len: int
    """T, the targets a row of a segment has, in tokens; the last segment may be shorter."""
    _streams: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the fields and cut the streams."""
        if self.ids.ndim != 1 or self.ids.dtype not in (torch.int32, torch.int64):
            shape = tuple(self.ids.shape)
            raise ValueError(f"ids must be one-dimensional int32 or int64, got the shape {shape} of {self.ids.dtype}.")
        check_positive(batch_size=self.batch_size, segment_len=self.segment_len)
        num_ids, stream_len = self.ids.numel(), self.ids.numel() // self.batch_size
        if stream_len < 2:
            raise ValueError(
                f"a text of {num_ids} tokens is too short for batch_size={self.batch_size}, which needs "
                f"{2 * self.batch_size} tokens at least; give more text or a smaller batch_size."
            )
        kept = self.ids[: self.batch_size * stream_len]
        object.__setattr__(self, "_streams", kept.view(self.batch_size, stream_len))  # (B, L)

    @property
    def continuous(self) -> bool:
        """True: every segment goes on where the one before ends."""
        return True

    @property
    def num_tokens(self) -> int:
        """The number of targets in one pass, B (L - 1)."""
        return self.batch_size * (self._streams.shape[1] - 1)

    @property
    def num_segments(self) -> int:
        """The number of segments in one pass, ceil((L - 1) / T)."""
        return -(-(self._streams.shape[1] - 1) // self.segment_len)

    def segment(self, index: int, *, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a segment, each (B, T) int64; targets[:, t] follows inputs[:, t].

        Both are copies: changing them leaves the text as it is. A text has one order, so that every `epoch`
        is the same.

        Raises:
            IndexError: the index lies outside 0 .. num_segments-1.
        """
        del epoch
        check_index(index, self.num_segments)
        start = index * self.segment_len
        end = min(start + self.segment_len, self._streams.shape[1] - 1)
        return _copy(self._streams[:, start:end]), _copy(self._streams[:, start + 1 : end + 1])  # (B, T) each

    def shard(self, index: int, count: int) -> Self:
        """Return the rows of the part `index` of `count` equal ones, as a stream of its own.

        Raises:
            ValueError: the rows cannot be dealt out evenly.
        """
        num_rows = check_shard(index, count, batch_size=self.batch_size)
        rows = self._streams[index * num_rows : (index + 1) * num_rows]
        return replace(self, ids=rows.flatten(), batch_size=num_rows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the segments of one pass in order."""
        return map(self.segment, range(self.num_segments))


def _copy(ids: Tensor) -> Tensor:
    return ids.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
