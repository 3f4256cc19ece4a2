"""A matcher that moves coordinates step by step: a state of two scales, a detached lookup, losses along the way."""

import pytest
import torch
from torch import Tensor, nn

from deepeq import DEQ, GMRES, Anderson, Broyden, ImplicitAdjoint, Result
from tests.clients import dense

State = tuple[Tensor, Tensor]
LENGTH, HIDDEN, SHIFT = 6, 4, 300.0
EXACT = Broyden(rtol=1e-12, max_steps=100, history_size=100)
IMPLICIT = ImplicitAdjoint(solver=GMRES(rtol=1e-13, max_steps=100))
KEEP = (1, 3, 6)


class Matcher(nn.Module):
    """Moves the coordinate of each pixel until both signals agree there.

    The state is `(hidden, coords)`: `(B, length, hidden)` numbers around `size`, and `(B, length)` coordinates around
    `SHIFT`. The signals are looked up at coordinates without a gradient, as recurrent models of optical flow do: each
    step is trained to improve what it is given.
    """

    def __init__(self, size: float = 0.1) -> None:
        super().__init__()
        self.size = size
        self.w = nn.Parameter(0.3 * torch.randn(HIDDEN, HIDDEN, dtype=torch.float64) / HIDDEN**0.5)
        self.u = nn.Parameter(torch.rand(HIDDEN, dtype=torch.float64) + 0.5)
        self.head = nn.Parameter(torch.rand(HIDDEN, dtype=torch.float64) + 0.5)
        self.detached = True

    def inject(self, x: Tensor, memory: None = None) -> Tensor:
        return x  # the first signal, (B, length)

    def initial_state(self, x: Tensor) -> State:
        return x.new_zeros(*x.shape, HIDDEN), SHIFT + torch.arange(LENGTH, dtype=x.dtype).expand_as(x)

    def lookup(self, coords: Tensor) -> Tensor:
        """The second signal: a ramp with waves, so that each value lies at one place."""
        return 0.01 * (coords - SHIFT) + 0.05 * torch.sin(0.1 * (coords - SHIFT))

    def forward(self, z: State, signal: Tensor) -> State:
        hidden, coords = z
        coords = coords.detach() if self.detached else coords
        mismatch = (signal - self.lookup(coords)).unsqueeze(-1)
        hidden = self.size * torch.tanh(hidden / self.size @ self.w + mismatch * self.u + 0.1)
        return hidden, coords + 20.0 * (hidden / self.size) @ self.head


def problem(size: float = 0.1) -> tuple[Matcher, Tensor]:
    return Matcher(size), 0.3 * torch.randn(2, LENGTH, dtype=torch.float64).cumsum(dim=1)


def correction(coords: Tensor) -> Tensor:
    """How far the coordinates are from the right ones."""
    target = SHIFT + torch.arange(LENGTH, dtype=torch.float64)
    return ((coords - target) / SHIFT).square().sum()


def loss_of(z: State) -> Tensor:
    return correction(z[1]) + z[0].sum()


def test_the_equilibrium_is_where_the_signals_agree():
    cell, signal = problem()
    layer = DEQ(cell, solver=EXACT)
    with torch.no_grad():
        solution = layer(signal)
    assert solution.result is Result.CONVERGED
    f, z0 = layer.prepare(signal)
    cell.detached = False  # Newton's method needs the true Jacobian
    for actual, expected in zip(solution.value, dense.equilibrium(f, solution.value), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        solution.value[0] @ cell.head, torch.zeros(2, LENGTH, dtype=torch.float64), atol=1e-9, rtol=0.0
    )
    assert (solution.value[1] - z0[1]).abs().max() > 20.0


