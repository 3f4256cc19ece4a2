"""What training and evaluation read: pairs of inputs and targets, numbered within one pass over the data.

Letters: B batch_size, T positions of a row, N tokens or sequences, L = N // B tokens per stream.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from deepeq.checks import check_count

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class SegmentStream:
    """Pairs of inputs and targets that walk through a text in B rows side by side.

    The text is cut into B streams of L consecutive tokens, one per row; the last N - B L tokens are dropped. Row b of
    segment i + 1 begins where row b of segment i ends, so the memory of segment i is what comes before segment i + 1.
    In one pass every token of the streams is a target exactly once, except each stream's first token, which nothing
    precedes. The text is never copied as a whole, so it may be a memory map.

    Raises:
        ValueError: `ids` is not (N,) int32 or int64, a number is not a positive integer, or a stream would have fewer
            than two tokens.
    """

    ids: Tensor = field(repr=False)
    """The tokens of the text, (N,) int32 or int64."""
    _: KW_ONLY
    batch_size: int
    """B, the number of streams."""
    segment_len: int
    """T, the number of targets in a row of a segment; the last segment may be shorter."""
    _streams: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.dtype not in (torch.int32, torch.int64):
            shape = tuple(self.ids.shape)
            raise ValueError(f"ids must be one-dimensional int32 or int64, got the shape {shape} of {self.ids.dtype}")
        check_count("batch_size", self.batch_size, least=1)
        check_count("segment_len", self.segment_len, least=1)
        num_ids, stream_len = self.ids.numel(), self.ids.numel() // self.batch_size
        if stream_len < 2:
            raise ValueError(
                f"a text of {num_ids} tokens is too short for batch_size={self.batch_size}, which needs at least "
                f"{2 * self.batch_size} tokens; give more text or a smaller batch_size"
            )
        kept = self.ids[: self.batch_size * stream_len]
        object.__setattr__(self, "_streams", kept.view(self.batch_size, stream_len))  # (B, L)

    @property
    def continuous(self) -> bool:
        """Whether row b of segment i + 1 continues row b of segment i, so that memory may be carried: True."""
        return True

    @property
    def num_tokens(self) -> int:
        """Number of targets in one pass, B (L - 1)."""
        return self.batch_size * (self._streams.shape[1] - 1)

    @property
    def num_segments(self) -> int:
        """Number of segments in one pass, ceil((L - 1) / T)."""
        return -(-(self._streams.shape[1] - 1) // self.segment_len)

    def segment(self, index: int, *, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Return copies of inputs and targets of a segment, each (B, T) int64; targets[:, t] follows inputs[:, t].

        A text has one order, so every `epoch` is the same.

        Raises:
            IndexError: The index lies outside 0 .. num_segments - 1.
        """
        del epoch
        _check_index(index, self.num_segments)
        start = index * self.segment_len
        end = min(start + self.segment_len, self._streams.shape[1] - 1)
        inputs, targets = self._streams[:, start:end], self._streams[:, start + 1 : end + 1]  # (B, T) each
        copies = [part.to(torch.int64, copy=True, memory_format=torch.contiguous_format) for part in (inputs, targets)]
        return copies[0], copies[1]

    def shard(self, index: int, count: int) -> Self:
        """Return the rows of part `index` of `count` equal parts, as a stream.

        Raises:
            ValueError: The rows cannot be dealt out evenly.
        """
        num_rows = _check_shard(index, count, batch_size=self.batch_size)
        rows = self._streams[index * num_rows : (index + 1) * num_rows]
        return replace(self, ids=rows.flatten(), batch_size=num_rows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the segments of one pass in order."""
        return map(self.segment, range(self.num_segments))


@dataclass(frozen=True, eq=False)
class SequenceBatches:
    """Batches of independent sequences, shuffled again in every epoch or in order.

    One pass holds every sequence once; the last batch may be smaller.

    Raises:
        ValueError: Inputs and targets are not integers of one shape (N, T) with N, T > 0, or batch_size is not a
            positive integer.
    """

    inputs: Tensor = field(repr=False)
    """(N, T) integers."""
    targets: Tensor = field(repr=False)
    """(N, T) integers; targets[:, t] is to be predicted from inputs[:, : t + 1]."""
    _: KW_ONLY
    batch_size: int
    """B, the number of sequences in a batch."""
    seed: int | None = None
    """`segment` reads a permutation that seed + epoch determines; None for the order of the data."""
    part: tuple[int, int] = (0, 1)
    """Index and number of the equal parts that the rows of every batch are dealt out to."""

    def __post_init__(self) -> None:
        if self.inputs.ndim != 2 or self.inputs.shape != self.targets.shape or not self.inputs.numel():
            shapes = f"{tuple(self.inputs.shape)} and {tuple(self.targets.shape)}"
            raise ValueError(f"inputs and targets must have one shape (N, T) and not be empty, got {shapes}")
        for name, ids in (("inputs", self.inputs), ("targets", self.targets)):
            if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
                raise ValueError(f"{name} must hold integers, got {ids.dtype}")
        check_count("batch_size", self.batch_size, least=1)
        index, count = self.part
        _check_shard(index, count, batch_size=self.batch_size)
        left = len(self.inputs) % self.batch_size
        if left % count:
            raise ValueError(
                f"the last of the {len(self.inputs)} sequences make a batch of {left}, which must be a multiple of "
                f"{count}, the number of parts; take another batch_size than {self.batch_size}"
            )

    @property
    def continuous(self) -> bool:
        """Whether memory may be carried from one batch to the next: False, because sequences are independent."""
        return False

    @property
    def num_tokens(self) -> int:
        """Number of targets in one pass, N T divided by the number of parts."""
        return self.targets.numel() // self.part[1]

    @property
    def num_segments(self) -> int:
        """Number of batches in one pass, ceil(N / B)."""
        return -(-len(self.inputs) // self.batch_size)

    def segment(self, index: int, *, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Return copies of inputs and targets of a batch of an epoch, each (B, T) int64.

        Raises:
            IndexError: The index lies outside 0 .. num_segments - 1.
        """
        _check_index(index, self.num_segments)
        if self.seed is None:
            return self._rows(torch.arange(len(self.inputs)), index)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return self._rows(torch.randperm(len(self.inputs), generator=generator), index)

    def shard(self, index: int, count: int) -> Self:
        """Return part `index` of `count` equal parts of every batch.

        Raises:
            ValueError: The rows of a batch cannot be dealt out evenly, or are dealt out already.
        """
        if self.part != (0, 1):
            raise ValueError(f"part={self.part} is dealt out already; call shard on the whole")
        return replace(self, part=(index, count))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one pass in the order of the data."""
        order = torch.arange(len(self.inputs))
        return (self._rows(order, index) for index in range(self.num_segments))

    def _rows(self, order: Tensor, index: int) -> tuple[Tensor, Tensor]:
        part, count = self.part
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size].chunk(count)[part]
        return self.inputs[chosen].long(), self.targets[chosen].long()


Batches = SegmentStream | SequenceBatches
"""One pass over a split as `num_segments` pairs of inputs and targets, each (B, T) int64."""


def _check_index(index: int, num_segments: int) -> None:
    if not 0 <= index < num_segments:
        raise IndexError(f"index must lie in 0 .. {num_segments - 1} (num_segments - 1), got {index}")


def _check_shard(index: int, count: int, *, batch_size: int) -> int:
    """Return the number of rows in each of `count` equal parts of a batch."""
    check_count("count", count, least=1)
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size} must be a multiple of {count}, the number of parts")
    if not 0 <= index < count:
        raise IndexError(f"index must lie in 0 .. {count - 1} (count - 1), got {index}")
    return batch_size // count
