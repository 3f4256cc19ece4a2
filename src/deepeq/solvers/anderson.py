"""Anderson acceleration."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepeq.checks import check_count
from deepeq.norms import inner
from deepeq.solvers.base import Solver


class AndersonState(NamedTuple):
    """Differences of the last steps, oldest first."""

    fz: Tensor | None
    g: Tensor | None
    delta_f: tuple[Tensor, ...]
    delta_g: tuple[Tensor, ...]
    gram: Tensor  # (B, k, k) float64, inner products of delta_g


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration, type II, in difference form.

    With `g = f(z) - z` and the differences `dG`, `dF` of the last `history_size` steps, `gamma` minimizes
    `||g - dG gamma||`, and `z <- f(z) - dF gamma - damping (g - dG gamma)`. The normal equations are solved in
    float64 with columns scaled to one, and their matrix grows by one row per step. Two vectors per step are kept.

    Needs as few evaluations as `Broyden` at the loose tolerances of training; below about 1e-3 a short window needs
    more, and may stall on a hard sample.

    References:
        Walker and Ni (2011), Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49, alg. AA, eq.
        2.2.
    """

    history_size: int = 8
    """Most differences kept."""
    ridge: float = 1e-8
    """Tikhonov term, relative to the scaled matrix (whose diagonal is one)."""
    damping: float = 0.0
    """Fraction of the averaged residual that is held back; 0 means none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("history_size", self.history_size, least=1, owner=self)
        self._check_damping(self.damping)
        if not 0.0 < self.ridge < 1.0:
            raise ValueError(f"ridge={self.ridge!r} of Anderson must lie in (0, 1)")

    @property
    def num_stored(self) -> int:
        return 2 + 2 * min(self.history_size, max(0, self.max_steps - 1))

    def init(self, z0: Tensor) -> AndersonState:
        return AndersonState(None, None, (), (), z0.new_zeros((z0.shape[0], 0, 0), dtype=torch.float64))

    def advice(self, num_steps: int) -> str:
        if num_steps <= self.history_size:
            return ""
        return f"the window of history_size={self.history_size} of Anderson may be short: raise it, or try Broyden()"

    def step(self, z: Tensor, fz: Tensor, g: Tensor, state: AndersonState) -> tuple[Tensor, AndersonState]:
        if state.fz is None or state.g is None:
            return z + (1.0 - self.damping) * g, state._replace(fz=fz, g=g)
        start = 1 if len(state.delta_g) == self.history_size else 0
        delta_f = (*state.delta_f[start:], fz - state.fz)
        delta_g = (*state.delta_g[start:], g - state.g)
        gram = _append_row(state.gram[:, start:, start:], delta_g)
        gamma = self._least_squares(gram, _inner_all(delta_g, g)).to(z.dtype)  # (B, k)
        z_next = _subtract(fz, delta_f, gamma)
        if self.damping:
            z_next = z_next - self.damping * _subtract(g, delta_g, gamma)
        return z_next, AndersonState(fz, g, delta_f, delta_g, gram)

    def _least_squares(self, gram: Tensor, rhs: Tensor) -> Tensor:
        diagonal = gram.diagonal(dim1=1, dim2=2)
        # A sample that is done repeats its point: its differences are zero and get the coefficient zero.
        scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()  # (B, k)
        scaled = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
        scaled = scaled + self.ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return scale * torch.linalg.solve_ex(scaled, scale * rhs)[0]


def _append_row(gram: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
    row = _inner_all(vectors, vectors[-1])  # (B, k)
    upper = torch.cat([gram, row[:, :-1].unsqueeze(2)], dim=2)
    return torch.cat([upper, row.unsqueeze(1)], dim=1)  # (B, k, k)


def _inner_all(vectors: tuple[Tensor, ...], g: Tensor) -> Tensor:
    return torch.stack([inner(v, g) for v in vectors], dim=1).to(torch.float64)  # (B, k)


def _subtract(z: Tensor, vectors: tuple[Tensor, ...], coefficients: Tensor) -> Tensor:
    for vector, coefficient in zip(vectors, coefficients.unsqueeze(2).unbind(1), strict=True):
        z = torch.addcmul(z, vector, coefficient, value=-1)
    return z
