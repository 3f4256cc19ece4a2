"""A reasoner with a high and a low latent, carried from segment to segment and started again from several points."""

import pytest
import torch
from torch import Tensor, nn

from deepeq import DEQ, GMRES, Anderson, Broyden, FixedPointIteration, ImplicitAdjoint, PhantomAdjoint, Result, Unrolled
from tests.clients import dense

State = tuple[Tensor, Tensor]
POSITIONS, WIDTH = 4, 3
EXACT = Broyden(rtol=1e-12, max_steps=200, history_size=200)


class Reasoner(nn.Module):
    """Two updates of the low latent, one of the high one, each a damped mix over positions and channels.

    States are pairs of `(..., positions, width)`. Returns a list, as hand-written code often does.
    """

    def __init__(self, gain: float, damping: float = 0.05, low_steps: int = 2) -> None:
        super().__init__()
        self.damping, self.low_steps = damping, low_steps
        for name in ("low", "high"):
            positions = torch.linalg.qr(torch.randn(POSITIONS, POSITIONS, dtype=torch.float64))[0]
            channels = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0]
            setattr(self, f"{name}_positions", nn.Parameter(gain * positions))
            setattr(self, f"{name}_channels", nn.Parameter(channels))

    def mix(self, name: str, y: Tensor) -> Tensor:
        return torch.tanh(getattr(self, f"{name}_positions") @ y @ getattr(self, f"{name}_channels"))

    def forward(self, z: State, x: Tensor) -> list[Tensor]:
        high, low = z
        for _ in range(self.low_steps):
            low = self.mix("low", low + high + x).lerp(low, self.damping)
        return [self.mix("high", high + low).lerp(high, self.damping), low]


@pytest.fixture
def reasoner() -> Reasoner:
    """A contraction: each puzzle has one equilibrium."""
    return Reasoner(gain=0.45)


def random_state(*leading: int) -> State:
    high, low = torch.randn(2, *leading, POSITIONS, WIDTH, dtype=torch.float64)
    return high, low


def puzzles(count: int) -> Tensor:
    return torch.randn(count, POSITIONS, WIDTH, dtype=torch.float64)


def loss_of(z: State) -> Tensor:
    weights = torch.linspace(-1.0, 1.0, WIDTH, dtype=torch.float64)
    return (z[0] @ weights).square().sum() + (z[1] @ weights).sum()


def residuals(cell: Reasoner, z: State, x: Tensor) -> Tensor:
    """The relative residual of each problem, of the worse latent."""
    with torch.no_grad():
        fz = cell(z, x)
    parts = [
        (new - old).flatten(-2).norm(dim=-1) / new.flatten(-2).norm(dim=-1) for new, old in zip(fz, z, strict=True)
    ]
    return torch.stack(parts).amax(dim=0)


