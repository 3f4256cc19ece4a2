"""What training and evaluation read: pairs of inputs and targets, numbered within one pass over the data.

Shapes: B batch_size, T positions of a row, N sequences.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class Batches(Protocol):
    """One pass over a split as `num_segments` pairs of inputs and targets, each (B, T) int64."""

    @property
    def continuous(self) -> bool:
        """Whether row b of segment i + 1 goes on where row b of segment i ends, so that memory may be carried."""
        ...

    @property
    def num_segments(self) -> int:
        """The number of segments in one pass."""
        ...

    @property
    def num_tokens(self) -> int:
        """The number of targets in one pass."""
        ...

    def segment(self, index: int, *, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a segment; `epoch` selects the order where the order is drawn."""
        ...

    def shard(self, index: int, count: int) -> "Batches":
        """Return what part `index` of `count` equal ones of every segment's rows holds."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one pass in the order of the data, nothing left out."""
        ...


def check_positive(**numbers: int) -> None:
    """Raise a ValueError that names the first number which is no positive integer."""
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")


def check_index(index: int, num_segments: int) -> None:
    """Raise an IndexError if the index lies outside 0 .. num_segments - 1."""
    if not 0 <= index < num_segments:
        raise IndexError(f"index must lie in 0 .. {num_segments - 1} (num_segments - 1), got {index}.")


def check_shard(index: int, count: int, *, batch_size: int) -> int:
    """Return the rows of each of `count` equal parts of a batch.

    Raises:
        ValueError: the rows cannot be dealt out evenly.
        IndexError: there is no part of this index.
    """
    check_positive(count=count)
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size} must be a multiple of {count}, the number of parts.")
    if not 0 <= index < count:
        raise IndexError(f"index must lie in 0 .. {count - 1} (count - 1), got {index}.")
    return batch_size // count


@dataclass(frozen=True, eq=False)
class SequenceBatches:
    """Batches of sequences that have nothing to do with each other, drawn anew in every epoch or in order.

    One pass holds every sequence once; the last batch may be smaller.

    Raises:
        ValueError: inputs and targets are not of one shape (N, T) with N, T > 0 and of an integer type, or
            batch_size is not a positive integer.
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
        """Check the fields."""
        if self.inputs.ndim != 2 or self.inputs.shape != self.targets.shape or not self.inputs.numel():
            shapes = f"{tuple(self.inputs.shape)} and {tuple(self.targets.shape)}"
            raise ValueError(f"inputs and targets must have one shape (N, T) and not be empty, got {shapes}.")
        for name, ids in (("inputs", self.inputs), ("targets", self.targets)):
            if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
                raise ValueError(f"{name} must hold integers, got {ids.dtype}.")
        check_positive(batch_size=self.batch_size)
        index, count = self.part
        check_shard(index, count, batch_size=self.batch_size)
        left = len(self.inputs) % self.batch_size
        if left % count:
            raise ValueError(
                f"the last of the {len(self.inputs)} sequences make a batch of {left}, which must be a multiple of "
                f"{count}, the number of parts; take another batch_size than {self.batch_size}."
            )

    @property
    def continuous(self) -> bool:
        """False: sequences are independent."""
        return False

    @property
    def num_tokens(self) -> int:
        """The number of targets in one pass, N T, or of a part's share of them."""
        return self.targets.numel() // self.part[1]

    @property
    def num_segments(self) -> int:
        """The number of batches in one pass, ceil(N / B)."""
        return -(-len(self.inputs) // self.batch_size)

    def segment(self, index: int, *, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a batch of an epoch, each (B, T) int64 copies.

        Raises:
            IndexError: the index lies outside 0 .. num_segments-1.
        """
        check_index(index, self.num_segments)
        if self.seed is None:
            return self._rows(torch.arange(len(self.inputs)), index)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return self._rows(torch.randperm(len(self.inputs), generator=generator), index)

    def shard(self, index: int, count: int) -> Self:
        """Return what part `index` of `count` equal ones of every batch holds.

        Raises:
            ValueError: the rows of a batch cannot be dealt out evenly, or are dealt out already.
        """
        if self.part != (0, 1):
            raise ValueError(f"part={self.part} is dealt out already; call shard on the whole.")
        return replace(self, part=(index, count))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one pass in the order of the data."""
        order = torch.arange(len(self.inputs))
        return (self._rows(order, index) for index in range(self.num_segments))

    def _rows(self, order: Tensor, index: int) -> tuple[Tensor, Tensor]:
        part, count = self.part
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size].chunk(count)[part]
        return self.inputs[chosen].long(), self.targets[chosen].long()
