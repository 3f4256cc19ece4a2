"""`DEQ` and `Unrolled`: one cell as an equilibrium, or as a stack of tied layers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from deepeq.adjoint import Adjoint
from deepeq.norms import ratio, two_norm
from deepeq.packing import Packing
from deepeq.solution import Result, Solution
from deepeq.solve import check_rules, fixed_point
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
        """The state that the layer returns for a map of `prepare`."""

    def forward(self, x: Any, z0: Any = None, memory: Any = None) -> Solution:
        return self.solve(*self.prepare(x, z0, memory))


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
        throw: Raise `ConvergenceError` also when the step limit is reached.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        throw: bool = False,
    ) -> None:
        super().__init__(cell)
        self.solver, self.adjoint = check_rules(solver, adjoint)
        self.throw = throw

    def solve(self, f: Callable[[Any], Any], z0: Any) -> Solution:
        return fixed_point(f, z0, solver=self.solver, adjoint=self.adjoint, throw=self.throw)

    def extra_repr(self) -> str:
        return f"solver={self.solver}, adjoint={self.adjoint}"


class Unrolled(_TiedLayer):
    """The explicit stack of `depth` tied layers, `z <- cell(z, x)`, with ordinary backpropagation (eq. 3).

    Called like `DEQ`: the baseline, the warm-up network and the gradient oracle are one object away. Its Solution does
    not claim an equilibrium: `residual` is that of the state before the last layer, and nothing is `converged`.

    Args:
        cell: The map, as in `DEQ`.
        depth: Number of layers.
        checkpoint: Keep only about `sqrt(depth)` states between forward and backward, and compute the layers between
            them twice (Chen et al. 2016, Training deep nets with sublinear memory cost).
        keep_every: Return the states after every so many layers, but for the last, in `Solution.intermediate`, for
            auxiliary losses; 0 for none.

    Raises:
        ValueError: `depth` is not a whole number >= 1, or `keep_every` not one >= 0.
    """

    def __init__(self, cell: nn.Module, depth: int, *, checkpoint: bool = False, keep_every: int = 0) -> None:
        super().__init__(cell)
        for name, value, least in (("depth", depth, 1), ("keep_every", keep_every, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} of Unrolled must be a whole number >= {least}")
        self.depth, self.checkpoint, self.keep_every = depth, checkpoint, keep_every

    def solve(self, f: Callable[[Any], Any], z0: Any) -> Solution:
        packing = Packing(z0)

        def layers(z: Any, first: int, last: int) -> tuple[Any, list[Any], Tensor]:
            kept, residuals = [], []
            for layer in range(first, last):
                z, z_before = f(z), z
                with torch.no_grad():
                    residuals.append(_relative_residual(packing.pack(z_before, "z0"), packing.pack(z, "the cell")))
                if self.keep_every and (layer + 1) % self.keep_every == 0 and layer + 1 < self.depth:
                    kept.append(z)
            return z, kept, torch.stack(residuals)

        z, intermediate, trace = z0, [], []
        stride = math.isqrt(self.depth - 1) + 1 if self.checkpoint else self.depth
        for first in range(0, self.depth, stride):
            arguments = (z, first, min(first + stride, self.depth))
            if self.checkpoint and torch.is_grad_enabled():
                z, kept, residuals = checkpoint(layers, *arguments, use_reentrant=False)
            else:
                z, kept, residuals = layers(*arguments)
            intermediate += kept
            trace.append(residuals)
        residuals = torch.cat(trace)  # (depth, B)
        steps = torch.full((packing.batch_size,), self.depth, device=residuals.device)
        never = torch.zeros_like(steps, dtype=torch.bool)
        return Solution(
            z, residuals[-1], never, steps, self.depth, Result.MAX_STEPS, residuals, intermediate=tuple(intermediate)
        )

    def extra_repr(self) -> str:
        return f"depth={self.depth}, checkpoint={self.checkpoint}, keep_every={self.keep_every}"


def _zeros_like(x: Any) -> Any:
    return pytree.tree_map(torch.zeros_like, x)


def _relative_residual(z: Tensor, fz: Tensor) -> Tensor:
    return ratio(two_norm(fz - z), two_norm(fz))