def test_the_gradient_is_that_of_the_map_with_the_detached_lookup():
    cell, signal = problem()
    signal.requires_grad_()
    layer = DEQ(cell, solver=EXACT, adjoint=IMPLICIT)
    wanted = [cell.w, cell.u, cell.head, signal]
    solution = layer(signal)
    actual = torch.autograd.grad(loss_of(solution.value), wanted)
    f, _ = layer.prepare(signal)
    expected = dense.gradients(f, solution.value, loss_of, wanted)
    assert dense.cosine(actual, expected) > 0.999999
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    cell.detached = False
    other = dense.gradients(f, solution.value, loss_of, wanted)
    assert dense.cosine(actual, other) < 0.99  # the detach makes a difference that the test would see


@pytest.mark.parametrize("solver", [EXACT, Anderson(rtol=1e-12, max_steps=200)], ids=["broyden", "anderson"])
def test_losses_along_the_way_have_the_gradients_of_one_evaluation_each(solver):
    cell, signal = problem()
    signal.requires_grad_()
    wanted = [cell.w, cell.u, cell.head, signal]
    points: dict[int, State] = {}

    def observe(step: int, z: State, residual: Tensor) -> None:
        points[step] = tuple(part.clone() for part in z)

    layer = DEQ(cell, solver=solver, adjoint=IMPLICIT)
    solution = layer(signal, keep=KEEP, callback=observe)
    assert len(solution.kept) == len(KEEP)
    f, _ = layer.prepare(signal)
    final = torch.autograd.grad(loss_of(solution.value), wanted, retain_graph=True)
    total = [part.clone() for part in final]
    for weight, step, (hidden, coords) in zip((0.3, 0.5, 0.8), KEEP, solution.kept, strict=True):
        expected_state = f(points[step])
        for a, b in zip((hidden, coords), expected_state, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        actual = torch.autograd.grad(loss_of((hidden, coords)), wanted, retain_graph=True)
        expected = torch.autograd.grad(loss_of(expected_state), wanted)
        for whole, a, b in zip(total, actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
            whole += weight * b
    both = loss_of(solution.value) + sum(
        weight * loss_of(state) for weight, state in zip((0.3, 0.5, 0.8), solution.kept, strict=True)
    )
    for a, b in zip(torch.autograd.grad(both, wanted), total, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_steps_after_the_end_are_the_equilibrium_with_its_gradient():
    cell, signal = problem()
    layer = DEQ(cell, solver=EXACT, adjoint=IMPLICIT)
    solution = layer(signal, keep=(1, 100))
    (late,) = solution.kept[1:]
    a = torch.autograd.grad(loss_of(late), cell.w, retain_graph=True)[0]
    b = torch.autograd.grad(loss_of(solution.value), cell.w)[0]
    assert torch.equal(a, b)
    for part, value in zip(late, solution.value, strict=True):
        assert torch.equal(part, value)


def parts_of_residual(cell: Matcher, z: State, signal: Tensor) -> tuple[float, float]:
    """The largest relative residual of each part."""
    with torch.no_grad():
        fz = cell(z, signal)
    worst = []
    for new, old in zip(fz, z, strict=True):
        rows = (new - old).flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1)
        worst.append(float(rows.max()))
    return worst[0], worst[1]


@pytest.mark.parametrize("size", [1e-4, 0.1, 1e6, 1e10])
def test_neither_part_hides_the_other(size):
    cell, signal = problem(size)
    with torch.no_grad():
        parts = DEQ(cell, solver=Broyden(rtol=1e-6, max_steps=100))(signal)
        whole = DEQ(cell, solver=Broyden(rtol=1e-6, max_steps=100), norm="whole")(signal)
    assert parts.result is Result.CONVERGED
    residuals = parts_of_residual(cell, parts.value, signal)
    assert max(residuals) <= 1.01e-6
    assert max(residuals) == pytest.approx(float(parts.relative_residual.max()), rel=1e-6)
    if size == 1e-4:
        assert whole.result is Result.CONVERGED
        assert max(parts_of_residual(cell, whole.value, signal)) > 1e-5  # one part is not there yet, and nobody says so
