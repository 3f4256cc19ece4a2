"""GMRES for affine fixed points."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from deepeq.checks import check_count
from deepeq.norms import two_norm
from deepeq.solvers.base import Solver
from deepeq.solvers.basis import FAST, Basis, times


class GMRESState(NamedTuple):
    """The Arnoldi relation `A Q_k = Q_{k+1} H`, with `H` as its QR factorization by rotations.

    With `m` the vector that `H` leaves out, `m^T H = 0` and `m_0 = 1`, row `j` of the product of the rotations is
    `(c_j m_0, ..., c_j m_j, s_j, 0, ...)`, where `c_j` is the cosine of rotation `j` over `||(m_0, ..., m_j)||`, and
    `s_j` its sine. A cumulative sum therefore applies all rotations at once.

    Each problem restarts on its own while its batch mates go on: its entries for older vectors become zero.
    """

    start: Tensor  # (B, N), u_0, where the space was opened
    residual: Tensor  # (B, N), r_0 = g(u_0)
    start_norm: Tensor  # (B, 1)
    noise: Tensor  # (B, 1), rounding errors in products that come from the size of the points
    distance: Tensor  # (B, 1), ||r_0||, or 1 where it is 0: from u_0 to the point that gives the next product
    basis: Basis  # k vectors
    inverse: Tensor  # (B, k or more, the same), row j is column j of the inverse of the triangular factor
    missed: Tensor  # (B, k), m
    missed_norm: Tensor  # (B, 1)
    cosines: Tensor  # (B, k - 1), c
    sines: Tensor  # (B, k - 1), s
    minimizer: Tensor  # (B, k - 1), u - u_0 in the basis
    left: Tensor  # (B, 1), ||g(u)||
    opens: Tensor | None  # (B, 1), which problems evaluated a minimizer, and open a new space there; None: none
    strictness: Tensor  # (B, 1), factor of the tolerance: smaller after a minimizer that was not good enough
    older: Tensor | None  # (B, 1), number of vectors from before the space of the problem; None: none
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class GMRES(Solver):
    """The point of smallest residual of an affine map `f(u) = M u + b` over the Krylov space of `A = I - M`.

    Made for the backward pass `u = J^T u + v`. It needs `f` to be affine; on another map it does not converge, and the
    solve misses its tolerance. An evaluation at `u_0 + ||r_0|| q` gives the product `A q = (r_0 - g) / ||r_0||` that
    extends the space.
    Where the minimizer's residual is known to be small enough, and at the last step, the minimizer itself is
    evaluated, so that the residual that is reported is a measured one; the trace before it is that of the points
    `u_0 + ||r_0|| q`. The basis is built by Gram-Schmidt, applied twice; one vector per step is kept.

    References:
        Saad and Schultz (1986), SIAM J. Sci. Stat. Comput. 7, alg. 4.
    """

    rtol: float = 1e-5
    max_steps: int = 50
    restart: int = 50
    """Largest number of basis vectors; the method restarts when they are used up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("restart", self.restart, least=1, owner=self)

    @property
    def num_stored(self) -> int:
        return 2 + self._capacity

    @property
    def _capacity(self) -> int:
        return min(self.restart, max(1, self.max_steps - 2))

    def init(self, z0: Tensor) -> GMRESState:
        scalar = z0.new_zeros((z0.shape[0], 1))
        none = scalar[:, :0]
        return GMRESState(
            start=z0,
            residual=z0,
            start_norm=scalar,
            noise=scalar,
            distance=scalar,
            basis=Basis(),
            inverse=none.unsqueeze(2),
            missed=none,
            missed_norm=scalar,
            cosines=none,
            sines=none,
            minimizer=none,
            left=scalar,
            opens=None,
            strictness=scalar + 1.0,
            older=None,
            num_steps=0,
        )

    def step(self, z: Tensor, fz: Tensor, g: Tensor, state: GMRESState) -> tuple[Tensor, GMRESState]:
        state = state._replace(num_steps=state.num_steps + 1)
        if not state.basis.size:
            return z + g, self._open(z, g, state)
        w = (state.residual - g) / state.distance  # A q
        if state.opens is not None:
            opens = state.opens
            # The loop measures each part of a state, and asked for more than the whole norm promises.
            strictness = torch.where(opens, 0.1 * state.strictness, state.strictness)
            state = state._replace(strictness=strictness.clamp_min(torch.finfo(g.dtype).eps))
            w, state = torch.where(opens, g, w), _reopen(opens, z, g, state)
        components, w = _orthogonalize(w, state)
        norm, complete, state = _factorize(components, _norm(w), state)
        if state.num_steps + 1 >= self.max_steps or state.basis.size == self.restart:
            u = state.basis.add(state.start, state.minimizer)
            return u, self.init(z)._replace(num_steps=state.num_steps, strictness=state.strictness)

        q = w / norm
        state = state._replace(basis=state.basis.append(q, self._capacity), opens=None)
        z_next = torch.addcmul(state.start, q, state.distance)
        # Below the rounding errors of the first residual, more vectors are of no use, whatever the tolerance.
        exhausted = complete | (state.left <= torch.finfo(g.dtype).eps * state.distance)
        # A GPU would have to wait for a look at the numbers, so there everything is computed whether needed or not.
        look = not z.is_cuda
        if look and not (exhausted | self._may_be_reached(state)).any():
            return z_next, state
        opens = exhausted | self._reached(state)
        if look and not opens.any():
            return z_next, state
        u = state.basis.add(state.start, pad(state.minimizer, (0, 1)))
        older = torch.zeros_like(opens, dtype=torch.int64) if state.older is None else state.older
        return torch.where(opens, u, z_next), state._replace(opens=opens, older=older)

    def _open(self, z: Tensor, g: Tensor, state: GMRESState) -> GMRESState:
        norm, start_norm = _norm(g), _norm(z)
        distance, one = norm + (norm == 0), torch.ones_like(norm)
        q = g / distance
        return state._replace(
            start=z,
            residual=g,
            start_norm=start_norm,
            noise=_noise_level(g) * (2.0 + start_norm / distance),
            distance=distance,
            basis=state.basis.append(q, self._capacity),
            missed=one,
            missed_norm=one,
            left=norm,
        )

    @torch.no_grad()
    def _may_be_reached(self, state: GMRESState) -> Tensor:
        """Return whether the minimizer `u` would be within the tolerance if `||f(u)||` were at its upper bound."""
        size = state.start_norm + _norm(state.minimizer) + state.left
        return state.left <= state.strictness * (self.atol + self.rtol * size)

    @torch.no_grad()
    def _reached(self, state: GMRESState) -> Tensor:
        """Return whether the minimizer `u` is within the tolerance, `(B, 1)`."""
        along = state.missed * (state.left / state.missed_norm)  # f(u) - u_0 in the basis
        along[:, :-1] += state.minimizer
        overlap = state.basis.inner(state.start)
        change = (along * torch.add(along, overlap, alpha=2)).sum(dim=1, keepdim=True)
        size = torch.addcmul(change, state.start_norm, state.start_norm).sqrt()  # ||f(u)||, or NaN for zero to rounding
        return state.left <= state.strictness * (self.atol + self.rtol * size)


