"""What the cells of sequence models have in common."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LayerConfig(ABC):
    """Hyper-parameters of the layer that a sequence model repeats, or solves for."""

    @property
    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """Channels that it takes and channels that it gives."""


@dataclass(frozen=True, kw_only=True)
class CellConfig(LayerConfig):
    """Hyper-parameters of a `SequenceCell`."""

    @abstractmethod
    def build(self) -> "SequenceCell":
        """A cell of these sizes with random weights."""


class SequenceCell(nn.Module, ABC):
    """A causal map of a sequence of states, `z <- cell(z, cell.inject(x, memory))`.

    States are tensors `(B, T, ...)` or tuples of them. `inject` prepares everything that does not depend on `z`,
    including one draw of every dropout mask, so that the map stays the same during a solve.
    """

    def memory_length(self) -> int | None:
        """Positions that a memory is to keep in the present mode; None where that is not for the user to choose."""
        return None

    def start_memory(self, batch_size: int, *, length: int | None = None) -> Any:
        """An empty memory that makes one position at a time cheap; None where that of `extend_memory` does already.

        Args:
            batch_size: Number of samples.
            length: Positions to keep; None for `memory_length()`.
        """
        return None

    def guess(self, x: Tensor, memory: Any) -> Any:
        """A state near the equilibrium for inputs `(B, T, d_input)`; None where the memory suggests none."""
        return None

    @abstractmethod
    def initial_state(self, x: Tensor) -> Any:
        """The state that a solve starts from, for inputs `(B, T, d_input)`."""

    @abstractmethod
    def inject(self, x: Tensor, memory: Any = None) -> Any:
        """What the map needs besides `z`, for inputs `(B, T, d_input)`."""

    @abstractmethod
    def output(self, z: Any) -> Tensor:
        """The features `(B, T, d_output)` of a state that the next part of a model reads."""

    @abstractmethod
    def extend_memory(self, memory: Any, x: Tensor, z: Any, *, length: int | None = None) -> Any:
        """The memory for the segment after this one; gradients pass.

        Args:
            memory: That of this segment, or None.
            x: Inputs of this segment, `(B, T, d_input)`.
            z: Their equilibrium.
            length: Positions to keep, for cells whose memory has no length of its own; None keeps all.
        """


def check_ranges(
    owner: object, at_least: dict[str, int], shares: tuple[str, ...] = (), *, positive: tuple[str, ...] = ()
) -> list[str]:
    """A sentence for each field out of range: whole numbers from a least one on, shares in [0, 1), positive numbers."""
    problems = []
    for name, least in at_least.items():
        value = getattr(owner, name)
        if value is not None and (not isinstance(value, int) or value < least):
            problems.append(f"{name}={value!r} must be a whole number >= {least}")
    for name in shares:
        if not 0.0 <= getattr(owner, name) < 1.0:
            problems.append(f"{name}={getattr(owner, name)!r} must lie in [0, 1)")
    for name in positive:
        if not 0.0 < getattr(owner, name) < math.inf:
            problems.append(f"{name}={getattr(owner, name)!r} must be > 0 and finite")
    return problems
