"""What a search looks for, and how far a point is from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepeq.norms import ratio, safe_two_norm
from deepeq.packing import Map
from deepeq.solvers.base import Solver


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is searched for: `z = f(z)`, or `g(z) = 0`, for `B` problems of `N` numbers each.

    Called with a point, it returns `f(z)`; for a root, `f(z) = z + scale g(z)` has it as its fixed point.
    """

    function: Map
    """`f`, or `g` for a root."""
    norm: Callable[[Tensor], Tensor] = safe_two_norm
    """What is measured, `(B, N) -> (B,)`, or `(B, P)` where the worst of `P` numbers counts."""
    sizes: Sequence[int] = ()
    """Columns of each part of the state, where there are several parts."""
    root: bool = False
    scale: Tensor | None = None
    """Scale and sign of `g` for the solvers, `(B, 1)`."""
    rounding: Tensor | None = None
    """Rounding level of `g` at `z0`, for each number of `norm`. Where `g(z0)` is below it, it is the tolerance."""
    first: Tensor | None = None
    """Value of `function` at the first point, if known. The first step then costs no evaluation, but it counts."""
    resolution: float = 0.0
    """Relative rounding of what `function` returns, where it is coarser than the packed dtype."""
    verify: bool = True
    """Check that the residuals of all problems hold together at the returned state."""
    take: Callable[[Tensor], Map] | None = None
    """Returns `function` for some of the problems, given their indices; None where that cannot be done."""
    linear: bool = False
    """The map is the affine one of a backward pass, which asks for other advice."""
    name: str = "f"
    """What `function` is called in messages."""

    def __call__(self, z: Tensor) -> Tensor:
        return self.evaluate(z)[0]

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `f(z)`, `f(z) - z`, and what is measured: the same difference, or `g(z)` for a root."""
        return self.complete(self.function(z), z)

    def complete(self, value: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `evaluate` returns, from the value of `function` at `z`."""
        if not self.root:
            g = value - z
            return value, g, g
        g = value if self.scale is None else self.scale * value
        return z + g, g, value


class Measured(NamedTuple):
    """What one evaluation says of each problem, `(B,)` each."""

    error: Tensor  # the residual over the tolerance: at most one where a problem has converged
    relative: Tensor
    absolute: Tensor
    distance: Tensor  # the absolute residual in units of the first point, so that steps can be compared
    total: Tensor  # finite where the point and its value are finite


FAR = 30.0
"""Growth of `||f(z)||` from the first point on, beyond which a relative residual does not say enough."""


class Measures:
    """The residuals of points, for one search."""

    def __init__(self, problem: Problem, solver: Solver) -> None:
        self._problem, self._rtol, self._atol = problem, solver.rtol, solver.atol
        self._first: Tensor | None = None  # ||f(z0)||, or ||g(z0)|| for a root, to which its residuals are relative
        self._first_distance: Tensor | None = None
        self._largest: Tensor | None = None  # distance so far

    def __call__(self, fz: Tensor, measured: Tensor) -> Measured:
        if measured.requires_grad:
            fz, measured = fz.detach(), measured.detach()
        distance = self._problem.norm(measured)
        scale = distance if self._problem.root else self._problem.norm(fz)
        if self._first is None or self._first_distance is None or self._largest is None:
            self._first, self._first_distance, self._largest = scale, distance, distance
        floor = None  # tolerances are not asked to be smaller
        if self._problem.root:
            scale, rounding = self._first, self._problem.rounding
            if rounding is not None:
                # At a root, and where a part of g holds at z0 already, the first value is a rounding error.
                floor = torch.where(scale <= rounding, rounding, 0.0)
        elif self._problem.linear and distance.ndim > 1:
            # Rounding errors of a large part reach the others.
            noise = min(16.0 * torch.finfo(measured.dtype).eps, self._rtol)
            floor = noise * scale.amax(dim=1, keepdim=True)
        if measured.dtype == torch.float64:
            relative = ratio(distance, scale)
        else:  # cheaper, and float64 has room below: 0 / 0 is 0
            relative = distance / (scale + torch.finfo(scale.dtype).tiny)
        if self._atol or floor is not None:
            tolerance = self._rtol * scale + self._atol
            error = ratio(distance, tolerance if floor is None else torch.maximum(tolerance, floor))
        else:
            error = relative / self._rtol
        if not self._problem.root:
            self._largest = torch.maximum(self._largest, distance)
            if error.is_cuda or bool((error <= 1.0).any()):
                error = torch.maximum(error, self._farness(scale, distance, torch.finfo(measured.dtype).eps))
        if distance.ndim == 1:
            return Measured(error, relative, distance, distance, torch.maximum(distance, scale))
        compared = distance / torch.where(self._first > 0, self._first, scale)
        rows = Measured(error, relative, distance, compared.nan_to_num(0.0), torch.maximum(distance, scale))
        return Measured(*(row.amax(dim=1) for row in rows))

    def _farness(self, scale: Tensor, distance: Tensor, eps: float) -> Tensor:
        """Return numbers above one where only the growth of the state makes a relative residual small, else zero.

        The residual has not shrunk, or the state is so large that rounding hides every residual that was seen.
        """
        assert self._first is not None
        assert self._first_distance is not None
        assert self._largest is not None
        shrunk = distance / (0.1 * self._first_distance)
        hidden = 10.0 * max(eps, self._problem.resolution) * scale / self._largest
        far = scale > FAR * self._first
        return torch.where(
            far & (hidden > 1.0), hidden, torch.where(far & (shrunk > 1.0) & (shrunk < 1e3), shrunk, 0.0)
        )