def _norm(w: Tensor) -> Tensor:
    return two_norm(w).unsqueeze(1)


def _noise_level(w: Tensor) -> float:
    return 10 * torch.finfo(w.dtype).eps


def _reopen(opens: Tensor, z: Tensor, g: Tensor, state: GMRESState) -> GMRESState:
    """Forget the space of the problems that open a new one at `z`."""
    assert state.older is not None
    norm, start_norm = _norm(g), torch.where(opens, _norm(z), state.start_norm)
    distance = torch.where(opens, norm + (norm == 0), state.distance)
    return state._replace(
        start=torch.where(opens, z, state.start),
        residual=torch.where(opens, g, state.residual),
        start_norm=start_norm,
        noise=_noise_level(g) * (2.0 + start_norm / distance),
        distance=distance,
        missed=state.missed.masked_fill(opens, 0.0),
        cosines=state.cosines.masked_fill(opens, 0.0),
        sines=state.sines.masked_fill(opens, 0.0),
        minimizer=state.minimizer.masked_fill(opens, 0.0),
        older=state.older.masked_fill(opens, state.basis.size),
    )


def _orthogonalize(w: Tensor, state: GMRESState) -> tuple[Tensor, Tensor]:
    """Return the components of `w` in the space of its problem, `(B, k)`, and what is left of `w`."""
    outside = None
    if state.older is not None:
        outside = torch.arange(state.basis.size, device=w.device) < state.older
    total = None
    for _ in range(2):  # once is not enough in finite precision
        components = state.basis.inner(w)
        if outside is not None:
            components = components.masked_fill(outside, 0.0)
        w = state.basis.add(w, components, sign=-1)
        total = components if total is None else total + components
    assert total is not None
    return total, w


