"""What the cells of sequence models have in common."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deepeq.cell import Cell


@dataclass(frozen=True, kw_only=True)
class LayerConfig(ABC):
    """Hyper-parameters of the layer that a sequence model repeats, or solves for."""

    @property
    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """Number of input channels and of output channels."""


@dataclass(frozen=True, kw_only=True)
class CellConfig(LayerConfig):
    """Hyper-parameters of a `SequenceCell`."""

    @abstractmethod
    def build(self) -> "SequenceCell":
        """Return a cell of these sizes with random weights."""


class SequenceCell(Cell):
    """A causal cell for sequences: inputs are `(B, T, d_input)`, states are tensors `(B, T, ...)` or tuples of them.

    Its memory is what the positions of a segment read from earlier segments: None, or a tuple whose tensors are all
    `(B, ...)`. A named tuple must be listed in `deepeq.models.MEMORY_TYPES`; otherwise a checkpoint cannot be read.
    """

    def memory_length(self) -> int | None:
        """Return how many positions a memory keeps in the present mode; None where the user cannot choose that."""
        return None

    def start_memory(self, batch_size: int, *, length: int | None = None) -> Any:
        """Return an empty memory that makes it cheap to add one position at a time.

        The default is None: the memory of `extend_memory` is cheap enough already.

        Args:
            batch_size: Number of sequences.
            length: Number of positions to keep; None for `memory_length()`.
        """
        return None

    def guess(self, x: Tensor, memory: Any) -> Any:
        """Return a state near the equilibrium for inputs `(B, T, d_input)`; None where the memory suggests none."""
        return None


def check_ranges(
    owner: object, at_least: dict[str, int], fractions: tuple[str, ...] = (), *, positive: tuple[str, ...] = ()
) -> list[str]:
    """Return a sentence for each field that is out of range.

    Args:
        owner: The configuration.
        at_least: Fields that are whole numbers (or None), with their least values.
        fractions: Fields in [0, 1).
        positive: Fields that are positive and finite.
    """
    problems = []
    for name, least in at_least.items():
        value = getattr(owner, name)
        if value is not None and (not isinstance(value, int) or value < least):
            problems.append(f"{name}={value!r} must be a whole number >= {least}")
    for name in fractions:
        if not 0.0 <= getattr(owner, name) < 1.0:
            problems.append(f"{name}={getattr(owner, name)!r} must lie in [0, 1)")
    for name in positive:
        if not 0.0 < getattr(owner, name) < math.inf:
            problems.append(f"{name}={getattr(owner, name)!r} must be > 0 and finite")
    return problems
