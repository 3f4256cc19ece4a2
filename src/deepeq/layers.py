"""`DEQ`, `Unrolled` and `Subsequences`: modules that hold a cell and a way to solve for its state."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor, nn

from deepeq.adjoint import Adjoint, ImplicitAdjoint
from deepeq.cell import prepare
from deepeq.deq import Callback, Equilibrium, How, Pieces, Stack, require_pieces
from deepeq.diagnosis import OnFailure
from deepeq.packing import Norm
from deepeq.solution import Solution, State
from deepeq.solve import Nonfinite, without_compiling
from deepeq.solvers import Anderson, Solver


class Layer(nn.Module):
    """A cell, and how its state is found.

    Attributes:
        cell: The map, pure in `z` for a given injection.
        how: The default way to solve; a frozen value.
    """

    def __init__(self, cell: nn.Module, how: How) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell must be a torch.nn.Module called as cell(z, injection), got {type(cell).__name__}")
        self.cell, self.how = cell, how

    def prepare(self, x: Any, z0: Any = None, memory: Any = None) -> tuple[Callable[[Any], Any], Any]:
        """Return the map `f(z) = cell(z, injection)` of one solve, and its first state.

        Args:
            x: Input of the cell.
            z0: First state; None for the cell's own.
            memory: Memory of the cell, if it has one.
        """
        return prepare(self.cell, x, z0, memory)

    def extra_repr(self) -> str:
        return f"how={self.how}"


class DEQ(Layer):
    """A layer whose output is the equilibrium `z* = cell(z*, x)` (Bai et al. 2019, eq. 2).

    Called as `layer(x, z0=None, memory=None) -> Solution`. Gradients reach `x`, `memory` and the cell's parameters.

    Args:
        cell: A `Cell`, or any module called as `cell(z, x)`.
        solver: Forward solver; default `Anderson()`.
        adjoint: How gradients are computed; default `ImplicitAdjoint()`.
        batch_dims: Number of leading dimensions of the state that index independent problems; 0 for one coupled state.
        norm: What is compared with the tolerances, as in `fixed_point`.
        on_failure: What happens when a problem misses its tolerance: `"ignore"`, `"warn"` or `"raise"`.
        nonfinite: What happens when a value is not finite: `"raise"` or `"keep"`, as in `fixed_point`.
        verify: Check that the problems do not depend on each other, as in `fixed_point`.
        throw: Older spelling of `on_failure="raise"`.
    """

    how: Equilibrium

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        batch_dims: int = 1,
        norm: Norm = "parts",
        on_failure: OnFailure = "warn",
        nonfinite: Nonfinite = "raise",
        verify: bool = True,
        throw: bool = False,
    ) -> None:
        how = Equilibrium(
            solver=Anderson() if solver is None else solver,
            adjoint=ImplicitAdjoint() if adjoint is None else adjoint,
            batch_dims=batch_dims,
            norm=norm,
            on_failure="raise" if throw else on_failure,
            nonfinite=nonfinite,
            verify=verify,
        )
        super().__init__(cell, how)

    @property
    def solver(self) -> Solver:
        """The forward solver."""
        return self.how.solver

    @property
    def adjoint(self) -> Adjoint:
        """How gradients are computed."""
        return self.how.adjoint

    @without_compiling
    def forward(
        self,
        x: Any,
        z0: Any = None,
        memory: Any = None,
        *,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        segments: Tensor | None = None,
        keep: Sequence[int] = (),
        callback: Callback | None = None,
    ) -> Solution:
        """Return the equilibrium; a solver or an adjoint given here replaces the layer's own in this call.

        Args:
            x: The input.
            z0: First state; default that of the cell.
            memory: What the cell's `inject` takes besides the input.
            solver: Forward solver of this call.
            adjoint: How gradients of this call are computed.
            segments: Problem of each row of the state, as in `fixed_point`.
            keep: Steps whose states are returned too, as in `fixed_point`.
            callback: Observer of each step, as in `fixed_point`.
        """
        how = _with_rules(self.how, solver, adjoint)
        return how(self.cell, x, z0, memory, segments=segments, keep=keep, callback=callback)

    if TYPE_CHECKING:  # nn.Module says that a call returns anything

        @overload
        def __call__(
            self,
            x: Any,
            z0: None = None,
            memory: Any = None,
            *,
            solver: Solver | None = None,
            adjoint: Adjoint | None = None,
            segments: Tensor | None = None,
            keep: Sequence[int] = (),
            callback: Callback | None = None,
        ) -> Solution[Tensor]: ...

        @overload
        def __call__(
            self,
            x: Any,
            z0: State,
            memory: Any = None,
            *,
            solver: Solver | None = None,
            adjoint: Adjoint | None = None,
            segments: Tensor | None = None,
            keep: Sequence[int] = (),
            callback: Callback | None = None,
        ) -> Solution[State]: ...

        def __call__(self, *arguments: Any, **options: Any) -> Any: ...


class Unrolled(Layer):
    """The explicit stack of `depth` tied layers, `z <- cell(z, x)`; see `Stack`.

    Called as `layer(x, z0=None, memory=None) -> Solution`, like `DEQ`: the network to compare with, the shallow network
    that training starts from, and a check of gradients.

    Args:
        cell: The map, as in `DEQ`.
        depth: Number of layers that gradients pass through.
        no_grad_depth: Number of layers before them, which run without a graph.
        checkpoint: Keep only about `sqrt(depth)` states, and compute the layers between them twice.
        keep_every: Return the state after every `keep_every`-th layer in `Solution.kept`; 0 for none.
        batch_dims: Number of leading dimensions of the state that index the problems of the residuals; 0 for one.
    """

    how: Stack

    def __init__(
        self,
        cell: nn.Module,
        depth: int,
        *,
        no_grad_depth: int = 0,
        checkpoint: bool = False,
        keep_every: int = 0,
        batch_dims: int = 1,
    ) -> None:
        how = Stack(
            depth=depth,
            no_grad_depth=no_grad_depth,
            checkpoint=checkpoint,
            keep_every=keep_every,
            batch_dims=batch_dims,
        )
        super().__init__(cell, how)

    def forward(self, x: Any, z0: Any = None, memory: Any = None) -> Solution:
        """Return the state after the last layer.

        Args:
            x: Input of the cell.
            z0: State before the first layer; None for the cell's own.
            memory: Memory of the cell, if it has one.
        """
        return self.how(self.cell, x, z0, memory)

    if TYPE_CHECKING:

        @overload
        def __call__(self, x: Any, z0: None = None, memory: Any = None) -> Solution[Tensor]: ...

        @overload
        def __call__(self, x: Any, z0: State, memory: Any = None) -> Solution[State]: ...

        def __call__(self, *arguments: Any, **options: Any) -> Any: ...


class Subsequences(Layer):
    """A `DEQ` that solves a sequence in pieces of at most `length` positions; see `Pieces`.

    Called as `layer(x, z0=None, memory=None) -> Solution`, like `DEQ`, for `x` `(B, T, D)` and states of tensors
    `(B, T, ...)`. `prepare` gives the map of the whole sequence.

    Args:
        layer: The layer whose cell, solver and adjoint are used. The cell has `inject(x, memory)` and
            `extend_memory(memory, x, z, *, length)`.
        length: Largest number of positions in a piece.

    Raises:
        TypeError: `layer` is not a `DEQ`, or its cell lacks a method.
        ValueError: `length` is not a whole number >= 1; in a call, a tensor of the state is not `(B, T, ...)`.
    """

    how: Pieces

    def __init__(self, layer: DEQ, length: int) -> None:
        if not isinstance(layer, DEQ):
            raise TypeError(f"layer must be a DEQ, got {type(layer).__name__}: only equilibria can be found in pieces")
        require_pieces(layer.cell)
        super().__init__(layer.cell, Pieces(equilibrium=layer.how, length=length))

    @without_compiling
    def forward(
        self,
        x: Tensor,
        z0: Any = None,
        memory: Any = None,
        *,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        keep: Sequence[int] = (),
        callback: Callback | None = None,
    ) -> Solution:
        """Return the equilibrium of the whole sequence.

        Args:
            x: Input of the cell, `(B, T, D)`.
            z0: First state of the whole sequence; None for the cell's own.
            memory: Memory of the cell before the first piece.
            solver: Forward solver of this call; None for that of the layer.
            adjoint: Adjoint of this call; None for that of the layer.
            keep: Steps whose states are returned too, as in `fixed_point`.
            callback: Called as `callback(step, z, residual)` after each step of each piece.
        """
        how = replace(self.how, equilibrium=_with_rules(self.how.equilibrium, solver, adjoint))
        return how(self.cell, x, z0, memory, keep=keep, callback=callback)


def _with_rules(how: Equilibrium, solver: Solver | None, adjoint: Adjoint | None) -> Equilibrium:
    how = how if solver is None else replace(how, solver=solver)
    return how if adjoint is None else replace(how, adjoint=adjoint)