def test_all_restarts_of_a_contraction_find_the_dense_equilibrium_and_its_gradient(reasoner):
    x = puzzles(2)
    layer = DEQ(reasoner, solver=EXACT, adjoint=ImplicitAdjoint(solver=GMRES(rtol=1e-13)), batch_dims=2)
    solution = layer(x.unsqueeze(1).expand(2, 3, -1, -1), z0=random_state(2, 3))
    assert solution.result is Result.CONVERGED
    assert type(solution.value) is tuple
    assert solution.relative_residual.shape == solution.converged.shape == (2, 3)
    expected = dense.equilibrium(lambda z: tuple(reasoner(z, x)), random_state(2))
    wanted = list(reasoner.parameters())
    gradient = dense.gradients(lambda z: tuple(reasoner(z, x)), expected, loss_of, wanted)
    for restart in range(3):
        state = tuple(part[:, restart] for part in solution.value)
        for a, b in zip(state, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
        for a, b in zip(torch.autograd.grad(loss_of(state), wanted, retain_graph=True), gradient, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def segments_by_hand(
    cell: Reasoner, x: Tensor, z: State, fresh: State, masks: list[Tensor], prefix: int, tail: int
) -> list[tuple[State, tuple[Tensor, ...]]]:
    """Segments of `prefix` steps without a gradient and `tail` steps with one; rows in the mask start again."""
    wanted, history = list(cell.parameters()), []
    for mask in masks:
        z = tuple(torch.where(mask.reshape(-1, 1, 1), new, old.detach()) for new, old in zip(fresh, z, strict=True))
        with torch.no_grad():
            for _ in range(prefix):
                z = cell(z, x)
        for _ in range(tail):
            z = cell(z, x)
        history.append((tuple(part.detach() for part in z), torch.autograd.grad(loss_of(z), wanted)))
    return history


@pytest.mark.parametrize(("prefix", "tail"), [(3, 1), (2, 3), (0, 2)])
@pytest.mark.parametrize("kind", ["phantom", "unrolled"])
def test_segments_with_a_carried_state_are_those_of_a_hand_written_loop(reasoner, prefix, tail, kind):
    x, z, fresh = puzzles(5), random_state(5), random_state(5)
    masks = [torch.tensor(rows) for rows in ([True] * 5, [False] * 5, [True, False, True, False, False])]
    expected = segments_by_hand(reasoner, x, z, fresh, masks, prefix, tail)
    if kind == "unrolled":
        layer, options = Unrolled(reasoner, tail, no_grad_depth=prefix), {}
    else:
        layer = DEQ(reasoner)
        steps = FixedPointIteration(rtol=1e-14, max_steps=prefix)
        options = {"solver": steps, "adjoint": PhantomAdjoint(steps=tail, returns="last")}
    wanted = list(reasoner.parameters())
    for mask, (state, gradient) in zip(masks, expected, strict=True):
        z = tuple(torch.where(mask.reshape(-1, 1, 1), new, old) for new, old in zip(fresh, z, strict=True))
        solution = layer(x, z0=z, **options)
        with torch.no_grad():
            evaluation = layer(x, z0=z, **options).value
        assert solution.result is Result.MAX_STEPS
        assert not solution.converged.any()
        for a, b, c in zip(solution.value, state, evaluation, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(c, b, rtol=1e-12, atol=1e-13)
        for a, b in zip(torch.autograd.grad(loss_of(solution.value), wanted), gradient, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        z = tuple(part.detach() for part in solution.value) if kind == "unrolled" else solution.value


def test_damped_steps_of_the_library_are_the_damping_that_a_cell_has_inside(reasoner):
    outer = Reasoner(gain=0.45, damping=0.0, low_steps=1)
    x, z = puzzles(3), random_state(3)
    solver = FixedPointIteration(rtol=1e-14, max_steps=4, damping=0.3)
    adjoint = PhantomAdjoint(steps=2, damping=0.3, returns="last")
    solution = DEQ(outer, solver=solver, adjoint=adjoint, on_failure="ignore")(x, z0=z)
    for step in range(6):
        with torch.set_grad_enabled(step >= 4):
            z = [0.3 * old + 0.7 * new for old, new in zip(z, outer(z, x), strict=True)]
    for a, b in zip(solution.value, z, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    wanted = list(outer.parameters())
    actual, expected = (torch.autograd.grad(loss_of(state), wanted) for state in (solution.value, z))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", [FixedPointIteration(max_steps=25), Anderson(max_steps=25), Broyden(max_steps=25)])
def test_the_residual_of_each_restart_is_that_of_the_state_that_is_returned(solver):
    cell = Reasoner(gain=1.4)  # no contraction: where a search ends depends on where it starts
    x = puzzles(4).unsqueeze(1).expand(4, 6, -1, -1)
    with torch.no_grad():
        solution = DEQ(cell, solver=solver, batch_dims=2, on_failure="ignore")(x, z0=random_state(4, 6))
    measured = residuals(cell, solution.value, x)
    torch.testing.assert_close(solution.relative_residual, measured, rtol=1e-6, atol=1e-12)
    assert torch.equal(solution.converged, measured <= solver.rtol)
    assert not solution.converged.all()


@pytest.mark.parametrize("solver", [FixedPointIteration(max_steps=3), Anderson(max_steps=3), Broyden(max_steps=3)])
def test_the_restart_of_least_residual_is_nearest_to_the_equilibrium(reasoner, solver):
    x, restarts = puzzles(4), 6
    exact = dense.equilibrium(lambda z: tuple(reasoner(z, x)), random_state(4))
    quality = torch.stack([torch.randperm(restarts) for _ in range(4)]).double().reshape(4, restarts, 1, 1)
    start = tuple(
        best.unsqueeze(1) + 10.0**-quality * noise for best, noise in zip(exact, random_state(4, restarts), strict=True)
    )
    layer = DEQ(reasoner, solver=solver, batch_dims=2, on_failure="ignore")
    with torch.no_grad():
        solution = layer(x.unsqueeze(1).expand(4, restarts, -1, -1), z0=start)
    best = solution.relative_residual.argmin(dim=1)
    assert torch.equal(best, quality.flatten(1).argmax(dim=1))
    chosen = tuple(part[torch.arange(4), best] for part in solution.value)
    for a, b in zip(chosen, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-4)
    # The next segment goes on from the chosen restart alone.
    with torch.no_grad():
        last = DEQ(reasoner, solver=EXACT)(x, z0=chosen)
    for a, b in zip(last.value, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
