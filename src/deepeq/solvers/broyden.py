"""Broyden's method with one stored vector per step."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepeq.checks import check_count
from deepeq.norms import inner, two_norm
from deepeq.solvers.base import Solver


class BroydenState(NamedTuple):
    """The directions `d_0 ... d_n` since the last restart; the last one's step is still to be judged."""

    directions: tuple[Tensor, ...]
    lengths: tuple[Tensor, ...]  # (B, 1) each: the step taken was length * direction
    weights: tuple[Tensor, ...]  # (B, 1) each: 1 / ||d||^2, or 0 where a sample skips this update
    residual: Tensor | None  # (B,) ||g|| at the point that the last step started from
    halvings: Tensor | None  # (B,) halvings of the last step so far


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's good method on `g(z) = f(z) - z`, with `B0 = -I` (Bai et al. 2019, eq. 6 and 10).

    With `d = -B g` and `z <- z + a d`, Sherman-Morrison turns the update into a factor of the inverse,
    `B_{j+1} = (I + v_j d_j^T) B_j` with `v_j = (d_{j+1} + (a_j - 1) d_j) / ||d_j||^2`, so that the directions alone
    rebuild `B`: one vector per step instead of two. When `history_size` of them are stored the method starts again from
    `B0`: dropping only the oldest factor would break the secant equations of all later ones.

    Differs from the paper's code in that a sample whose update would divide by nearly zero skips it.

    References:
        Broyden (1965), Math. Comp. 19, p. 577. Kelley (1995), Iterative methods for linear and nonlinear equations,
        SIAM, sec. 7.3 (the one-vector recursion).
    """

    history_size: int = 100
    """Most directions kept; the method restarts when they are used up."""
    damping: float = 0.0
    """`1 - a`, where `a` is the step length of eq. 6; 0 means full steps."""
    line_search_steps: int = 0
    """Most halvings of a step that does not lower the residual of its problem, one evaluation each; 0 turns it off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("history_size", self.history_size, least=1, owner=self)
        self._check_damping(self.damping)
        check_count("line_search_steps", self.line_search_steps, least=0, owner=self)

    @property
    def num_stored(self) -> int:
        return min(self.history_size, self.max_steps)

    @property
    def nonfinite_patience(self) -> int:
        return self.line_search_steps

    def advice(self, num_steps: int) -> str:
        if num_steps <= self.history_size:
            return ""
        return f"Broyden started again after every history_size={self.history_size} steps: raise it"

    def init(self, z0: Tensor) -> BroydenState:
        return BroydenState((), (), (), None, None)

    def step(self, z: Tensor, fz: Tensor, g: Tensor, state: BroydenState) -> tuple[Tensor, BroydenState]:
        if not state.directions or len(state.directions) == self.history_size:
            return self._start(z, g, state)
        direction, weight = self._update(g, state)
        length = torch.full_like(weight, 1.0 - self.damping)
        z_next = z + length * direction
        residual, halvings = state.residual, state.halvings
        if self.line_search_steps and residual is not None and halvings is not None:
            norm, last, last_length = two_norm(g), state.directions[-1], state.lengths[-1]
            rejected = (norm > residual) & (halvings < self.line_search_steps) | ~torch.isfinite(norm)
            column = rejected.unsqueeze(1)
            # A rejected step is taken back in part: the point it started from is z - last_length * last.
            direction, weight = torch.where(column, last, direction), torch.where(column, 0.0, weight)
            length = torch.where(column, 0.5 * last_length, length)
            z_next = torch.where(column, z - 0.5 * last_length * last, z_next)
            residual = torch.where(rejected, residual, norm)
            halvings = torch.where(rejected, halvings + 1, 0)
        return z_next, BroydenState(
            (*state.directions, direction),
            (*state.lengths, length),
            (*state.weights, weight),
            residual,
            halvings,
        )

    def _start(self, z: Tensor, g: Tensor, state: BroydenState) -> tuple[Tensor, BroydenState]:
        """Return the first step from `B0`."""
        direction, length = g, g.new_full((g.shape[0], 1), 1.0 - self.damping)
        z_next = z + length * direction
        if not self.line_search_steps:
            return z_next, BroydenState((direction,), (length,), (), None, None)
        norm = two_norm(g)
        if state.directions:
            # Where g is not finite, the problem first returns to the point before, which counts as no direction.
            lost = ~torch.isfinite(norm)
            column, last = lost.unsqueeze(1), state.lengths[-1] * state.directions[-1]
            z_next, direction = torch.where(column, z - last, z_next), torch.where(column, 0.0, direction)
            norm = torch.where(lost, torch.inf, norm)
        return z_next, BroydenState((direction,), (length,), (), norm, torch.zeros_like(norm, dtype=torch.int64))

    def _update(self, g: Tensor, state: BroydenState) -> tuple[Tensor, Tensor]:
        """Return the new direction, and the weight of the factor that the last step gives."""
        w = g
        for j, weight in enumerate(state.weights):
            d, d_next = state.directions[j], state.directions[j + 1]
            c = weight * inner(d, w).unsqueeze(1)  # (B, 1)
            w = torch.addcmul(w, d_next, c)
            if self.damping or self.line_search_steps:
                w = torch.addcmul(w, d, c * (state.lengths[j] - 1.0))
        d, length = state.directions[-1], state.lengths[-1]
        square = inner(d, d).unsqueeze(1)
        usable = square > torch.finfo(square.dtype).tiny
        weight = 1.0 / torch.where(usable, square, 1.0)
        c = inner(d, w).unsqueeze(1) * weight
        usable = usable & torch.isfinite(c) & ((1.0 - c).abs() > 1e-4)
        c = torch.where(usable, c, 0.0)
        direction = torch.addcmul(w, d, c * (length - 1.0)) / (1.0 - c)
        return direction, torch.where(usable, weight, 0.0)
