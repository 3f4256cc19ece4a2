"""What is compared with the tolerances: parts, the whole, positions, or a function; and scales from 1e-30 to 1e30."""

import pytest
import torch
from torch import Tensor

from deepeq import (
    DEQ,
    GMRES,
    Anderson,
    Broyden,
    FixedPointIteration,
    ImplicitAdjoint,
    NeumannAdjoint,
    PhantomAdjoint,
    fixed_point,
    root_find,
)
from deepeq.norms import safe_two_norm, two_norm
from tests.problems import solve

SOLVERS = [
    FixedPointIteration(rtol=1e-5, max_steps=300),
    Anderson(rtol=1e-5, max_steps=300),
    Broyden(rtol=1e-5, max_steps=300),
    GMRES(rtol=1e-5, max_steps=300),
]
solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS[:3], ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("size", [1e8, 1e-8])
def test_part_of_another_size_hides_nothing(solver, size):
    """`a` is there from the start, and its norm alone decides about all parts together."""

    def f(state):
        return state[0] * 0.5 + 0.5 * size, 0.5 * state[1] + torch.tensor([[1.0, 2.0]])

    z0 = (torch.full((3, 2), size), torch.zeros(3, 2))
    b = fixed_point(f, z0, solver=solver).value[1]
    torch.testing.assert_close(b, torch.tensor([[2.0, 4.0]]).expand(3, 2), rtol=1e-4, atol=0.0)


def test_whole_looks_at_all_parts_together():
    """The control: that is what a single norm would have said."""

    def f(state):
        return state[0] * 0.5 + 0.5e8, 0.5 * state[1] + 1.0

    z0 = (torch.full((3, 2), 1e8), torch.zeros(3, 2))
    solution = fixed_point(f, z0, norm="whole")
    assert solution.converged.all()
    assert solution.num_steps.tolist() == [1, 1, 1]
    distance, size = torch.full((3,), 2.0**0.5), torch.full((3,), 1e8 * 2.0**0.5)
    torch.testing.assert_close(solution.absolute_residual, distance)
    torch.testing.assert_close(solution.relative_residual, distance / size)


class Scaled:
    """`(a / size, b)` is the fixed point of one linear map of 5 numbers that couples both."""

    def __init__(self, size: float, dtype: torch.dtype) -> None:
        self.size = size
        self.matrix = (0.8 * torch.linalg.qr(draw(5, 5, seed=7))[0]).to(dtype)
        self.c, self.d = (part.to(dtype).requires_grad_() for part in draw(4, 5, seed=8).split([3, 2], dim=1))
        self.weights = draw(4, 5, seed=9)

    def __call__(self, state):
        z = torch.cat([state[0] / self.size, state[1]], dim=1) @ self.matrix.T + torch.cat([self.c, self.d], dim=1)
        return self.size * z[:, :3], z[:, 3:]

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.weights.to(a.dtype) * torch.cat([a / self.size, b], dim=1)).sum()

    def direct(self) -> tuple[Tensor, list[Tensor]]:
        """The value with `a` in units of its size, and the gradients, in float64."""
        matrix, shift = self.matrix.double(), torch.cat([self.c, self.d], dim=1).detach().double().requires_grad_()
        z = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - matrix, shift.T).T
        (gradient,) = torch.autograd.grad((self.weights * z).sum(), shift)
        return z.detach(), list(gradient.split([3, 2], dim=1))


@solvers
@pytest.mark.parametrize("size", [1.0, 1e8, 1e-8, 1e20])
def test_coupled_parts_of_different_sizes_have_the_right_value_and_gradient(solver, size):
    problem = Scaled(size, torch.float32)
    z0 = (torch.zeros(4, 3), torch.zeros(4, 2))
    # GMRES minimizes one norm of all parts, which suits gradients: they are brought to one size.
    forward = SOLVERS[2] if isinstance(solver, GMRES) else solver
    a, b = fixed_point(problem, z0, solver=forward, adjoint=ImplicitAdjoint(solver=solver)).value
    value, gradients = problem.direct()
    torch.testing.assert_close((a / size).double(), value[:, :3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(b.double(), value[:, 3:], rtol=1e-3, atol=1e-3)
    found = torch.autograd.grad(problem.loss(a, b), (problem.c, problem.d))
    for gradient, expected in zip(found, gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1e8, 1e-8])
def test_root_of_parts_of_different_sizes_is_found(size):
    problem = Scaled(size, torch.float64)

    def g(state):
        return tuple(after - before for after, before in zip(problem(state), state, strict=True))

    z0 = (torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64))
    a, b = root_find(g, z0, solver=Broyden(rtol=1e-8, max_steps=300)).value
    torch.testing.assert_close(torch.cat([a / size, b], dim=1), problem.direct()[0], rtol=1e-6, atol=1e-6)


