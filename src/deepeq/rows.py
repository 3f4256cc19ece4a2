"""The evaluations and the rule of a search, on all problems or on those that are not done."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deepeq.modes import Modes
from deepeq.packing import Map
from deepeq.problem import Problem
from deepeq.solvers.base import Solver

_FEW = 4
"""Problems from which on it pays to leave out those that are done."""


@dataclass
class Counted:
    """Evaluations of a problem, counted, including those that a rule makes itself."""

    evaluate: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    count: int = field(default=0)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.count += 1
        return self.evaluate(z)

    def residual_in(self, unit: Tensor | None) -> Map:
        """Return `g`, of states in that unit."""
        if unit is None:
            return lambda z: self(z)[1]
        return lambda z: self(z * unit)[1] / unit


class Rows:
    """The problems that the rule works on: all at first, and fewer whenever half of the rest are done.

    Where the problem has `take`, its function too sees only these from then on.
    """

    def __init__(self, problem: Problem, solver: Solver, modes: Modes) -> None:
        self._problem, self._modes = problem, modes
        self._all, self._index, self._fz = not solver.independent_rows, None, None
        self.function: Map | None = None

    def shrink(self, running: Tensor, state: Any, fz: Tensor) -> Any:
        """Leave out the problems that are done, if they are many enough, and return the state of the others."""
        size = len(running) if self._index is None else len(self._index)
        if self._all or torch.is_grad_enabled() or size < _FEW or 2 * int(running.sum()) > size:
            return state
        kept = running if self._index is None else running[self._index]
        self._index = running.nonzero().squeeze(1)
        if self._problem.take is not None:
            self.function, self._fz = self._modes.keep(self._problem.take(self._index)), fz
        return pytree.tree_map_only(Tensor, lambda t: t[kept] if t.ndim and len(t) == size else t, state)

    def evaluate(self, z: Tensor, counted: Counted) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `Problem.evaluate` returns. Problems that are done may keep their values."""
        if self.function is None:
            return counted(z)
        assert self._index is not None
        assert self._fz is not None
        counted.count += 1
        self._fz = self._fz.index_copy(0, self._index, self.function(z[self._index]))
        return self._problem.complete(self._fz, z)

    def next(
        self, rule: Solver, points: tuple[Tensor, Tensor, Tensor], unit: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        """Return the next points of all problems, and the state; problems that are done keep their points."""
        z = points[0]
        if self._index is not None:
            points = points[0][self._index], points[1][self._index], points[2][self._index]
            unit = unit if unit is None or len(unit) == 1 else unit[self._index]
        if unit is None:
            z_next, state = _next(rule, *points, state)
        else:
            z_next, state = _next(rule, points[0] / unit, points[1] / unit, points[2] / unit, state)
            z_next = z_next * unit
        return (z_next if self._index is None else z.index_copy(0, self._index, z_next)), state


def _next(rule: Solver, z: Tensor, fz: Tensor, g: Tensor, state: Any) -> tuple[Tensor, Any]:
    version = z._version
    result = rule.step(z, fz, g, state)
    if z._version != version:
        raise ValueError(f"step of {type(rule).__name__} changed z in place; use operations that make new tensors")
    if isinstance(result, tuple) and len(result) == 2 and getattr(result[0], "shape", None) == z.shape:
        return result
    got = type(result).__name__
    if isinstance(result, tuple):
        got = f"a tuple of {', '.join(str(tuple(getattr(part, 'shape', (part,)))) for part in result)}"
    raise TypeError(
        f"step of {type(rule).__name__} must return two values, the next z of shape {tuple(z.shape)} and the state "
        f"after it (None if it has none), got {got}"
    )
