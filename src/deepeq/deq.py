"""`DEQ` and `Unrolled`: one cell as an equilibrium, or as a stack of tied layers."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

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


class _TiedLayer(nn.Module):
    """What `DEQ` and `Unrolled` share: a cell, its injection and its first state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell must be a torch.nn.Module called as cell(z, injection), got {type(cell).__name__}")
        self.cell = cell

    def _prepare(self, x: Any, z0: Any, memory: Any) -> tuple[Any, Any]:
        if isinstance(self.cell, InjectingCell):
            injection = self.cell.inject(x, memory)
        elif memory is None:
            injection = x
        else:
            raise ValueError(f"memory was given, but {type(self.cell).__name__} has no inject(x, memory) to take it")
        if z0 is None:
            z0 = getattr(self.cell, "initial_state", _zeros_like)(x)
        return injection, z0


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

    def forward(self, x: Any, z0: Any = None, memory: Any = None) -> Solution:
        injection, z0 = self._prepare(x, z0, memory)
        return fixed_point(
            lambda z: self.cell(z, injection), z0, solver=self.solver, adjoint=self.adjoint, throw=self.throw
        )

    def extra_repr(self) -> str:
        return f"solver={self.solver}, adjoint={self.adjoint}"


class Unrolled(_TiedLayer):
    """The explicit stack of `depth` tied layers, `z <- cell(z, x)`, with ordinary backpropagation (eq. 3).

    Called like `DEQ`: the baseline, the warm-up network and the gradient oracle are one object away. Its Solution does
    not claim an equilibrium: `residual` is that of the state before the last layer, and nothing is `converged`.

    Raises:
        ValueError: `depth` is not a whole number >= 1.
    """

    def __init__(self, cell: nn.Module, depth: int) -> None:
        super().__init__(cell)
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise ValueError(f"depth={depth!r} of Unrolled must be a whole number >= 1")
        self.depth = depth

    def forward(self, x: Any, z0: Any = None, memory: Any = None) -> Solution:
        injection, z = self._prepare(x, z0, memory)
        packing, trace = Packing(z), []
        for _ in range(self.depth):
            z, z_before = self.cell(z, injection), z
            with torch.no_grad():
                trace.append(_relative_residual(packing.pack(z_before, "z0"), packing.pack(z, "the cell")))
        steps = torch.full((packing.batch_size,), self.depth, device=trace[-1].device)
        never = torch.zeros_like(steps, dtype=torch.bool)
        return Solution(z, trace[-1], never, steps, self.depth, Result.MAX_STEPS, torch.stack(trace))

    def extra_repr(self) -> str:
        return f"depth={self.depth}"


def _zeros_like(x: Any) -> Any:
    return pytree.tree_map(torch.zeros_like, x)


def _relative_residual(z: Tensor, fz: Tensor) -> Tensor:
    return ratio(two_norm(fz - z), two_norm(fz))