def test_residual_is_that_of_the_worst_part():
    def f(state):
        return 0.9 * state[0] + 1.0, 0.1 * state[1] + 1.0

    z0 = (torch.zeros(2, 1), torch.zeros(2, 3))
    solution = solve(f, z0, solver=FixedPointIteration(max_steps=4))
    a, b = (part.detach() for part in solution.value)
    fa, fb = f((a, b))
    relative = [(after - z).norm(dim=1) / after.norm(dim=1) for z, after in ((a, fa), (b, fb))]
    absolute = [(after - z).norm(dim=1) for z, after in ((a, fa), (b, fb))]
    torch.testing.assert_close(solution.relative_residual, torch.maximum(*relative), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(solution.absolute_residual, torch.maximum(*absolute), rtol=1e-4, atol=1e-7)


# --- positions -------------------------------------------------------------------------------------------------------


def test_positions_each_reach_the_tolerance():
    """A position of huge numbers hides the others from the norm of the part, and not from their own."""
    size = torch.tensor([1e6, 1.0, 1e-3]).reshape(1, 3, 1)

    def f(z):
        return 0.8 * z + 0.2 * size

    z0 = torch.zeros(2, 3, 4)
    z0[:, 0] = 1e6
    hidden = fixed_point(f, z0, solver=FixedPointIteration(max_steps=100))
    assert hidden.num_steps.tolist() == [1, 1]
    solution = fixed_point(f, z0, solver=FixedPointIteration(rtol=1e-4, max_steps=100), norm="positions")
    torch.testing.assert_close(solution.value, size.expand(2, 3, 4), rtol=1e-3, atol=0.0)
    assert solution.relative_residual.shape == (2,)
    assert (solution.relative_residual > 1e-5).all()


def test_positions_of_every_part_count():
    def f(state):
        return {"a": 0.5 * state["a"] + 1.0, "b": 0.8 * state["b"] + torch.tensor([1e6, 1.0]).reshape(1, 2, 1)}

    z0 = {"a": torch.full((1, 3), 2.0), "b": torch.tensor([5e6, 0.0]).reshape(1, 2, 1).repeat(1, 1, 2)}
    solution = fixed_point(f, z0, solver=FixedPointIteration(rtol=1e-4, max_steps=100), norm="positions")
    torch.testing.assert_close(solution.value["b"][0, 1], torch.full((2,), 5.0), rtol=1e-3, atol=0.0)


# --- a function ------------------------------------------------------------------------------------------------------


def test_function_measures_the_state_and_not_the_packed_vector():
    seen = []

    def largest(state):
        seen.append({name: part.shape for name, part in state.items()})
        return torch.maximum(state["a"].abs().amax(dim=1), state["b"].abs().amax(dim=(1, 2)))

    def f(state):
        return {"a": 0.5 * state["a"] + 1.0, "b": 0.9 * state["b"] + 1.0}

    z0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 2, 2)}
    solution = solve(f, z0, solver=FixedPointIteration(max_steps=5), norm=largest)
    assert all(shapes == {"a": (2, 3), "b": (2, 2, 2)} for shapes in seen)
    fz = f(solution.value)
    difference = {name: fz[name] - solution.value[name] for name in fz}
    torch.testing.assert_close(solution.relative_residual, (largest(difference) / largest(fz)).detach())
    torch.testing.assert_close(solution.absolute_residual, largest(difference).detach())


def test_worst_of_several_numbers_of_a_function_counts():
    def f(z):
        return torch.tensor([0.5, 0.95]) * z + 1.0

    def each(z):
        return z.abs()  # (B, 2)

    solution = fixed_point(f, torch.zeros(3, 2), solver=FixedPointIteration(rtol=1e-3, max_steps=200), norm=each)
    assert solution.relative_residual.shape == (3,)
    fz = f(solution.value)
    relative = ((fz - solution.value).abs() / fz.abs()).detach()
    torch.testing.assert_close(solution.relative_residual, relative.amax(dim=1), rtol=1e-2, atol=0.0)
    assert (relative <= 1e-3 * 1.001).all()


