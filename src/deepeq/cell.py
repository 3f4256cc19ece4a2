"""The contract of a cell: the one layer whose equilibrium, or whose tied stack, is a network."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Cell(nn.Module, ABC):
    """One layer `f(z; x)`, called as `cell(z, injection)`.

    `forward` is the only method that a cell must have. The others have defaults, and a plain `nn.Module` that is called
    as `cell(z, x)` gets the same defaults without deriving from this class. The default first state is zeros shaped
    like the input, so a cell whose state has another shape needs `initial_state`. A solve calls `inject` once and
    `forward` many times, so `forward` must return the same result for the same arguments: random numbers, such as
    dropout masks, are drawn in `inject`.
    """

    @abstractmethod
    def forward(self, z: Any, injection: Any) -> Any:
        """Return the next state, with the structure and the shapes of `z`.

        Args:
            z: The state: a tensor, or a tuple, list or dict of tensors.
            injection: What `inject` returned for this solve.
        """

    def inject(self, x: Any, memory: Any = None) -> Any:
        """Return everything that `forward` needs besides `z`; default `x`, without a memory.

        A cell that implements `shared_weights` takes the weights as a third argument.

        Args:
            x: The input of the layer.
            memory: What earlier segments left, or None.

        Raises:
            ValueError: A memory is given to a cell that takes none.
        """
        if memory is not None:
            raise ValueError(f"memory was given, but {type(self).__name__} has no inject(x, memory) to take it")
        return x

    def initial_state(self, x: Any) -> Any:
        """Return the state that a solve starts from; default zeros with the shapes of `x`."""
        return pytree.tree_map(torch.zeros_like, x)

    def output(self, z: Any) -> Any:
        """Return the features in a state; default the state itself.

        `DEQ` returns the whole state. The networks of `deepeq.models` and `deepeq.universality.stack` call this.
        """
        return z

    def extend_memory(self, memory: Any, x: Any, z: Any, *, length: int | None = None) -> Any:
        """Return the memory for the segment after this one, without detaching anything; default None, no memory.

        Args:
            memory: The memory of this segment, or None.
            x: Input of this segment.
            z: Its equilibrium.
            length: Number of positions to keep, where that can be chosen; None for all that later segments can see.
        """
        return None

    def shared_weights(self) -> Any:
        """Return what `inject` computes from the parameters alone, so that several solves share it; default None."""
        return None

    def take(self, injection: Any, rows: Tensor) -> Any:
        """Return the injection of some of the problems of a batch.

        With it, `cell(z[rows], cell.take(injection, rows))` equals `cell(z, injection)[rows]`. The default selects rows
        of every tensor of the default injection.

        Args:
            injection: What `inject` returned.
            rows: Indices of the problems, int64, or a mask of them.

        Raises:
            TypeError: The cell has an `inject` of its own, whose result this default does not know.
        """
        if implements(self, "inject"):
            require(self, "take(injection, rows)", purpose="give up some problems of a batch")
        return pytree.tree_map_only(Tensor, lambda part: part[rows], injection)


def method(cell: nn.Module, name: str) -> Callable[..., Any]:
    """Return a method of the contract: the cell's own, or the default of `Cell`."""
    return _own_method(cell, name) or partial(getattr(Cell, name), cell)


def implements(cell: nn.Module, name: str) -> bool:
    """Return whether a cell has its own version of an optional method."""
    return _own_method(cell, name) is not None


def require(cell: nn.Module, *signatures: str, purpose: str) -> None:
    """Check that a cell has its own version of each method.

    Args:
        cell: The cell.
        signatures: The methods as a user would write them, such as `"inject(x, memory)"`.
        purpose: Why they are needed: "X must have METHODS to PURPOSE".

    Raises:
        TypeError: A method is missing.
    """
    if not all(implements(cell, signature.partition("(")[0]) for signature in signatures):
        raise TypeError(f"{type(cell).__name__} must have {' and '.join(signatures)} to {purpose}")


def prepare(
    cell: nn.Module, x: Any, z0: Any = None, memory: Any = None, *, weights: Any = None
) -> tuple[Callable[[Any], Any], Any]:
    """Return the map `f(z) = cell(z, injection)` of one solve, and its first state.

    Args:
        cell: The cell.
        x: The input of the layer.
        z0: First state; default that of the cell.
        memory: What earlier segments left, or None.
        weights: Weights from the cell's `shared_weights`; None to let `inject` compute them.

    Raises:
        ValueError: A memory is given to a cell that takes none.
    """
    injection = method(cell, "inject")(x, memory, *(() if weights is None else (weights,)))
    if z0 is None:
        z0 = method(cell, "initial_state")(x)
    return CellMap(cell, injection), z0


class CellMap:
    """The map `f(z) = cell(z, injection)` of one solve.

    Args:
        cell: The cell.
        injection: What its `inject` returned.
    """

    take: Callable[[Tensor], "CellMap"] | None = None
    """Returns the map of some of the problems, given their indices; None where the cell has no `take`."""

    def __init__(self, cell: nn.Module, injection: Any) -> None:
        self._cell, self._injection = cell, injection
        if implements(cell, "take"):
            self.take = lambda rows: CellMap(cell, method(cell, "take")(injection, rows))

    def __call__(self, z: Any) -> Any:
        return self._cell(z, self._injection)


def _own_method(cell: nn.Module, name: str) -> Callable[..., Any] | None:
    own = getattr(cell, name, None)
    # A plain module may use one of these names for a submodule.
    if not callable(own) or isinstance(own, nn.Module):
        return None
    return None if getattr(own, "__func__", None) is getattr(Cell, name) else own
