"""`NewtonKrylov` against its definition, on fixed points and on systems of equations."""

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deepeq import BackpropAdjoint, Result, fixed_point, root_find
from deepeq.solvers.newton_krylov import NewtonKrylov, NewtonState, _bounded_least_squares
from tests.problems import PROBLEMS, Recorder, relative_residual, solve

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import _root_problems as root_problems

Map = Callable[[Tensor], Tensor]

RTOL = {torch.float32: 1e-4, torch.float64: 1e-9}
SYSTEMS = {problem.name: problem for problem in root_problems.PROBLEMS}
ROOTLESS = {problem.name: problem for problem in root_problems.ROOTLESS}

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def find(g: Map, z0: Tensor, solver: NewtonKrylov | None = None):
    """`root_find`, where the test itself looks at what was reached."""
    return root_find(g, z0, solver=solver, on_failure="ignore", nonfinite="keep")


class Count:
    """A map that counts its calls."""

    def __init__(self, f: Map) -> None:
        self.f, self.calls = f, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self.f(z)


# --- known answers ---------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("problem_name", PROBLEMS)
def test_finds_the_known_fixed_point(problem_name, dtype):
    problem = PROBLEMS[problem_name](dtype)
    solution = solve(problem.f, problem.z0, solver=NewtonKrylov(rtol=RTOL[dtype]))
    assert solution.result is Result.CONVERGED
    assert (relative_residual(problem.f, solution.value) <= 1.001 * RTOL[dtype]).all()
    bound = 110 * RTOL[dtype] * problem.z_star.norm(dim=1, keepdim=True)
    assert ((solution.value - problem.z_star).norm(dim=1, keepdim=True) <= bound).all()


# One line a system; with how near its known root the answer has to be, or None where no root is known in closed form.
ROOTS: dict[str, float | None] = {
    "Rosenbrock": 1e-6,
    "Rosenbrock, start x 100": 1e-6,
    "Powell singular": 1e-2,  # a root of multiplicity two
    "Powell badly scaled, start x 10": None,
    "helical valley": 1e-6,
    "Chebyquad 7": None,
    "Brown almost linear 30": 1e-5,
    "discrete boundary value": None,
    "variably dimensioned": 1e-6,
    "Broyden tridiagonal": None,
    "second difference": 1e-6,
    "pressure network": 1e-6,
    "preconditioned pair": 1e-6,
    "affine contraction 200": None,
    "Bratu 2-D": None,
    "H-equation c=0.9999": None,
    "logarithm": 1e-6,
    "arctangent": 1e-6,
    "square root of two": 1e-6,
}


@pytest.mark.parametrize("name", ROOTS)
@torch.no_grad()
def test_solves_systems_of_equations(name):
    problem, distance = SYSTEMS[name], ROOTS[name]
    solution = find(problem.g, problem.z0, NewtonKrylov(rtol=0.0, atol=5e-8))
    assert solution.result is Result.CONVERGED
    assert problem.g(solution.value).norm() <= 5.1e-8
    assert (problem.root is None) == (distance is None)
    if problem.root is not None:
        assert distance is not None
        assert (solution.value[0] - torch.tensor(problem.root, dtype=torch.float64)).norm() <= distance


@pytest.mark.parametrize("asked", ["default", "relative", "absolute"])
@pytest.mark.parametrize("name", ROOTLESS)
@torch.no_grad()
def test_claims_no_root_where_there_is_none(name, asked):
    problem, max_steps = ROOTLESS[name], 100 if len(ROOTLESS[name].start) < 3 else 15
    solvers = {
        "default": None if max_steps == 100 else NewtonKrylov(rtol=4e-11, max_steps=max_steps),
        "relative": NewtonKrylov(rtol=1e-8, max_steps=max_steps),
        "absolute": NewtonKrylov(rtol=0.0, atol=5e-8, max_steps=max_steps),
    }
    solution = find(problem.g, problem.z0, solvers[asked])
    assert not solution.converged.any()
    assert solution.result is not Result.CONVERGED
    assert solution.message
    assert solution.value.isfinite().all()
    residual = problem.g(solution.value).norm(dim=1)
    torch.testing.assert_close(solution.absolute_residual, residual, rtol=1e-6, atol=0.0)
    assert (residual <= problem.g(problem.z0).norm(dim=1)).all()


