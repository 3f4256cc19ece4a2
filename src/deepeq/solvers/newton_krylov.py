"""Newton's method with products of the Jacobian, in a region of trust."""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from deepeq.checks import check_count
from deepeq.jacobian import JacobianProduct
from deepeq.norms import inner, two_norm
from deepeq.solvers.base import Map, Solver

_FREE_STEPS = 5
"""Steps taken without a test once the search stalls."""


class NewtonState(NamedTuple):
    """Where the last step came from, what it promised, and the Arnoldi relation `J V_k = V_{k+1} H` there."""

    z: Tensor  # (B, N)
    g: Tensor  # (B, N)
    norm: Tensor  # (B,) float64, ||g||
    inner_rtol: Tensor  # (B,) float64, what the inner solve has to reach
    radius: Tensor  # (B,) float64, most length of a step
    goal: Tensor  # (B,) float64, the norm that has to be reached
    steps_left: Tensor  # (B,) int64, evaluations until then
    stall_steps: Tensor  # (B,) int64, evaluations that are granted next
    free_steps: Tensor  # (B,) int64, steps still to be taken without a test
    basis: tuple[Tensor, ...] = ()  # k + 1 vectors (B, N), orthonormal, the first along g
    hessenberg: Tensor | None = None  # (B, k + 1, k) float64
    length: Tensor | None = None  # (B,) float64, of the last step s
    predicted: Tensor | None = None  # (B,) float64, ||g + J s||


