"""Conjugate gradients for symmetric affine fixed points."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepeq.norms import inner, two_norm
from deepeq.solvers.base import Solver


class ConjugateGradientState(NamedTuple):
    """The iterate with its recursive residual, and the direction whose product the evaluated point gives."""

    u: Tensor  # (B, N)
    r: Tensor  # (B, N), g(u)
    p: Tensor  # (B, N)
    length: Tensor  # (B, 1), the evaluated point is u + length * p
    largest: Tensor  # (B, 1), a residual larger than this has cost too many digits
    measured: Tensor  # (B, 1), whether u itself is evaluated: it is the first one, or it looks good enough
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(Solver):
    """Conjugate gradients on `A u = b` for an affine map `f(u) = M u + b` with positive definite `A = I - M`.

    Made for symmetric problems, such as the backward pass of gradient descent on an energy, whose `J` is symmetric. It
    then needs about the evaluations of `GMRES`, and three vectors however many steps it takes. An evaluation at
    `u + s p` gives the product `A p = (r - g) / s` with the next direction `p`. Where the recursive residual `r` is
    small enough, and at the last step, `u` itself is evaluated, so that the residual that is reported is a measured
    one. Should it not be small enough, the method starts again from there.

    Where `A` turns out not to be positive definite, a problem takes the step along `p` of least residual instead, and
    starts again from there: it does not diverge, but converges slowly if at all, and says so.

    References:
        Hestenes and Stiefel (1952), J. Res. Nat. Bur. Stand. 49, sec. 3.
    """

    rtol: float = 1e-5
    max_steps: int = 50

    @property
    def num_stored(self) -> int:
        return 3

    @property
    def needs_symmetry(self) -> bool:
        return True

    def advice(self, num_steps: int) -> str:
        return "ConjugateGradient needs a map with symmetric positive definite I - J; for any other, use GMRES"

    def init(self, z0: Tensor) -> ConjugateGradientState:
        one = z0.new_ones((z0.shape[0], 1))
        return ConjugateGradientState(z0, z0, z0, one, one, one.bool(), 0)

    def step(
        self, z: Tensor, fz: Tensor, g: Tensor, state: ConjugateGradientState
    ) -> tuple[Tensor, ConjugateGradientState]:
        num_steps = state.num_steps + 1
        if num_steps == 1:
            u, r, p, largest = z, g, g, _norm(g) / torch.finfo(g.dtype).eps ** 0.5
        else:
            u, r, p = (
                torch.where(state.measured, opened, followed)
                for opened, followed in zip((z, g, g), _follow(g, state), strict=True)
            )
            largest = state.largest
        # Below the rounding errors of f(u) = u + r, a smaller recursive residual says nothing.
        measured = _norm(r) <= self.atol + max(self.rtol, torch.finfo(g.dtype).eps) * _norm(u + r)
        if num_steps + 1 >= self.max_steps and num_steps > 1:
            measured = torch.ones_like(measured)
        # As long as the point itself, and as the residual there: the difference is then free of cancellation.
        length = _quotient(torch.maximum(_norm(u), _norm(r)), _norm(p))
        z_next = torch.where(measured, u, torch.addcmul(u, p, length))
        return z_next, ConjugateGradientState(u, r, p, length, largest, measured, num_steps)


def _follow(g: Tensor, state: ConjugateGradientState) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next iterate, residual and direction, given `g` at `u + length * p`."""
    u, r, p = state.u, state.r, state.p
    product = (r - g) / (state.length + (state.length == 0))  # A p
    square, curvature, slope = _inner(r, r), _inner(p, product), _inner(r, product)
    size, product_square = _norm(p), _inner(product, product)
    noise = 10 * torch.finfo(g.dtype).eps * size * (size + product_square.sqrt())
    length = _quotient(square, curvature)
    grown = square + length * (length * product_square - 2.0 * slope)  # ||r - length * A p||^2
    usable = (curvature > noise) & (grown <= state.largest.square())
    length = torch.where(usable, length, _quotient(slope, product_square))
    u, r = torch.addcmul(u, p, length), torch.addcmul(r, product, length, value=-1)
    return u, r, torch.addcmul(r, p, torch.where(usable, _quotient(_inner(r, r), square), 0.0))


def _norm(w: Tensor) -> Tensor:
    return two_norm(w).unsqueeze(1)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return inner(a, b).unsqueeze(1)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """Return `a / b`, or 0 where `b` is 0."""
    zero = b == 0
    return (a / b.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