def test_function_under_gradients_leaves_no_trace_in_the_graph():
    weight = torch.tensor(0.5, requires_grad=True)
    solution = fixed_point(lambda z: weight * z + 1.0, torch.zeros(2, 3), norm=lambda z: weight * z.norm(dim=1))
    assert not solution.relative_residual.requires_grad
    (gradient,) = torch.autograd.grad(solution.value.sum(), weight)
    torch.testing.assert_close(gradient.item(), 6 * 4.0, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize(
    ("norm", "error", "message"),
    [
        (lambda z: z.norm(), ValueError, r"norm returned shape \(\)"),
        (lambda z: z.norm(dim=0), ValueError, r"norm returned shape \(2,\)"),
        (lambda z: 1.0, TypeError, "norm returned float"),
        ("max", ValueError, "norm='max' must be 'parts', 'whole', 'positions' or a function"),
        (None, ValueError, "norm=None"),
    ],
    ids=["scalar", "wrong_dimension", "number", "unknown_name", "none"],
)
def test_bad_norm_is_named(norm, error, message):
    with pytest.raises(error, match=message):
        fixed_point(torch.cos, torch.zeros(3, 2), norm=norm)


def test_deq_hands_on_its_norm():
    class Pair(torch.nn.Module):
        def forward(self, z, x):
            return 0.5 * z[0] + 0.5e8, 0.5 * z[1] + x[1]

    x = (torch.full((2, 1), 1e8), torch.ones(2, 1))
    z0 = (torch.full((2, 1), 1e8), torch.zeros(2, 1))
    assert DEQ(Pair(), norm="whole")(x, z0).num_steps.tolist() == [1, 1]
    assert (DEQ(Pair())(x, z0).num_steps > 1).all()


# --- scales ----------------------------------------------------------------------------------------------------------

POWERS = [-100, -60, 60, 100]  # 1e-30 to 1e30


@solvers
@pytest.mark.parametrize("power", POWERS)
def test_units_of_a_state_do_not_matter(solver, power):
    """Squares of these numbers leave the range of float32. A power of two changes no digit of a product."""
    matrix = (0.7 * torch.linalg.qr(draw(6, 6, seed=2))[0]).float()
    b = draw(3, 6, seed=3).float()
    solutions = {}
    for unit in (1.0, 2.0**power):
        solutions[unit] = fixed_point(lambda z, unit=unit: z @ matrix.T + unit * b, torch.zeros(3, 6), solver=solver)
    plain, scaled = solutions[1.0], solutions[2.0**power]
    torch.testing.assert_close(scaled.value / 2.0**power, plain.value, rtol=1e-4, atol=1e-4)
    assert scaled.converged.all()
    assert (scaled.num_steps - plain.num_steps).abs().max() <= 1
    torch.testing.assert_close(
        scaled.absolute_residual / 2.0**power / plain.value.norm(dim=1), scaled.relative_residual, rtol=1e-2, atol=1e-6
    )


@pytest.mark.parametrize(
    "adjoint",
    [*(ImplicitAdjoint(solver=solver) for solver in SOLVERS), NeumannAdjoint(terms=40), PhantomAdjoint(steps=40)],
    ids=[*(type(solver).__name__ for solver in SOLVERS), "neumann", "phantom"],
)
@pytest.mark.parametrize("power", POWERS)
def test_units_of_a_loss_do_not_matter(adjoint, power):
    matrix = (0.7 * torch.linalg.qr(draw(6, 6, seed=2))[0]).float()
    b = draw(3, 6, seed=3).float().requires_grad_()
    value = fixed_point(lambda z: z @ matrix.T + b, torch.zeros(3, 6), adjoint=adjoint, solver=SOLVERS[2]).value
    (gradient,) = torch.autograd.grad(value, b, torch.full_like(value, 2.0**power))
    expected = torch.linalg.solve(torch.eye(6) - matrix.T, torch.ones(6, 3)).T
    torch.testing.assert_close(gradient / 2.0**power, expected, rtol=1e-3, atol=1e-4)


def test_samples_of_different_scales_do_not_disturb_each_other():
    scales = torch.tensor([[1e-25], [1.0], [1e25]])
    slopes = torch.tensor([0.9, -0.5, 0.3, 0.1])
    solution = fixed_point(lambda z: slopes * z + scales, torch.zeros(3, 4), solver=Broyden(rtol=1e-5, max_steps=100))
    torch.testing.assert_close(solution.value / scales, (1 / (1 - slopes)).expand(3, 4), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_units_of_equations_and_unknowns_do_not_matter(unit):
    """`g(z) = unit (z^2 - 2)`, and the same root in other units."""
    z0 = torch.ones(2, 1)
    root = root_find(lambda z: unit * (z * z - 2.0), z0, solver=Broyden(rtol=1e-5, max_steps=100))
    torch.testing.assert_close(root.value, torch.full((2, 1), 2.0**0.5), rtol=1e-4, atol=0.0)
    root = root_find(lambda z: (z / unit) ** 2 - 2.0, unit * z0, solver=Broyden(rtol=1e-5, max_steps=100))
    torch.testing.assert_close(root.value / unit, torch.full((2, 1), 2.0**0.5), rtol=1e-4, atol=0.0)


def test_residual_is_measured_in_float64_and_stored_in_the_dtype_of_the_state():
    z0 = torch.full((1, 100_000), 1e-23)
    solution = solve(lambda z: 0.5 * z, z0, solver=FixedPointIteration(max_steps=1))
    assert solution.relative_residual.dtype == torch.float32
    torch.testing.assert_close(solution.relative_residual.item(), 1.0)
    torch.testing.assert_close(solution.absolute_residual.item(), 0.5e-23 * 100_000**0.5, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("norm", [two_norm, safe_two_norm])
@pytest.mark.parametrize("size", [8192, 8193, 2_000_000])
def test_norms_of_many_equal_numbers_keep_their_digits(norm, size):
    z = torch.full((2, size), 0.7371)
    exact = torch.linalg.vector_norm(z.double(), dim=1)
    torch.testing.assert_close(norm(z).double(), exact, rtol=1e-5, atol=0.0)
