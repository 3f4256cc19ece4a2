"""GMRES for linear fixed points."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from deepeq.norms import inner, two_norm
from deepeq.solvers.base import Solver


class GMRESState(NamedTuple):
    """The Arnoldi relation `A Q_k = Q_{k+1} H`, and where the next product comes from.

    A sample that has to open its space anew does so while its batch mates go on: its older columns of `H` become zero.
    """

    basis: tuple[Tensor, ...]  # k + 1 vectors (B, N), orthonormal
    hessenberg: Tensor  # (B, k + 1, k) float64
    rhs: Tensor  # (B, k + 1) float64, the first residual in the basis
    overlap: Tensor  # (B, k + 1) float64, u_0 in the basis
    start: Tensor  # (B, N) u_0, where the space was opened
    residual: Tensor  # (B, N) r_0, the residual there
    distance: Tensor  # (B, 1) from u_0 to the evaluated point along the last basis vector; 0: a minimizer was evaluated
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class GMRES(Solver):
    """The point of smallest residual of an affine map `f(u) = M u + b` over the Krylov space of `A = I - M`.

    Made for the backward pass `u = J^T u + v`. It is the only solver here that needs `f` to be affine; on another map
    it does not converge, and says so. An evaluation at `u_0 + ||r_0|| q` gives the product `A q = (r_0 - g) /
    ||r_0||` that extends the space. Where the minimizer's residual is known to be small enough, and at the last step,
    the minimizer itself is evaluated, so that the residual that is reported is a measured one; the trace before it is
    that of the points `u_0 + ||r_0|| q`. The basis is built by Gram-Schmidt, applied twice; one vector a step is
    kept.

    References:
        Saad and Schultz (1986), SIAM J. Sci. Stat. Comput. 7, alg. 4.
    """

    rtol: float = 1e-5
    max_steps: int = 50
    restart: int = 50
    """Most basis vectors kept; the space is opened anew when they are used up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("restart", self.restart)

    @property
    def num_stored(self) -> int:
        return 2 + min(self.restart + 1, self.max_steps)

    def init(self, z0: Tensor) -> GMRESState:
        empty, zero = z0.new_zeros((z0.shape[0], 0), dtype=torch.float64), z0.new_zeros((z0.shape[0], 1))
        return GMRESState((), empty.unsqueeze(2), empty, empty, z0, z0, zero, 0)

    def step(self, z: Tensor, fz: Tensor, state: GMRESState) -> tuple[Tensor, GMRESState]:
        g = fz - z
        state = self._extend(z, g, state)
        y, rho = _least_squares(state.hessenberg, state.rhs)  # (B, k), (B, k + 1)
        u = _combine(state.start, state.basis[:-1], y.to(z.dtype))
        along = rho + pad(y, (0, 1))  # f(u) - u_0 in the basis
        square = two_norm(state.start).double().square() + (along * (2.0 * state.overlap + along)).sum(dim=1)
        tolerance = self.atol + self.rtol * square.clamp_min(0.0).sqrt()
        finished = torch.linalg.vector_norm(rho, dim=1) <= tolerance
        last = state.num_steps + 1 >= self.max_steps or len(state.basis) > self.restart
        at_minimizer = finished.unsqueeze(1) | (state.distance == 0) | last
        z_next = torch.where(at_minimizer, u, torch.addcmul(state.start, state.basis[-1], state.distance))
        if last:
            return z_next, self.init(z)._replace(num_steps=state.num_steps)
        return z_next, state._replace(distance=torch.where(at_minimizer, 0.0, state.distance))

    def _extend(self, z: Tensor, g: Tensor, state: GMRESState) -> GMRESState:
        """One more basis vector: the first of a space where a minimizer was evaluated, else the next one."""
        opening = state.distance == 0  # (B, 1)
        divisor = torch.where(opening, 1.0, state.distance)
        w = torch.where(opening, g, (state.residual - g) / divisor)  # r_0 or A q
        noise = 10 * torch.finfo(w.dtype).eps * (two_norm(z) + two_norm(g)).unsqueeze(1) / divisor
        column, w = _orthogonalize(w, state.basis, ~opening)
        norm = two_norm(w).unsqueeze(1)
        # What is left at rounding level is no new direction: the space is complete, and its minimizer comes next.
        norm = torch.where(opening | (norm > noise), norm, 0.0)
        q = w * torch.where(norm > 0, 1.0 / torch.where(norm > 0, norm, 1.0), 0.0)

        start, residual = torch.where(opening, z, state.start), torch.where(opening, g, state.residual)
        rhs = torch.cat([state.rhs.masked_fill(opening, 0.0), norm.masked_fill(~opening, 0.0)], dim=1)
        overlap = torch.cat([state.overlap, inner(start, q).unsqueeze(1)], dim=1)
        hessenberg = rhs.new_zeros((rhs.shape[0], 1, 0))
        if state.basis:
            column = torch.cat([column, norm], dim=1).masked_fill(opening, 0.0).unsqueeze(2)  # (B, k + 1, 1)
            older = state.hessenberg.masked_fill(opening.unsqueeze(2), 0.0)
            hessenberg = torch.cat([pad(older, (0, 0, 0, 1)), column], dim=2)
        distance = torch.where(norm > 0, two_norm(residual).unsqueeze(1), 0.0)
        basis = (*state.basis, q)
        return GMRESState(basis, hessenberg, rhs, overlap, start, residual, distance, state.num_steps + 1)


def _orthogonalize(w: Tensor, basis: tuple[Tensor, ...], wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Components of `w` along the basis, `(B, k)` float64, and what is left of `w`; zero for samples not `wanted`."""
    column = torch.zeros(w.shape[0], len(basis), dtype=torch.float64, device=w.device)
    for _ in range(2):  # once is not enough in finite precision
        components = []
        for q in basis:
            h = torch.where(wanted, inner(q, w).unsqueeze(1), 0.0)
            w = torch.addcmul(w, q, h, value=-1)
            components.append(h)
        column = column + torch.cat(components, dim=1) if components else column
    return column, w


def _least_squares(hessenberg: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Minimizer `y` of `||rhs - H y||`, and what is left of it.

    The normal equations are good enough: what is left is computed from `y` as it came out.
    """
    gram = hessenberg.mT @ hessenberg  # (B, k, k)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    # The unit stands for columns that are zero, whose coefficients it makes zero.
    ridge = torch.where(diagonal > 0, 1e-15 * diagonal, 1.0)
    y = torch.linalg.solve_ex(gram + torch.diag_embed(ridge), hessenberg.mT @ rhs.unsqueeze(2))[0]
    return y.squeeze(2), rhs - (hessenberg @ y).squeeze(2)


def _combine(start: Tensor, vectors: tuple[Tensor, ...], coefficients: Tensor) -> Tensor:
    for vector, coefficient in zip(vectors, coefficients.unsqueeze(2).unbind(1), strict=True):
        start = torch.addcmul(start, vector, coefficient)
    return start
