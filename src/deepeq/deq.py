"""`DEQ` and `Unrolled`: one cell as an equilibrium, or as a stack of tied layers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from deepeq.adjoint import Adjoint, OnFailure, check_choice, tracked
from deepeq.norms import ratio, safe_two_norm
from deepeq.packing import Norm, NormName, Packing
from deepeq.solution import Result, Solution
from deepeq.solve import Nonfinite, check_rules, fixed_point, without_compiling
from deepeq.solvers import Solver


@runtime_checkable
class InjectingCell(Protocol):
    """A cell that prepares what does not depend on `z` once per solve."""

    def inject(self, x: Any, memory: Any = None) -> Any:
        """All that `cell(z, injection)` needs besides `z`: projections, positions, masks, normalized weights."""
        ...


class _TiedLayer(nn.Module, ABC):
    """What `DEQ` and `Unrolled` share: a cell, its injection and its first state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell must be a torch.nn.Module called as cell(z, injection), got {type(cell).__name__}")
        self.cell = cell

    def prepare(
        self, x: Any, z0: Any = None, memory: Any = None, *, weights: Any = None
    ) -> tuple[Callable[[Any], Any], Any]:
        """The map `f(z) = cell(z, injection)` of one solve, and its first state.

        `weights`, if given, are those of a cell whose `inject(x, memory, weights)` takes them.

        Raises:
            ValueError: memory is given to a cell that takes none.
        """
        if isinstance(self.cell, InjectingCell):
            shared = () if weights is None else (weights,)
            injection = self.cell.inject(x, memory, *shared)
        elif memory is None:
            injection = x
        else:
            raise ValueError(f"memory was given, but {type(self.cell).__name__} has no inject(x, memory) to take it")
        if z0 is None:
            z0 = getattr(self.cell, "initial_state", _zeros_like)(x)
        return lambda z: self.cell(z, injection), z0

    @abstractmethod
    def solve(self, f: Callable[[Any], Any], z0: Any) -> Solution:
        """Return the Solution of the layer for a map of `prepare`."""