def _factorize(components: Tensor, norm: Tensor, state: GMRESState) -> tuple[Tensor, Tensor, GMRESState]:
    """Take a column of `H` into its factorization, and return its last entry, and whether the space is complete.

    What is left of `A q` at rounding level is no new direction: the space is complete, and its minimizer comes next.
    The last entry is then returned as infinity.
    """
    sums = (state.missed * components).cumsum(dim=1)
    rotated = torch.addcmul(state.cosines * sums[:, :-1], state.sines, components[:, 1:])
    last = sums[:, -1:] / state.missed_norm
    noise = torch.add(state.noise, torch.hypot(_norm(components), norm), alpha=_noise_level(norm))
    complete = norm <= (noise if state.opens is None else noise.masked_fill(state.opens, 0.0))
    # A number below any noise stands for zero, where `hypot` has no gradient. If there is nothing to divide by, the
    # column adds nothing, and is left out.
    height = norm.masked_fill(complete, torch.finfo(norm.dtype).eps ** 2)
    radius = torch.hypot(last, height)
    radius = radius.masked_fill(radius <= noise, torch.inf)
    cosine, sine = last / radius, height / radius

    done, inverse = rotated.shape[1], state.inverse
    # More zeros make a small product a fast one.
    read = done if done < 8 else max(done, min(inverse.shape[1], math.isqrt(FAST)))
    product = times(pad(rotated, (0, read - done)), inverse[:, :read, :read])[:, :done]
    if inverse.shape[1] == done:
        room = 1 if torch.is_grad_enabled() else max(8, 24 - done)
        inverse = pad(inverse, (0, room, 0, room))
    column = torch.cat([-product, torch.ones_like(radius)], dim=1) / radius
    inverse[:, done, : done + 1] = column

    divisor = norm.masked_fill(complete, torch.inf)
    step = column * (cosine * state.left)
    entry, left = -last * state.missed_norm / divisor, sine * state.left
    missed_norm = torch.hypot(state.missed_norm, entry)
    cosine = cosine / state.missed_norm
    if state.opens is not None:
        entry, missed_norm = entry.masked_fill(state.opens, 1.0), missed_norm.masked_fill(state.opens, 1.0)
        left, sine = torch.where(state.opens, norm, left), sine.masked_fill(state.opens, 0.0)
    return (
        divisor,
        complete,
        state._replace(
            inverse=inverse,
            missed=torch.cat([state.missed, entry], dim=1),
            missed_norm=missed_norm,
            cosines=torch.cat([state.cosines, cosine], dim=1),
            sines=torch.cat([state.sines, sine], dim=1),
            minimizer=torch.cat([state.minimizer + step[:, :-1], step[:, -1:]], dim=1),
            left=left,
        ),
    )
