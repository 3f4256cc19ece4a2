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
"""The vectors `w` of `<w_i, g - dG gamma> = 0`: `dg - dz`, `dz`, or `dg`."""
_WEIGHTS = {"mixed": (1.0, 1.0), "type_i": (0.0, 1.0), "type_ii": (1.0, 0.0)}
_LEAST_PIVOT = 3e-4
"""Pivots below this fraction of their terms start a problem again (types I and mixed)."""
_BLOCK = 8
"""Rows by which the small matrices grow."""
_SMALLEST_HISTORY = 8
"""Differences kept where a state has fewer than half as many numbers."""


class AndersonState(NamedTuple):
    """The differences `dg_0 ... dg_(k-1)`, and what is known of the steps `dz_0 ... dz_k`.

    The matrices are float64 and have room for `K > k` rows and columns, with zeros in it.
    """

    g: Tensor  # (B, N), the last residual
    rest: Tensor  # (B, K), <dg_i, g>
    differences: Basis  # k vectors
    gram: Tensor  # (B, K, K), <dg_i, dg_j>
    steps: Tensor  # (B, K, K), rows df_0 ... df_(k-1), dz_k as combinations of g (column 0) and the differences
    inverse: Tensor  # (B, K, K), the inverse of the matrix of <w_i, dg_j>


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration in difference form.

    With `g = f(z) - z` and the differences `dz`, `dg`, `df` of the last steps, `gamma` solves
    `W^T (g - dG gamma) = 0`, and `z <- f(z) - dF gamma - damping (g - dG gamma)`. Type II, with `W = dG`, minimizes
    `||g - dG gamma||`; on an affine map it is GMRES. Type I, with `W = dZ`, is a relative of Broyden's method. Each of
    them fails on cells where the other is fast. The default, `W = dG - dZ`, needs about as many evaluations as the
    better one: both terms have equal sizes where the Jacobian is small, and else the larger one counts.

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
        k, capacity = state.differences.size, min(most, max(1, self.max_steps - 1))
        differences = state.differences.append(g, capacity, minus=state.g)
        gram, steps, inverse = _with_room(k + 2, state)
        size, rest = two_norm(g).double().unsqueeze(1), _padded(differences.inner(g), gram)
        along = self._along(differences, size, rest, state.rest)
        gram[:, k], gram[:, :, k] = along, along
        steps[:, :, 1 + k] = -steps[:, :, 0]  # the last residual was g - dg_k
        steps[:, k, 1 + k] += 1.0  # df_k = dz_k + dg_k
        noise = torch.finfo(g.dtype).eps * two_norm(fz).unsqueeze(1)
        gamma, inverse = self._coefficients(k, along, rest, size, noise, gram, steps, inverse)
        step = -times(gamma, steps)
        step[:, 0] += 1.0 - self.damping
        if self.damping:
            step[:, 1:] += self.damping * gamma[:, :-1]
        steps = _with_row(k + 1, step, steps)
        step = step[:, : k + 2].to(z.dtype)
        z_next = differences.add(torch.addcmul(z, g, step[:, :1]), step[:, 1:])
        return z_next, AndersonState(g, rest, differences, gram, steps, inverse)

    def _start(self, g: Tensor) -> AndersonState:
        zeros = [g.new_zeros((len(g), _BLOCK, _BLOCK), dtype=torch.float64) for _ in range(3)]
        zeros[1][:, 0, 0] = 1.0 - self.damping
        return AndersonState(g, zeros[0][:, 0], Basis(), *zeros)

    def _along(self, differences: Basis, size: Tensor, rest: Tensor, last_rest: Tensor) -> Tensor:
        """Return the products of the newest difference with all of them, `(B, K)`."""
        difference, k = differences.last, differences.size - 1
        length = two_norm(difference).double().unsqueeze(1)
        if difference.is_cuda or difference.requires_grad:
            return _padded(differences.inner(difference), rest)
        # The difference of two products saves a pass over all vectors.
        along = rest - pad(last_rest, (0, rest.shape[1] - last_rest.shape[1]))
        along[:, k : k + 1] = length * length
        close = (length < 0.1 * size) & (length > 0.0)  # where it would lose digits
        if close.any():
            along = torch.where(close, _padded(differences.inner(difference), rest), along)
        return along

    def _coefficients(
        self,
        k: int,
        along: Tensor,
        rest: Tensor,
        size: Tensor,
        noise: Tensor,
        gram: Tensor,
        steps: Tensor,
        inverse: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return gamma, `(B, K)`, and the inverse with the row and column of the difference `dg_k`.

        Args:
            k: Index of the newest difference.
            along: Its products with all of them, `(B, K)`.
            rest: Those of `g`, `(B, K)`.
            size: `||g||`, `(B, 1)`.
            noise: Length of a difference that is nothing but rounding errors, `(B, 1)`.
            gram: With the row and column of `dg_k`.
            steps: With the row of `df_k`.
            inverse: Without the row and column of `dg_k`.
        """
        (of_dg, of_dz), eps = _WEIGHTS[self.projection], torch.finfo(noise.dtype).eps
        column, right, row = of_dg * along, of_dg * rest, of_dg * along  # W^T dg_k, W^T g and w_k^T dG
        if of_dz:
            vectors = torch.stack([along, rest], dim=1).roll(1, dims=2)  # products with g, dg_0, dg_1, ...
            vectors[:, 0, 0], vectors[:, 1, :1] = rest[:, k], size * size.double()
            of_df, last = torch.bmm(vectors, steps.mT), steps[:, k]
            column, right = column + of_dz * (along - of_df[:, 0]), right + of_dz * (rest - of_df[:, 1])
            row = row + of_dz * (along - last[:, :1] * rest - times(pad(last[:, 1:], (0, 1)), gram))
        known, back = torch.bmm(torch.stack([column, right], dim=1), inverse.mT), times(row, inverse)
        overlap, corner, square = times(row, known.mT), column[:, k : k + 1], gram[:, k, k].unsqueeze(1)
        pivot = corner + self.ridge * square - overlap[:, :1]
        # But for type II, a small pivot makes gamma large, and a nonlinear map is unpredictable far away.
        least = _LEAST_PIVOT if of_dz else 8.0 * eps
        again = pivot.abs() <= least * (corner.abs() + overlap[:, :1].abs())
        if along.is_cuda or again.any():
            inverse, known = (part.masked_fill(again.unsqueeze(2), 0.0) for part in (inverse, known))
            back, overlap = back.masked_fill(again, 0.0), overlap.masked_fill(again, 0.0)
            pivot = torch.where(again, corner + self.ridge * square, pivot)
        # A problem that is done repeats its point. Its difference is zero, and gets the coefficient zero.
        usable = (square > noise * noise) & (pivot.abs() > eps * square)
        scale = torch.where(usable, pivot, torch.inf).reciprocal()
        new = torch.zeros_like(row)
        new[:, k] = 1.0
        left, back = known[:, 0] - new, back - new
        gamma = known[:, 1] - left * (scale * (right[:, k : k + 1] - overlap[:, 1:]))
        return gamma, _writable(inverse).addcmul_((left * scale).unsqueeze(2), back.unsqueeze(1))


def _padded(products: Tensor, like: Tensor) -> Tensor:
    return pad(products.to(torch.float64), (0, like.shape[1] - products.shape[1]))


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