# --- the step against its definition ---------------------------------------------------------------------------------


def system(z: Tensor) -> Tensor:
    """Four equations, with a Jacobian that is neither symmetric nor near the identity."""
    a, b, c, d = z.unbind(1)
    return torch.stack([3 * b + a.sin() - 1, a - c**2, 2 * d + b * c, a.exp() - d + 2 * c], dim=1)


def start(rows: int = 3) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def jacobian_of(g: Map, z: Tensor) -> Tensor:
    """`(B, N, N)`, one problem at a time."""
    rows = [torch.autograd.functional.jacobian(lambda y: g(y.unsqueeze(0))[0], row) for row in z]
    return torch.stack(rows)


def steps_of(g: Map, z: Tensor, solver: NewtonKrylov, count: int) -> list[Tensor]:
    """The points that the rule asks for, without the search around it."""
    rule = solver.bind(g)
    state, points = rule.init(z), []
    for _ in range(count):
        gz = g(z)
        z, state = rule.step(z, z + gz, gz, state)
        points.append(z)
    return points


def test_first_step_equals_dense_newton_where_the_inner_solve_is_exact():
    z = start()
    points = steps_of(system, z, NewtonKrylov(inner_rtol=1e-13), 1)
    expected = z - torch.linalg.solve(jacobian_of(system, z), system(z))
    torch.testing.assert_close(points[0], expected, rtol=1e-10, atol=1e-10)