class DEQ(_TiedLayer):
    """A layer whose output is the equilibrium `z* = cell(z*, x)` (Bai et al. 2019, eq. 2).

    Called as `layer(x, z0=None, memory=None) -> Solution`. A cell is any module called as `cell(z, injection)`. If it
    has `inject(x, memory)`, that runs once per solve; otherwise the injection is `x` itself. The first state is the
    cell's `initial_state(x)` if it has one, else zeros of the shape of `x`. Gradients reach `x`, `memory` and the
    cell's parameters.

    Args:
        cell: The map, pure in `z` for a given injection.
        solver: Forward solver; default `Broyden()`.
        adjoint: How gradients are computed; default `ImplicitAdjoint()`.
        batch_dims: Number of leading dimensions of the state that index independent problems; 0 for one coupled state.
        norm: What is compared with the tolerances, as in `fixed_point`.
        on_failure: What happens when a problem misses its tolerance: `"ignore"`, `"warn"` or `"raise"`.
        nonfinite: What happens when a value is not finite: `"raise"` or `"keep"`, as in `fixed_point`.
        verify: Check that the problems do not depend on each other, as in `fixed_point`.
        throw: Older spelling of `on_failure="raise"`.
    """

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
        super().__init__(cell)
        self.solver, self.adjoint = check_rules(solver, adjoint)
        self.batch_dims, self.norm, self.verify = batch_dims, norm, verify
        self.on_failure: OnFailure = "raise" if throw else on_failure
        self.nonfinite: Nonfinite = nonfinite
        check_choice("on_failure", self.on_failure, OnFailure)
        check_choice("nonfinite", nonfinite, Nonfinite)
        if not callable(norm):
            check_choice("norm", norm, NormName)
        if not isinstance(batch_dims, int) or isinstance(batch_dims, bool) or batch_dims < 0:
            raise ValueError(f"batch_dims={batch_dims!r} of DEQ must be a whole number >= 0")

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that make another layer like this one."""
        names = ("solver", "adjoint", "batch_dims", "norm", "on_failure", "nonfinite", "verify")
        return {name: getattr(self, name) for name in names}

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
        callback: Callable[[int, Any, Tensor], None] | None = None,
    ) -> Solution:
        """Return the equilibrium; a solver or an adjoint given here stands in for the layer's own in this call.

        Args:
            x: The input.
            z0: First state; default that of the cell.
            memory: What the cell's `inject` takes besides the input.
            solver: Forward solver of this call.
            adjoint: Gradients of this call.
            segments: Problem of each row of the state, as in `fixed_point`.
            keep: Steps whose states are returned too, as in `fixed_point`.
            callback: Observer of each step, as in `fixed_point`.
        """
        f, z0 = self.prepare(x, z0, memory)
        return self.solve(f, z0, solver=solver, adjoint=adjoint, segments=segments, keep=keep, callback=callback)

    def solve(
        self,
        f: Callable[[Any], Any],
        z0: Any,
        *,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        segments: Tensor | None = None,
        keep: Sequence[int] = (),
        callback: Callable[[int, Any, Tensor], None] | None = None,
    ) -> Solution:
        options = self.options
        options |= {name: rule for name, rule in (("solver", solver), ("adjoint", adjoint)) if rule is not None}
        return fixed_point(f, z0, segments=segments, keep=keep, callback=callback, **options)

    def extra_repr(self) -> str:
        return f"solver={self.solver}, adjoint={self.adjoint}"


class Unrolled(_TiedLayer):
    """The explicit stack of `depth` tied layers, `z <- cell(z, x)`, with ordinary backpropagation (eq. 3).

    Called like `DEQ`: the baseline, the warm-up network and the gradient oracle are one object away. Its Solution does
    not claim an equilibrium: the residuals are those of the state before the last layer, and nothing is `converged`.

    Args:
        cell: The map, as in `DEQ`.
        depth: Number of layers that gradients pass through.
        no_grad_depth: Number of layers before them, which run without a graph (truncated backpropagation).
        checkpoint: Keep only about `sqrt(depth)` states between forward and backward, and compute the layers between
            them twice (Chen et al. 2016, Training deep nets with sublinear memory cost).
        batch_dims: Number of leading dimensions of the state that index the problems of the residuals; 0 for one.
        keep_every: Return the state after every `keep_every`-th of the `depth` layers, except the last, in
            `Solution.kept`, for auxiliary losses; 0 for none.

    Raises:
        ValueError: `depth` is not a whole number >= 1, or `no_grad_depth` or `keep_every` not one >= 0.
    """

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
        super().__init__(cell)
        self.batch_dims = batch_dims
        counts = (("depth", depth, 1), ("no_grad_depth", no_grad_depth, 0), ("keep_every", keep_every, 0))
        for name, value, least in counts:
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} of Unrolled must be a whole number >= {least}")
        self.depth, self.no_grad_depth = depth, no_grad_depth
        self.checkpoint, self.keep_every = checkpoint, keep_every

    def forward(self, x: Any, z0: Any = None, memory: Any = None) -> Solution:
        return self.solve(*self.prepare(x, z0, memory))

    def solve(self, f: Callable[[Any], Any], z0: Any) -> Solution:
        packing = Packing(z0, self.batch_dims)

        def layers(z: Any, first: int, last: int) -> tuple[Any, list[Any], Tensor]:
            kept, residuals = [], []
            for layer in range(first + 1, last + 1):
                z, z_before = f(z), z
                with torch.no_grad():
                    residuals.append(_residuals(packing.pack(z_before, "z0"), packing.pack(z, "the cell")))
                if self.keep_every and layer % self.keep_every == 0 and 0 < layer < self.depth:
                    kept.append(z)
            return z, kept, torch.stack(residuals)

        z, kept, history = z0, [], []
        if self.no_grad_depth:
            with torch.no_grad():
                z, _, residuals = layers(z, -self.no_grad_depth, 0)
            history.append(residuals)
        # An f that hides its parameters from autograd gets gradients only where its argument asks for one.
        z = pytree.tree_map_only(Tensor, tracked, z)
        stride = math.isqrt(self.depth - 1) + 1 if self.checkpoint else self.depth
        for first in range(0, self.depth, stride):
            arguments = (z, first, min(first + stride, self.depth))
            if self.checkpoint and torch.is_grad_enabled():
                z, states, residuals = checkpoint(layers, *arguments, use_reentrant=False)
            else:
                z, states, residuals = layers(*arguments)
            kept += states
            history.append(residuals)
        residuals = torch.cat(history)  # (layers, 2, B)
        steps = torch.full((packing.batch_size,), len(residuals), device=residuals.device)
        return Solution(
            value=z,
            relative_residual=packing.per_problem(residuals[-1, 0]),
            converged=packing.per_problem(torch.zeros_like(steps, dtype=torch.bool)),
            num_steps=packing.per_problem(steps),
            num_evals=len(residuals),
            result=Result.MAX_STEPS,
            residual_history=packing.per_problem(residuals[:, 0]),
            absolute_residual=packing.per_problem(residuals[-1, 1]),
            kept=tuple(kept),
        )

    def extra_repr(self) -> str:
        layers = f"depth={self.depth}, no_grad_depth={self.no_grad_depth}"
        return f"{layers}, checkpoint={self.checkpoint}, keep_every={self.keep_every}"


def _zeros_like(x: Any) -> Any:
    return pytree.tree_map(torch.zeros_like, x)


def _residuals(z: Tensor, fz: Tensor) -> Tensor:
    """Return the relative and the absolute residual of each state, `(2, B)`."""
    distance = safe_two_norm(fz - z)
    return torch.stack([ratio(distance, safe_two_norm(fz)), distance]).to(fz.dtype)