@dataclass(frozen=True, kw_only=True)
class NewtonKrylov(Solver):
    """Inexact Newton steps from GMRES in a trust region.

    Each step minimizes `||g + J s||` over the Krylov space of `J` and `g` within `||s|| <= radius`. Where the radius
    is active, this is a step of Levenberg and Marquardt. A step is judged by the fraction of the promised reduction of
    `||g||^2` that it brings. If it brings none, or ends at a non-finite value, it is tried again with a smaller radius
    and no new product. If `||g||` is not halved within `stall_steps` evaluations, the solver takes five Newton steps
    without testing them, and doubles `stall_steps`. This leads out of narrow valleys and of some local minima of
    `||g||`.

    A step costs one evaluation, and after a step that was accepted up to `inner_steps` products, each as much as an
    evaluation. A product is a directional derivative in forward mode where the map allows it, else a difference. The
    search does not depend on the units or the sign of `g`. It is made for hard systems: on a map that `Broyden`
    solves, it needs about twice as many evaluations. How products are taken is decided for the whole batch, and small
    systems are solved together, so the answers of a problem agree with those alone to rounding, or to the tolerance.

    References:
        Brown and Saad (1990), SIAM J. Sci. Stat. Comput. 11, sec. 3 (a bounded model in the Krylov space). Eisenstat
        and Walker (1996), SIAM J. Sci. Comput. 17, choice 2 (the accuracy of the inner solve). More (1978), Lecture
        Notes in Mathematics 630 (the bound).
    """

    rtol: float = 1e-6
    max_steps: int = 100
    inner_steps: int = 40
    """Most products for a step."""
    inner_rtol: float = 0.1
    """Largest `||g + J s|| / ||g||` at which the inner solve stops; it becomes smaller as the search converges."""
    stall_steps: int = 10
    """Evaluations within which `||g||` has to be halved."""
    backtracks: int = 30
    """Most consecutive non-finite evaluations that a problem backs off from."""
    _jacobian: ClassVar[JacobianProduct | None] = None  # a bound rule has its own; no field, as it is no setting

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("inner_steps", self.inner_steps, least=1, owner=self)
        check_count("stall_steps", self.stall_steps, least=1, owner=self)
        check_count("backtracks", self.backtracks, least=0, owner=self)
        if not 0.0 < self.inner_rtol < 1.0:
            raise ValueError(f"inner_rtol={self.inner_rtol!r} of NewtonKrylov must lie in (0, 1)")

    @property
    def num_stored(self) -> int:
        return self.inner_steps + 3

    @property
    def nonfinite_patience(self) -> int:
        return self.backtracks

    def advice(self, num_steps: int) -> str:
        if num_steps <= 4 * self.stall_steps:
            return ""
        return "the search may be at a local minimum of ||g(z)||: start elsewhere, or check that there is a root"

    @property
    def differentiable(self) -> bool:
        return False  # singular values and products with the Jacobian have no stable derivative

    @property
    def independent_rows(self) -> bool:
        return False  # products with the Jacobian are those of all problems

    def bind(self, g: Map) -> Self:
        bound = replace(self)
        object.__setattr__(bound, "_jacobian", JacobianProduct(g))
        return bound

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, g: Tensor, state: NewtonState | None) -> tuple[Tensor, NewtonState]:
        state, accepted = self._first(z, g) if state is None else self._judge(z, g, state)
        if state.hessenberg is None or bool(accepted.any()):
            if self._jacobian is None:
                raise RuntimeError("NewtonKrylov needs products with the Jacobian; bind it to a map with bind(g) first")
            product, most = self._jacobian.at(state.z, state.g), min(self.inner_steps, z.shape[1])
            # A problem that was rejected gets its old space again, and one that rests none.
            inner_rtol = torch.where(accepted | (z != state.z).any(dim=1), state.inner_rtol, 1.0)
            basis, hessenberg = _arnoldi(product, state.g, most, inner_rtol)
            state = state._replace(basis=basis, hessenberg=hessenberg)
        assert state.hessenberg is not None
        y = _bounded_least_squares(state.hessenberg, state.norm, state.radius, torch.finfo(z.dtype).eps)  # (B, k)
        z_next = state.z
        for v, coefficient in zip(state.basis[:-1], y.to(z.dtype).unsqueeze(2).unbind(1), strict=True):
            z_next = torch.addcmul(z_next, v, coefficient)
        z_next = torch.where(z_next.isfinite().all(dim=1, keepdim=True), z_next, state.z)
        model = (state.hessenberg @ y.unsqueeze(2)).squeeze(2)
        model = torch.cat([model[:, :1] + state.norm.unsqueeze(1), model[:, 1:]], dim=1)
        length, predicted = torch.linalg.vector_norm(y, dim=1), torch.linalg.vector_norm(model, dim=1)
        return z_next, state._replace(length=length, predicted=predicted)

    def _first(self, z: Tensor, g: Tensor) -> tuple[NewtonState, Tensor]:
        norm = two_norm(g).double()
        inner_rtol, radius = torch.full_like(norm, self.inner_rtol), torch.full_like(norm, _most(z))
        stall_steps = torch.full_like(norm, self.stall_steps, dtype=torch.int64)
        none = torch.zeros_like(stall_steps)
        state = NewtonState(z, g, norm, inner_rtol, radius, 0.5 * norm, stall_steps, stall_steps, none)
        return state, torch.ones_like(norm, dtype=torch.bool)

    def _judge(self, z: Tensor, g: Tensor, state: NewtonState) -> tuple[NewtonState, Tensor]:
        """Return the state after the trial point `z`, and which problems go on from there."""
        assert state.length is not None
        assert state.predicted is not None
        norm, tiny = two_norm(g).double(), torch.finfo(torch.float64).tiny
        finite = torch.isfinite(norm)
        relative = torch.where(finite, norm, torch.inf) / state.norm
        change = relative.square() - 1.0
        promised = (1.0 - (state.predicted / state.norm).square()).clamp_min(tiny)
        achieved = -change / promised
        # A problem that is done stays where it is, and shall not cost the others products.
        accepted = finite & ((achieved > 1e-4) | (state.free_steps > 0)) & (z != state.z).any(dim=1)

        # The minimizer of a parabola that falls as the model does at first and has the measured change at the end.
        shrunk = torch.where(finite, 0.5 / (1.0 + change / promised), 0.0).clamp(0.1, 0.5) * state.length
        radius = torch.where(achieved < 0.25, shrunk, state.radius)
        radius = torch.where(achieved > 0.75, torch.maximum(radius, 2.0 * state.length), radius)

        norm = torch.where(accepted, norm, state.norm)
        reached, late = norm <= state.goal, state.steps_left <= 1
        stalled, renewed = late & ~reached, late | reached
        stall_steps = torch.where(stalled, 2 * state.stall_steps, state.stall_steps).clamp_max(2**30)
        free_steps = torch.where(stalled, _FREE_STEPS, (state.free_steps - 1).clamp_min(0))
        column = accepted.unsqueeze(1)
        inner_rtol = (0.9 * relative.square()).clamp(1e-4, self.inner_rtol)
        return NewtonState(
            z=torch.where(column, z, state.z),
            g=torch.where(column, g, state.g),
            norm=norm,
            inner_rtol=torch.where(accepted, inner_rtol, state.inner_rtol),
            radius=torch.where(finite & (free_steps > 0), _most(z), radius),
            goal=torch.where(renewed, 0.5 * norm, state.goal),
            steps_left=torch.where(renewed, stall_steps, state.steps_left - 1),
            stall_steps=stall_steps,
            free_steps=free_steps,
            basis=state.basis,
            hessenberg=state.hessenberg,
        ), accepted


def _most(z: Tensor) -> float:
    """Return a length whose square is finite."""
    return 0.1 * torch.finfo(z.dtype).max ** 0.5