def test_steps_near_a_root_are_those_of_newton():
    """Where every step keeps its promise, the radius never binds."""
    z = torch.linspace(0.1, 0.9, 12, dtype=torch.float64).reshape(3, 4)

    def g(z: Tensor) -> Tensor:
        return 2 * z + 0.1 * (z @ torch.ones(4, 4, dtype=z.dtype).triu(1)).sin() - 1

    expected = z
    for point in steps_of(g, z, NewtonKrylov(inner_rtol=1e-9), 4):
        newton = expected - torch.linalg.solve(jacobian_of(g, expected), g(expected))
        # Later steps are solved to 1e-4 ||g|| at best.
        bound = 1e-3 * g(expected).norm() + 1e-13
        assert (point - newton).norm() <= bound
        expected = point
    assert g(expected).norm() < 1e-10


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
def test_step_minimizes_the_linear_model_over_the_krylov_space(inner_steps):
    z = start()
    (point,) = steps_of(system, z, NewtonKrylov(inner_steps=inner_steps, inner_rtol=1e-13), 1)
    for i, (g, jacobian) in enumerate(zip(system(z), jacobian_of(system, z), strict=True)):
        krylov = torch.stack([torch.linalg.matrix_power(jacobian, k) @ g for k in range(inner_steps)], dim=1)
        s = krylov @ torch.linalg.lstsq(jacobian @ krylov, -g.unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(point[i], z[i] + s, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("inner_rtol", [0.2, 0.1, 1e-3])
def test_inner_solve_stops_at_its_tolerance_and_not_much_later(inner_rtol):
    z = torch.zeros(1, 30, dtype=torch.float64)
    slopes = torch.linspace(1.0, 20.0, 30, dtype=torch.float64)
    g = Count(lambda z: slopes * z + 1.0)
    (point,) = steps_of(g, z, NewtonKrylov(inner_rtol=inner_rtol), 1)
    left = g.f(point).norm() / g.f(z).norm()
    assert left <= inner_rtol * (1 + 1e-9)
    products = g.calls - 2  # without g(z), and the second evaluation of the first product
    fewer = NewtonKrylov(inner_rtol=inner_rtol, inner_steps=products - 1)
    (before,) = steps_of(g, z, fewer, 1)
    assert g.f(before).norm() / g.f(z).norm() > inner_rtol


@pytest.mark.parametrize("radius", [1e-3, 0.3, 1.0])
def test_bounded_step_is_the_best_one_within_its_radius(radius, generator):
    """The conditions of Karush, Kuhn and Tucker, and no better point in the ball."""
    rows, k = 4, 5
    hessenberg = torch.randn(rows, k + 1, k, generator=generator, dtype=torch.float64).triu(-1)
    norm = torch.tensor([1.0, 10.0, 0.1, 1e-6], dtype=torch.float64)
    bound = torch.full((rows,), radius, dtype=torch.float64)
    y = _bounded_least_squares(hessenberg, norm, bound, torch.finfo(torch.float64).eps)
    b = torch.zeros(rows, k + 1, dtype=torch.float64)
    b[:, 0] = norm

    def model(y: Tensor) -> Tensor:
        return (b + (hessenberg @ y.unsqueeze(2)).squeeze(2)).norm(dim=1)

    full = torch.linalg.lstsq(hessenberg, -b.unsqueeze(2)).solution.squeeze(2)
    inside = full.norm(dim=1) <= radius
    assert (y.norm(dim=1) <= radius * (1 + 1e-12)).all()
    assert inside[3]
    assert not inside[1]
    torch.testing.assert_close(y[inside], full[inside], rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(y[~inside].norm(dim=1), bound[~inside], rtol=1e-6, atol=0.0)
    # There, the model falls fastest in the direction of the step itself.
    slope = -(hessenberg.mT @ (b.unsqueeze(2) + hessenberg @ y.unsqueeze(2))).squeeze(2)
    cosine = torch.nn.functional.cosine_similarity(slope, y)
    torch.testing.assert_close(cosine[~inside], torch.ones_like(cosine[~inside]), rtol=0.0, atol=1e-6)
    for _ in range(50):
        other = torch.randn(rows, k, generator=generator, dtype=torch.float64)
        other = radius * other / other.norm(dim=1, keepdim=True)
        for share in (1.0, 0.1, 0.01):
            nearby = y + share * (other - y)  # in the ball, too
            assert (model(y) <= model(nearby) * (1 + 1e-9)).all()


def test_basis_is_orthonormal_to_rounding_and_satisfies_its_relation(generator):
    """One pass of Gram-Schmidt would lose this on a matrix of condition 1e6."""
    q, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))
    matrix = q @ torch.diag(torch.logspace(0, -6, 24, dtype=torch.float64)) @ q.T
    b = torch.randn(1, 24, generator=generator, dtype=torch.float64)
    rule, z = NewtonKrylov(inner_rtol=1e-13, inner_steps=14).bind(lambda z: z @ matrix.T + b), torch.zeros_like(b)
    _, state = rule.step(z, b, b, None)
    basis = torch.cat(state.basis)
    torch.testing.assert_close(basis @ basis.T, torch.eye(15, dtype=torch.float64), rtol=0.0, atol=1e-13)
    torch.testing.assert_close(matrix @ basis[:-1].T, basis.T @ state.hessenberg[0], rtol=0.0, atol=1e-13)


def test_infinite_derivative_at_the_start_gives_finite_points_and_spares_the_others():
    g = Recorder(torch.sqrt)
    z0 = torch.tensor([[0.0], [4.0]], dtype=torch.float64)
    solution = find(lambda z: g(z) - 1.0, z0, NewtonKrylov(max_steps=20))
    assert all(point.isfinite().all() for point in g.points)
    assert bool(solution.converged[1])
    torch.testing.assert_close(solution.value[1], torch.ones(1, dtype=torch.float64), rtol=1e-5, atol=0.0)


def test_step_that_was_rejected_is_tried_again_with_a_smaller_radius_and_no_product():
    g = Count(torch.atan)  # at 3, Newton's step leads to -9.5, where |g| is larger
    solver = NewtonKrylov()
    rule, z0 = solver.bind(g), torch.tensor([[3.0]], dtype=torch.float64)
    z, state = rule.step(z0, z0 + torch.atan(z0), torch.atan(z0), rule.init(z0))
    torch.testing.assert_close(z, z0 - torch.atan(z0) * (1 + z0**2), rtol=1e-9, atol=0.0)
    calls, lengths = g.calls, [float((z - z0).abs())]
    while torch.atan(z).abs() > torch.atan(z0).abs():
        z, state = rule.step(z, z + torch.atan(z), torch.atan(z), state)
        assert torch.equal(state.z, z0)
        lengths.append(float((z - z0).abs()))
        assert 0.1 * lengths[-2] <= lengths[-1] <= 0.5001 * lengths[-2]
    assert len(lengths) > 1
    assert g.calls == calls


def test_rule_needs_a_map():
    z = torch.ones(1, 2)
    with pytest.raises(RuntimeError, match="bind"):
        NewtonKrylov().step(z, 2 * z, z, None)


@pytest.mark.parametrize("inner_steps", [1, 4, 12])
def test_num_stored_bounds_the_vectors_of_a_state_and_is_reached(inner_steps):
    slopes = torch.linspace(-0.9, 0.9, 47, dtype=torch.float64)  # so wide that nothing else in a state has this width

    def g(z: Tensor) -> Tensor:
        return slopes * z + 1.0 + 0.1 * z.sin()

    solver = NewtonKrylov(inner_steps=inner_steps, inner_rtol=1e-12)
    rule, z = solver.bind(g), torch.zeros(2, 47, dtype=torch.float64)
    state: NewtonState | None = rule.init(z)
    most = 0
    for _ in range(4):
        z, state = rule.step(z, z + g(z), g(z), state)
        leaves = {leaf.data_ptr(): leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)}
        vectors = [leaf for leaf in leaves.values() if leaf.ndim > 1 and leaf.shape[-1] == 47]
        most = max(most, sum(leaf.numel() for leaf in vectors) // z.numel())
    assert solver.num_stored - 2 <= most <= solver.num_stored


# --- units and signs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [-1.0, 2.0**30, -(2.0**-30), 1e-9, -1e9])
@pytest.mark.parametrize("name", ["Rosenbrock", "Broyden tridiagonal", "arctangent", "logarithm"])
def test_points_do_not_depend_on_the_unit_or_the_sign_of_g(name, unit):
    """The rule itself, without the scale that `root_find` puts before `g`."""
    problem = SYSTEMS[name]
    expected = steps_of(problem.g, problem.z0, NewtonKrylov(), 8)
    points = steps_of(lambda z: unit * problem.g(z), problem.z0, NewtonKrylov(), 8)
    assert not torch.equal(expected[0], problem.z0)
    for point, reference in zip(points, expected, strict=True):
        torch.testing.assert_close(point, reference, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("unit", [-1.0, 1e-20, -1e-6, 1e6, -1e20])
@pytest.mark.parametrize("name", ["Rosenbrock", "Broyden banded", "logarithm", "square root of two"])
@torch.no_grad()
def test_root_does_not_depend_on_the_unit_or_the_sign_of_g(name, unit):
    problem = SYSTEMS[name]
    expected = find(problem.g, problem.z0, NewtonKrylov(rtol=1e-9))
    solution = find(lambda z: unit * problem.g(z), problem.z0, NewtonKrylov(rtol=1e-9))
    assert expected.converged.all()
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, expected.value, rtol=1e-6, atol=1e-7)
    assert abs(int(solution.num_steps) - int(expected.num_steps)) <= 2


# --- options ---------------------------------------------------------------------------------------------------------


def narrow_valley(z: Tensor) -> Tensor:
    """Rosenbrock's equations as a fixed point."""
    return z + SYSTEMS["Rosenbrock"].g(z)


def logarithm(z: Tensor) -> Tensor:
    """Newton's first step from 3 leads to negative numbers."""
    return z + z.log()


STARTS = {
    "affine": (lambda: PROBLEMS["affine"](torch.float64).f, lambda: PROBLEMS["affine"](torch.float64).z0),
    "valley": (lambda: narrow_valley, lambda: SYSTEMS["Rosenbrock"].z0),
    "logarithm": (lambda: logarithm, lambda: torch.tensor([[3.0]], dtype=torch.float64)),
}
OPTIONS = [
    ("affine", {}, {"inner_steps": 2}),
    ("affine", {}, {"inner_rtol": 0.5}),
    ("affine", {}, {"inner_rtol": 1e-3}),
    ("valley", {}, {"stall_steps": 2}),
    ("logarithm", {}, {"backtracks": 0}),
    ("affine", {}, {"rtol": 1e-1}),
    ("affine", {}, {"atol": 1e-1}),
    ("affine", {}, {"max_steps": 2}),
    ("affine", {"rtol": 1e-2}, {"min_steps": 8}),
]


@pytest.mark.parametrize(("name", "settings", "change"), OPTIONS, ids=str)
def test_every_option_changes_the_computation(name, settings, change):
    f, z0 = (make() for make in STARTS[name])
    points = []
    for extra in ({}, change):
        recorder = Recorder(f)
        solver = NewtonKrylov(**{"rtol": 1e-8, "max_steps": 60, **settings, **extra})
        solve(recorder, z0, solver=solver, nonfinite="keep")
        points.append(recorder.points)
    same_length = len(points[0]) == len(points[1])
    assert not same_length or not all(torch.allclose(a, b, equal_nan=True) for a, b in zip(*points, strict=True))


def test_options_table_covers_every_field():
    assert {name for _, _, change in OPTIONS for name in change} == {field.name for field in fields(NewtonKrylov)}


@pytest.mark.parametrize(
    "settings",
    [
        *({"rtol": value} for value in (-1e-3, float("nan"), float("inf"), True, "1e-3")),
        *({"atol": value} for value in (-1.0, float("inf"))),
        {"rtol": 0.0, "atol": 0.0},
        *({"max_steps": value} for value in (-1, 2.5, True)),
        *({"min_steps": value} for value in (-1, 31.0, 101)),
        *({"inner_steps": value} for value in (0, -1, 2.5, True)),
        *({"stall_steps": value} for value in (0, -1, 2.5, True)),
        *({"backtracks": value} for value in (-1, 2.5, True)),
        *({"inner_rtol": value} for value in (0.0, 1.0, -0.1, 2.0, float("nan"))),
    ],
    ids=str,
)
def test_bad_value_raises_at_construction_and_names_the_field(settings):
    with pytest.raises(ValueError, match="both 0" if len(settings) == 2 else next(iter(settings))) as error:
        NewtonKrylov(**settings)
    assert "NewtonKrylov" in str(error.value)


def test_is_an_immutable_value_also_when_bound():
    solver, same = NewtonKrylov(rtol=1e-2), NewtonKrylov(rtol=1e-2)
    for field in fields(NewtonKrylov):
        for value in (solver, solver.bind(system)):
            with pytest.raises(AttributeError):
                setattr(value, field.name, 1)
    assert solver == same
    assert hash(solver) == hash(same)
    assert len({solver, same, NewtonKrylov(inner_steps=3)}) == 2
    with pytest.raises(TypeError, match="positional"):
        NewtonKrylov(1e-3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="radius"):
        NewtonKrylov(radius=1.0)  # pyright: ignore[reportCallIssue]


def test_binding_makes_a_rule_of_its_own():
    z, solver = start(), NewtonKrylov()
    one, other = solver.bind(system), solver.bind(lambda z: 2 * z + 1)
    expected = steps_of(system, z, solver, 1)[0]
    assert torch.equal(one.step(z, z + system(z), system(z), one.init(z))[0], expected)
    doubled = other.step(z, 3 * z + 1, 2 * z + 1, other.init(z))[0]
    torch.testing.assert_close(doubled, torch.full_like(z, -0.5))
    with pytest.raises(RuntimeError, match="bind"):  # the solver that was bound is as it was
        solver.step(z, z + system(z), system(z), None)


# --- domains and batch mates -----------------------------------------------------------------------------------------


def test_backs_off_from_nan_and_finds_the_root_inside():
    g = Recorder(torch.log)
    solution = find(g, torch.tensor([[3.0], [20.0], [1e4]], dtype=torch.float64))
    assert any((point < 0).any() for point in g.points)  # it was there
    assert solution.result is Result.CONVERGED
    torch.testing.assert_close(solution.value, torch.ones(3, 1, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_gives_up_after_its_backtracks_at_the_best_finite_point():
    z0 = torch.tensor([[3.0], [0.5]], dtype=torch.float64)
    solution = find(torch.log, z0, NewtonKrylov(backtracks=0))
    assert solution.result is Result.NONFINITE
    assert solution.converged.tolist() == [False, True]
    assert torch.equal(solution.value[0], z0[0])
    for backtracks in (2, 4):
        solver = NewtonKrylov(backtracks=backtracks)
        solution = solve(lambda z: torch.where(z == z0, 3 * z, torch.nan), z0, solver=solver, nonfinite="keep")
        assert solution.result is Result.NONFINITE
        assert torch.equal(solution.value, z0)
        assert solution.num_steps.tolist() == [1 + backtracks + 1] * 2  # z0, those, and one too many


def test_nan_of_one_problem_leaves_its_batch_mates_as_they_were():
    """The mates of a problem that leaves its domain, and of one that never has a finite value again."""
    z0 = torch.tensor([[3.0], [0.3], [0.9], [2.0]], dtype=torch.float64)

    def g(z: Tensor, rows: slice) -> Tensor:
        y = z.log()
        lost = (torch.arange(4)[rows] == 3).unsqueeze(1) & (z != 2.0)
        return torch.where(lost, torch.nan, y)

    together = find(lambda z: g(z, slice(None)), z0)
    assert together.converged.tolist() == [True, True, True, False]
    for i in range(4):
        rows = slice(i, i + 1)
        alone = find(lambda z, rows=rows: g(z, rows), z0[rows])
        torch.testing.assert_close(together.value[rows], alone.value, rtol=1e-12, atol=1e-12)
        assert torch.equal(together.num_steps[rows], alone.num_steps)
        assert torch.equal(together.converged[rows], alone.converged)


@dtypes
@pytest.mark.parametrize("problem_name", ["one_hard_sample", "stiff", "cosine"])
def test_answers_of_a_batch_are_those_of_each_problem_alone(problem_name, dtype):
    """To rounding: the spaces of all problems are built together, and have the size of the largest."""
    problem, solver = PROBLEMS[problem_name](dtype), NewtonKrylov(rtol=RTOL[dtype])
    together = solve(problem.f, problem.z0, solver=solver)
    for i in range(len(problem.z0)):
        alone = solve(problem.f_of_sample(i), problem.z0[i : i + 1], solver=solver)
        rtol = 1e4 * torch.finfo(dtype).eps
        torch.testing.assert_close(together.value[i : i + 1], alone.value, rtol=rtol, atol=rtol)
        assert torch.equal(together.num_steps[i : i + 1], alone.num_steps)
        assert torch.equal(together.converged[i : i + 1], alone.converged)


@torch.no_grad()
def test_systems_in_one_batch_have_the_roots_that_they_have_alone():
    """Starts at different distances from a root: some are done, or rejected, while others go on."""
    problem = SYSTEMS["Rosenbrock"]
    z0 = torch.cat([problem.z0, 10 * problem.z0, torch.ones(1, 2, dtype=torch.float64), -3 * problem.z0])
    solver = NewtonKrylov(rtol=1e-10)
    points: list[Tensor] = []
    together = root_find(problem.g, z0, solver=solver, callback=lambda step, z, residual: points.append(z))
    assert together.converged.all()
    assert len(set(together.num_steps.tolist())) > 2
    for i, steps in enumerate(together.num_steps.tolist()):
        assert all(torch.equal(point[i], together.value[i]) for point in points[steps:])  # it is left alone
        alone = find(problem.g, z0[i : i + 1], solver)
        torch.testing.assert_close(together.value[i : i + 1], alone.value, rtol=1e-8, atol=1e-8)
        assert abs(int(together.num_steps[i]) - int(alone.num_steps)) <= 2  # rounding may tip a comparison


# --- what is reported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("problem_name", ["affine", "tanh", "stiff", "one_hard_sample"])
def test_num_evals_counts_the_calls_of_f(problem_name, verify):
    problem = PROBLEMS[problem_name](torch.float64)
    f = Count(problem.f)
    assert solve(f, problem.z0, solver=NewtonKrylov(rtol=1e-9), verify=verify).num_evals == f.calls
    with torch.no_grad():
        f.calls = 0
        solution = solve(f, problem.z0, solver=NewtonKrylov(rtol=1e-9), verify=verify)
    assert solution.num_evals == f.calls > int(solution.num_steps.max())  # with the products


@pytest.mark.parametrize("name", ["Rosenbrock", "logarithm", "Bratu 2-D"])
def test_num_evals_of_root_find_counts_the_calls_of_g(name):
    g = Count(SYSTEMS[name].g)
    assert find(g, SYSTEMS[name].z0).num_evals == g.calls
    g.calls = 0
    with torch.no_grad():
        assert find(g, SYSTEMS[name].z0).num_evals == g.calls


def test_search_at_a_local_minimum_says_so():
    solution = find(lambda z: z**2 + 1, torch.tensor([[0.7]]))
    assert "local minimum" in solution.message
    assert not NewtonKrylov(stall_steps=10).advice(40)
    assert "local minimum" in NewtonKrylov(stall_steps=10).advice(41)


def test_backprop_through_its_steps_is_refused_in_one_sentence():
    problem = PROBLEMS["tanh"](torch.float64)
    f = Count(problem.f)
    for function in (fixed_point, root_find):
        f.calls = 0
        with pytest.raises(TypeError, match="BackpropAdjoint.*NewtonKrylov.*ImplicitAdjoint") as error:
            function(f, problem.z0, solver=NewtonKrylov(), adjoint=BackpropAdjoint())
        message = str(error.value)
        assert "\n" not in message
        assert ". " not in message
        assert len(message) < 200
    with torch.no_grad():  # there is nothing to refuse
        solution = fixed_point(problem.f, problem.z0, solver=NewtonKrylov(rtol=1e-9), adjoint=BackpropAdjoint())
    assert solution.converged.all()


def test_gradient_through_the_equilibrium_is_that_of_the_closed_form():
    problem = PROBLEMS["affine"](torch.float64)
    shift = torch.zeros_like(problem.z0).requires_grad_()
    (value, *_) = fixed_point(lambda z: problem.f(z) + shift, problem.z0, solver=NewtonKrylov(rtol=1e-10))
    weights = torch.linspace(-1.0, 1.0, value.numel(), dtype=torch.float64).view_as(value)
    (gradient,) = torch.autograd.grad((weights * value).sum(), shift)
    zero = torch.zeros_like(problem.z0[:1])
    matrix = torch.autograd.functional.jacobian(lambda z: (problem.f(z.expand_as(problem.z0)))[0], zero)[:, 0]
    expected = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - matrix.T, weights.T).T
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=2e-3)
