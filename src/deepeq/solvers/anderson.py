"""Anderson acceleration with one stored vector per step."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from deepeq.checks import check_choice, check_count
from deepeq.norms import two_norm
from deepeq.solvers.base import Solver
from deepeq.solvers.basis import Basis, times

Projection = Literal["mixed", "type_i", "type_ii"]
"""The vectors `w` of `<w_i, g - dG gamma> = 0`: `dg - dz` or `dg + dz`, `dz`, or `dg`."""
_LEAST_PIVOT = 3e-4
"""Pivots below this fraction of their terms start a problem again (types I and mixed)."""
_LONGEST_STEP = 10.0
"""Longest step, in sizes of `z` and `f(z)`: a map is seldom linear so far away."""
_BLOCK = 8
"""Rows by which the small matrices grow."""
_SMALLEST_HISTORY = 8
"""Differences kept where a state has fewer than half as many numbers."""


class AndersonState(NamedTuple):
    """The differences `dg_0 ... dg_(k-1)`, and what is known of the steps `dz_0 ... dz_k`.

    Rows and columns of the matrices belong to `g` and to the differences: index 0 is `g`, and `1 + i` is `dg_i`. They
    are float64, and have zeros in the room for more.
    """

    g: Tensor  # (B, N), the last residual
    differences: Basis  # k vectors
    gram: Tensor  # (B, K, K), inner products
    steps: Tensor  # (B, K, K), rows 0, df_0 ... df_(k-1), dz_k as combinations of g and the differences
    inverse: Tensor  # (B, K, K), the inverse of the matrix of <w_i, dg_j>; row and column 0 are zero
    weights: Tensor  # (B, K), of dz_i in -w_i: w_i = dg_i - weight dz_i


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration in difference form.

    With `g = f(z) - z` and the differences `dz`, `dg`, `df` of the last steps, `gamma` solves
    `W^T (g - dG gamma) = 0`, and `z <- f(z) - dF gamma - damping (g - dG gamma)`. Type II, with `W = dG`, minimizes
    `||g - dG gamma||`; on an affine map it is GMRES. Type I, with `W = dZ`, is a relative of Broyden's method. Each of
    them fails on cells where the other is fast. The default has the columns `dg - dz`, or `dg + dz` where
    `<dz, dg> > 0`. It needs about as many evaluations as the better one: both terms have equal sizes where the Jacobian
    is small, and else the larger one counts. A step is at most ten times as long as `z` and `f(z)` together.

    One vector per step is kept, `dg`, instead of two: `df = dg + dz`, and each step `dz` is a combination of `g` and
    the differences before it, whose coefficients are known. When `history_size` differences are stored the method
    starts again. A problem whose new difference depends on its older ones starts again from the new one. The small
    systems are solved in float64, with an inverse that grows by one row and column per step.

    References:
        Walker and Ni (2011), Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49, eq. 2.2. Fang
        and Saad (2009), Two classes of multisecant methods for nonlinear acceleration, Numer. Linear Algebra Appl. 16
        (types I and II).
    """

    history_size: int = 100
    """Most differences kept; the method restarts when they are used up."""
    projection: Projection = "mixed"
    """The equations for `gamma`: `"mixed"`, `"type_i"` or `"type_ii"`."""
    ridge: float = 0.0
    """Tikhonov term, relative to differences that are scaled to one; 0 means none."""
    damping: float = 0.0
    """Fraction of the averaged residual that is held back; 0 means none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("history_size", self.history_size, least=1, owner=self)
        check_choice("projection", self.projection, Projection)
        self._check_damping(self.damping)
        if not isinstance(self.ridge, int | float) or not 0.0 <= self.ridge < 1.0:
            raise ValueError(f"ridge={self.ridge!r} of Anderson must lie in [0, 1); 0 means none")

    @property
    def num_stored(self) -> int:
        return 1 + min(self.history_size, max(0, self.max_steps - 1))

    def advice(self, num_steps: int) -> str:
        if num_steps <= self.history_size:
            return ""
        return f"Anderson started again after every history_size={self.history_size} steps: raise it"

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, g: Tensor, state: AndersonState | None) -> tuple[Tensor, AndersonState]:
        # More differences than a small state has numbers tell little, and their matrices would be larger than they.
        most = min(self.history_size, max(_SMALLEST_HISTORY, 2 * g.shape[1]))
        if state is None or state.differences.size == most:
            return z + (1.0 - self.damping) * g, self._start(g)
        differences = state.differences.append(g, min(most, max(1, self.max_steps - 1)), minus=state.g)
        gram, steps, inverse = _with_room(differences.size + 2, state)
        new = differences.size  # index of the newest difference
        products = self._products(differences, g, gram)
        for index, row in ((0, products[:, 1]), (new, products[:, 0])):
            gram[:, index], gram[:, :, index] = row, row
        steps[:, :, new] = -steps[:, :, 0]  # the last residual was g - dg_k
        steps[:, new, new] += 1.0  # df_k = dz_k + dg_k
        size, eps = two_norm(fz).double().unsqueeze(1), torch.finfo(g.dtype).eps
        noise = eps * size
        gamma, inverse, weights = self._coefficients(new, products, noise, eps, gram, steps, inverse, state.weights)
        step = -times(gamma, steps)
        step[:, 0] += 1.0 - self.damping
        if self.damping:
            step += self.damping * gamma
        square = torch.bmm(times(step, gram).unsqueeze(1), step.unsqueeze(2)).squeeze(2)
        limit = _LONGEST_STEP**2 * (size * size + products[:, 1, :1])
        step = step * torch.where(square > limit, limit / torch.where(square > limit, square, 1.0), 1.0).sqrt()
        steps = _with_row(new + 1, step, steps)
        step = step[:, : new + 1].to(z.dtype)
        z_next = differences.add(torch.addcmul(z, g, step[:, :1]), step[:, 1:])
        return z_next, AndersonState(g, differences, gram, steps, inverse, weights)

    def _start(self, g: Tensor) -> AndersonState:
        gram, steps, inverse = g.new_zeros((3, len(g), _BLOCK, _BLOCK), dtype=torch.float64).unbind()
        steps[:, 1, 0] = 1.0 - self.damping
        return AndersonState(g, Basis(), gram, steps, inverse, gram.new_zeros((len(g), 1)))

    def _products(self, differences: Basis, g: Tensor, gram: Tensor) -> Tensor:
        """Return the products of the newest difference and of `g` with `g` and all differences, `(B, 2, K)`."""
        new, difference = differences.size, differences.last
        size, length = two_norm(g), two_norm(difference)
        products = gram.new_zeros((len(g), 2, gram.shape[2]))
        products[:, 1, 1 : new + 1] = differences.inner(g)
        products[:, 1, 0] = size.double().square()
        if g.is_cuda or g.requires_grad:
            products[:, 0, 1 : new + 1] = differences.inner(difference)
        else:
            # The difference of two products saves a pass over all vectors.
            products[:, 0, 1:new] = products[:, 1, 1:new] - gram[:, 0, 1:new]
            products[:, 0, new] = length.double().square()
            close = (length < 0.1 * size) & (length > 0.0)  # where it would lose digits
            if close.any():
                products[close, 0, 1 : new + 1] = differences.inner(difference)[close].double()
        products[:, 0, 0] = products[:, 1, new]
        return products

    def _coefficients(
        self,
        new: int,
        products: Tensor,
        noise: Tensor,
        eps: float,
        gram: Tensor,
        steps: Tensor,
        inverse: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return gamma, `(B, K)`, and the inverse and the weights with those of the newest difference.

        Args:
            new: Index of the newest difference.
            products: Its products, and those of `g`, `(B, 2, K)`.
            noise: Length of a difference that is nothing but rounding errors, `(B, 1)`.
            eps: Relative rounding of the state.
            gram: With the new row and column.
            steps: With the row of the newest `df`.
            inverse: Without the new row and column.
            weights: Without the new one.
        """
        if self.projection == "type_ii":
            projected, row, least = products, products[:, 0], 100.0 * eps
        else:
            of_dz = times(steps[:, new], gram) - products[:, 0]  # dz_k^T dG
            # With this sign, <w_k, dg_k> = ||dg_k||^2 + |<dz_k, dg_k>|: w_k vanishes nowhere.
            weight = torch.where(of_dz[:, new : new + 1] > 0.0, -1.0, 1.0)
            weights = torch.cat([weights, weight], dim=1)
            padded = pad(weights, (0, steps.shape[1] - weights.shape[1])).unsqueeze(1)
            of_dg = 1.0 if self.projection == "mixed" else 0.0
            projected = of_dg * products + padded * (products - torch.bmm(products, steps.mT))  # W^T dg_k and W^T g
            row = of_dg * products[:, 0] - weight * of_dz  # w_k^T dG
            # A small pivot makes gamma large without the least squares of type II, and f is not linear so far away.
            least = _LEAST_PIVOT
        known, back = torch.bmm(projected, inverse.mT), times(row, inverse)
        overlap, corner = times(row, known.mT), projected[:, :, new]
        square = gram[:, new, new].unsqueeze(1)
        pivot = corner[:, :1] + self.ridge * square - overlap[:, :1]
        again = pivot.abs() <= least * (corner[:, :1].abs() + overlap[:, :1].abs())
        if pivot.is_cuda or again.any():
            inverse, known = (part.masked_fill(again.unsqueeze(2), 0.0) for part in (inverse, known))
            back, overlap = back.masked_fill(again, 0.0), overlap.masked_fill(again, 0.0)
            pivot = torch.where(again, corner[:, :1] + self.ridge * square, pivot)
        # A problem that is done repeats its point. Its difference is zero, and gets the coefficient zero.
        usable = (square > noise * noise) & (pivot.abs() > eps * square)
        scale = torch.where(usable, pivot, torch.inf).reciprocal()
        unit = torch.zeros_like(row)
        unit[:, new] = 1.0
        left = (known[:, 0] - unit) * scale
        gamma = torch.addcmul(known[:, 1], left, corner[:, 1:] - overlap[:, 1:], value=-1)
        return gamma, _writable(inverse).addcmul_(left.unsqueeze(2), (back - unit).unsqueeze(1)), weights


def _with_room(size: int, state: AndersonState) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices with room for that many rows, which may be written into."""
    matrices = state.gram, state.steps, state.inverse
    missing = -(-size // _BLOCK) * _BLOCK - state.gram.shape[1]
    if missing > 0:
        gram, steps, inverse = (pad(matrix, (0, missing, 0, missing)) for matrix in matrices)
        return gram, steps, inverse
    return _writable(state.gram), _writable(state.steps), state.inverse


def _with_row(index: int, row: Tensor, matrix: Tensor) -> Tensor:
    matrix = _writable(matrix)
    matrix[:, index] = row
    return matrix


def _writable(matrix: Tensor) -> Tensor:
    """Return the matrix, or a copy where a graph may hold it."""
    return matrix.clone() if torch.is_grad_enabled() else matrix