def _arnoldi(product: Map, g: Tensor, most: int, rtol: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return an orthonormal basis that starts with `g`, and `H`.

    Each problem has as many vectors as it takes to reduce its residual to `rtol ||g||`; zeros follow them.
    """
    eps = torch.finfo(g.dtype).eps
    norm = two_norm(g).unsqueeze(1)
    active = (rtol.unsqueeze(1) < 1.0) & (norm > 0)  # (B, 1)
    basis, columns = [torch.where(active, g / torch.where(norm > 0, norm, 1.0), 0.0)], []
    # With u H = 0 and u_0 = 1, the smallest residual in the space is ||g|| / ||u||.
    u = g.new_ones((g.shape[0], 1), dtype=torch.float64)
    while len(columns) < most and (not columns or bool(active.any())):
        w = product(basis[-1]).nan_to_num(0.0, 0.0, 0.0)
        size = two_norm(w).unsqueeze(1)
        column, w = _orthogonalize(w, basis)
        height = two_norm(w).unsqueeze(1)
        # What is left at rounding level is no direction: the space is invariant. If J is singular there, the solution
        # may lie outside, and the search continues in a meaningless direction.
        complete = height <= 10 * eps * size
        height = torch.where(complete, 0.0, height).double()
        if bool((complete & active).any()):
            w = torch.where(complete, _another_direction(basis), w / torch.where(complete, 1.0, height).to(w.dtype))
        else:
            w = w / torch.where(complete, 1.0, height).to(w.dtype)
        overlap = (u * column).sum(dim=1, keepdim=True)
        solved = torch.where(overlap.abs() > 10 * eps * size, torch.inf, 0.0)
        following = torch.where(complete, solved, -overlap / torch.where(complete, 1.0, height))
        columns.append(torch.cat([column, height], dim=1))
        u = torch.cat([u, torch.where(active, following, 0.0)], dim=1)
        active = active & (rtol * torch.linalg.vector_norm(u, dim=1) < 1.0).unsqueeze(1)
        basis.append(torch.where(active, w, 0.0))
    k = len(columns)
    padded = [torch.nn.functional.pad(column, (0, k + 1 - column.shape[1])) for column in columns]
    return tuple(basis), torch.stack(padded, dim=2).nan_to_num(0.0, 0.0, 0.0)


def _another_direction(basis: list[Tensor]) -> Tensor:
    """Return a unit vector that is orthogonal to the basis, or zero where the basis is complete."""
    first, eps = basis[0], torch.finfo(basis[0].dtype).eps
    wave = torch.arange(1, first.shape[1] + 1, dtype=first.dtype, device=first.device).mul(len(basis)).cos()
    _, w = _orthogonalize(wave.expand_as(first), basis)
    length = two_norm(w).unsqueeze(1)
    return w * torch.where(length > 100 * eps, 1.0 / length, 0.0)


def _orthogonalize(w: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the components of `w` along the basis, `(B, k)` float64, and what is left of `w`."""
    column = torch.zeros(w.shape[0], len(basis), dtype=torch.float64, device=w.device)
    for _ in range(2):  # once is not enough in finite precision
        components = []
        for v in basis:
            h = inner(v, w).unsqueeze(1)
            w = torch.addcmul(w, v, h, value=-1)
            components.append(h)
        column = column + torch.cat(components, dim=1)
    return column, w


def _bounded_least_squares(hessenberg: Tensor, norm: Tensor, radius: Tensor, eps: float) -> Tensor:
    """Return the `y` of length at most `radius` that minimizes `||norm e_1 + H y||`, `(B, k)`."""
    u, s, vh = torch.linalg.svd(hessenberg, full_matrices=False)
    c, square, radius, tiny = (
        -s * u[:, 0] * norm.unsqueeze(1),
        s.square(),
        radius.unsqueeze(1),
        torch.finfo(s.dtype).tiny,
    )
    floor = (eps * s[:, :1]).square() + tiny
    regularization = floor
    for _ in range(10):  # Newton's method for 1 / ||y|| = 1 / radius, monotone from the left
        y = c / (square + regularization)
        length = torch.linalg.vector_norm(y, dim=1, keepdim=True)
        slope = (y.square() / (square + regularization)).sum(dim=1, keepdim=True).clamp_min(tiny)
        change = (length / radius - 1.0) * length.square() / slope
        regularization = torch.maximum(regularization + change.nan_to_num(0.0), floor)
    y = c / (square + regularization)
    length = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    y = y * (radius / length.clamp_min(tiny)).clamp_max(1.0)
    return (vh.mT @ y.unsqueeze(2)).squeeze(2).nan_to_num(0.0, 0.0, 0.0)
