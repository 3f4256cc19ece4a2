"""Every solver on every problem, as `deepeq.Solution` promises. The files beside this one compare each solver with its
definition."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deepeq import (
    GMRES,
    Anderson,
    Broyden,
    ConjugateGradient,
    FixedPointIteration,
    ImplicitAdjoint,
    Result,
    Solver,
)
from tests.problems import PROBLEMS, Problem, Recorder, relative_residual, solve

# One line per solver: how it is built, and which problems it has to solve.
SOLVERS: dict[str, tuple[Callable[..., Solver], Callable[[Problem], bool]]] = {
    "fixed_point_iteration": (FixedPointIteration, lambda p: p.contraction < 1),
    "damped_iteration": (lambda **k: FixedPointIteration(damping=0.3, **k), lambda p: p.contraction < 1),
    "anderson": (Anderson, lambda p: True),
    "damped_anderson": (lambda **k: Anderson(damping=0.2, **k), lambda p: True),
    "broyden": (Broyden, lambda p: True),
    "damped_broyden": (lambda **k: Broyden(damping=0.2, **k), lambda p: True),
    "broyden_line_search": (lambda **k: Broyden(line_search_steps=3, **k), lambda p: True),
    "broyden_window_5": (lambda **k: Broyden(history_size=5, **k), lambda p: p.contraction < 1),
    "gmres": (GMRES, lambda p: p.affine),
    "gmres_restart_4": (lambda **k: GMRES(restart=4, **k), lambda p: p.affine),
    "conjugate_gradient": (ConjugateGradient, lambda p: p.definite),
}
RTOL = {torch.float32: 1e-4, torch.float64: 1e-9}

ALL = (FixedPointIteration, Anderson, Broyden, GMRES, ConjugateGradient)

solver_names = pytest.mark.parametrize("solver_name", SOLVERS)
problem_names = pytest.mark.parametrize("problem_name", PROBLEMS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def build(solver_name: str, **fields) -> Solver:
    return SOLVERS[solver_name][0](**fields)


PROMISED = [
    (solver_name, problem_name)
    for solver_name, (_, promises) in SOLVERS.items()
    for problem_name, make in PROBLEMS.items()
    if promises(make(torch.float64))
]


@dtypes
@pytest.mark.parametrize(("solver_name", "problem_name"), PROMISED)
def test_solver_finds_the_known_fixed_point(solver_name, problem_name, dtype):
    problem = PROBLEMS[problem_name](dtype)
    solution = solve(problem.f, problem.z0, solver=build(solver_name, rtol=RTOL[dtype], max_steps=600))
    assert solution.result is Result.CONVERGED
    assert solution.converged.all()
    # ||z - z*|| <= ||(I - J)^-1|| ||f(z) - z||, and I - J has no singular value below 0.01 in these problems.
    bound = 110 * RTOL[dtype] * problem.z_star.norm(dim=1, keepdim=True)
    assert ((solution.value - problem.z_star).norm(dim=1, keepdim=True) <= bound).all()


@dtypes
@problem_names
@solver_names
def test_solution_reports_what_was_computed(solver_name, problem_name, dtype):
    problem = PROBLEMS[problem_name](dtype)
    f, rtol, z0 = Recorder(problem.f), RTOL[dtype], problem.z0.clone()
    solution = solve(f, z0, solver=build(solver_name, rtol=rtol, max_steps=25))
    batch_size = z0.shape[0]

    assert torch.equal(z0, problem.z0)
    assert solution.value.shape == z0.shape
    assert solution.value.dtype == solution.relative_residual.dtype == dtype
    assert solution.relative_residual.shape == solution.converged.shape == solution.num_steps.shape == (batch_size,)
    assert solution.converged.dtype == torch.bool
    assert solution.num_steps.dtype == torch.int64
    assert solution.residual_history.shape == (solution.num_steps.max(), batch_size)

    residual = relative_residual(problem.f, solution.value)
    slack = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(solution.relative_residual, residual, rtol=1e-3, atol=slack)
    assert torch.equal(solution.converged, solution.relative_residual <= rtol)
    assert (solution.result is Result.CONVERGED) == bool(solution.converged.all())
    assert (solution.result is Result.MAX_STEPS) == (not bool(solution.converged.all()))

    # num_evals counts the calls of f, with the one that builds the graph.
    assert solution.num_evals == f.count == int(solution.num_steps.max()) + 1
    with torch.no_grad():
        f.points.clear()
        assert solve(f, z0, solver=build(solver_name, rtol=rtol, max_steps=25), verify=False).num_evals == f.count
        assert f.count == int(solution.num_steps.max())

    # The trace is the residual of the points that were evaluated, up to each sample's last step.
    for step, point in enumerate(f.points):
        running = solution.num_steps > step
        torch.testing.assert_close(
            solution.residual_history[step][running],
            relative_residual(problem.f, point)[running],
            rtol=1e-3,
            atol=slack,
        )
        last = solution.residual_history[solution.num_steps - 1, torch.arange(batch_size)]
        assert torch.equal(solution.residual_history[step][~running], last[~running])
    # The best point that is no farther away than z0 is returned, and a sample stops at the first that is good enough.
    distances = torch.stack([(problem.f(point) - point).double().norm(dim=1) for point in f.points])
    candidates = (distances <= distances[0]) | (solution.residual_history <= rtol)
    assert torch.equal(
        solution.relative_residual, solution.residual_history.masked_fill(~candidates, torch.inf).amin(dim=0)
    )
    for sample, steps in enumerate(solution.num_steps.tolist()):
        assert (solution.residual_history[: steps - 1, sample] > rtol).all()
        assert steps == 25 or solution.converged[sample]


@problem_names
@solver_names
def test_value_is_never_worse_than_z0(solver_name, problem_name):
    problem = PROBLEMS[problem_name](torch.float64)
    z0 = problem.z_star + 1e-3
    solution = solve(problem.f, z0, solver=build(solver_name, rtol=1e-12, max_steps=4))
    assert (solution.relative_residual <= relative_residual(problem.f, z0) * (1 + 1e-9)).all()


@solver_names
def test_first_point_returned_where_nothing_better_is_found(solver_name):
    def f(z):  # every point but z0 is worse, whatever the solver does
        return torch.where(z == 1.0, 1.5, z + 1e3 * (1 + z.abs()))

    z0 = torch.ones(2, 3)
    solution = solve(f, z0, solver=build(solver_name, max_steps=6))
    assert torch.equal(solution.value, z0)
    assert not solution.converged.any()
    torch.testing.assert_close(solution.relative_residual, torch.full((2,), 0.5 / 1.5))


@problem_names
@solver_names
def test_fixed_point_as_z0_takes_one_step(solver_name, problem_name):
    problem = PROBLEMS[problem_name](torch.float64)
    solution = solve(problem.f, problem.z_star, solver=build(solver_name, rtol=1e-9))
    assert torch.equal(solution.value, problem.z_star)
    assert (solution.num_steps == 1).all()
    with torch.no_grad():
        assert solve(problem.f, problem.z_star, solver=build(solver_name, rtol=1e-9)).num_evals == 1


@solver_names
def test_exact_fixed_point_beside_a_running_sample_stays_finite(solver_name):
    slopes = torch.tensor([[0.5, 0.5], [0.9, -0.8], [0.0, 0.0]])
    f = Recorder(lambda z: slopes * z + torch.tensor([[0.0], [1.0], [0.0]]))  # z0 = 0 is exact for two samples
    solution = solve(f, torch.zeros(3, 2), solver=build(solver_name, rtol=1e-5, max_steps=200))
    assert solution.result is Result.CONVERGED
    assert solution.num_steps.tolist()[::2] == [1, 1]
    assert all(point.isfinite().all() and (point[::2] == 0).all() for point in f.points)


@dtypes
@pytest.mark.parametrize("problem_name", ["one_hard_sample", "stiff", "cosine"])
@solver_names
def test_sample_has_bitwise_the_same_answer_alone_and_beside_others(solver_name, problem_name, dtype):
    problem = PROBLEMS[problem_name](dtype)
    solver = build(solver_name, rtol=RTOL[dtype], max_steps=25)
    together = solve(problem.f, problem.z0, solver=solver)
    for i in range(len(problem.z0)):
        alone = solve(problem.f_of_sample(i), problem.z0[i : i + 1], solver=solver)
        for name in ("value", "relative_residual", "num_steps", "converged"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[i : i + 1]), name
    if problem_name == "one_hard_sample":  # else nothing was frozen, and the test would say nothing
        assert len(set(together.num_steps.tolist())) > 1


@solver_names
def test_frozen_sample_is_not_evaluated_elsewhere(solver_name):
    problem = PROBLEMS["one_hard_sample"](torch.float64)
    f = Recorder(problem.f)
    solution = solve(f, problem.z0, solver=build(solver_name, rtol=1e-6, max_steps=50))
    easy = int(solution.num_steps.argmin())
    steps = int(solution.num_steps[easy])
    assert steps < f.count - 3
    for point in f.points[steps:]:
        assert torch.equal(point[easy], solution.value[easy])


@pytest.mark.parametrize("problem_name", ["affine", "tanh", "rotation_slow"])
@solver_names
def test_any_split_of_a_batch_gives_the_same_answers(solver_name, problem_name):
    problem = PROBLEMS[problem_name](torch.float64)
    solver = build(solver_name, rtol=1e-6, max_steps=30)
    together = solve(problem.f, problem.z0, solver=solver)
    batch_size = len(problem.z0)
    for i in range(batch_size):
        # The other rows repeat this one: its own map, another batch.
        order = torch.arange(batch_size).roll(-i)
        rolled = solve(lambda z, o=order: problem.f(z[o.argsort()])[o], problem.z0[order], solver=solver)
        torch.testing.assert_close(rolled.value, together.value[order], rtol=1e-9, atol=1e-12)
        assert torch.equal(rolled.num_steps, together.num_steps[order])


# --- options ---------------------------------------------------------------------------------------------------------

OPTIONS = [
    (FixedPointIteration, "tanh", {}, {"damping": 0.5}),
    (Anderson, "tanh", {}, {"damping": 0.5}),
    (Anderson, "tanh", {}, {"history_size": 2}),
    (Anderson, "tanh", {}, {"ridge": 1e-1}),
    (Anderson, "tanh", {}, {"projection": "type_i"}),
    (Broyden, "tanh", {}, {"damping": 0.5}),
    (Broyden, "tanh", {}, {"history_size": 3}),
    (Broyden, "stiff", {}, {"line_search_steps": 2}),
    (Broyden, "stiff", {"line_search_steps": 1}, {"line_search_steps": 2}),
    (GMRES, "affine", {}, {"restart": 2}),
    *[(cls, "affine", {}, option) for cls in ALL for option in ({"rtol": 1e-1}, {"atol": 1e-1}, {"max_steps": 3})],
    *[(cls, "affine", {"rtol": 1e-2}, {"min_steps": 15}) for cls in ALL],
]


@pytest.mark.parametrize(
    ("cls", "problem_name", "fields", "change"),
    OPTIONS,
    ids=[f"{cls.__name__}-{'-'.join(change)}-{i}" for i, (cls, _, _, change) in enumerate(OPTIONS)],
)
def test_every_option_changes_the_computation(cls, problem_name, fields, change):
    problem = PROBLEMS[problem_name](torch.float64)
    points = []
    for extra in ({}, change):
        f = Recorder(problem.f)
        solve(f, problem.z0, solver=cls(**{"rtol": 1e-8, "max_steps": 20, **fields, **extra}))
        points.append(f.points)
    same_length = len(points[0]) == len(points[1])
    assert not same_length or not all(torch.allclose(a, b) for a, b in zip(*points, strict=True))


def test_options_table_covers_every_field():
    for cls in ALL:
        covered = {name for owner, _, _, change in OPTIONS if owner is cls for name in change}
        assert covered == set(cls.__dataclass_fields__)


@pytest.mark.parametrize(
    "fields", [{"rtol": 1e-3, "atol": 0.0}, {"rtol": 0.0, "atol": 1e-2}, {"rtol": 1e-3, "atol": 1e-2}]
)
@solver_names
def test_stop_follows_the_stated_criterion(solver_name, fields):
    problem = PROBLEMS["affine"](torch.float64)
    scaled = Recorder(lambda z: 10 * problem.f(z / 10))  # so that absolute and relative differ
    solution = solve(scaled, problem.z0, solver=build(solver_name, max_steps=100, **fields))
    fz = scaled.f(solution.value)
    distance, scale = (fz - solution.value).norm(dim=1), fz.norm(dim=1)
    assert (distance <= fields["atol"] + fields["rtol"] * scale).all()
    for sample, steps in enumerate(solution.num_steps.tolist()):
        for point in scaled.points[: steps - 1]:
            fz = scaled.f(point)[sample]
            assert (fz - point[sample]).norm() > fields["atol"] + fields["rtol"] * fz.norm()


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        *[
            (cls, fields)
            for cls in ALL
            for fields in (
                {"rtol": -1e-3},
                {"rtol": float("nan")},
                {"rtol": float("inf")},
                {"atol": -1.0},
                {"atol": float("inf")},
                {"rtol": 0.0, "atol": 0.0},
                {"max_steps": -1},
                {"max_steps": 2.5},
                {"max_steps": True},
                {"min_steps": -1},
                {"min_steps": 31.0},
                {"min_steps": 100},
            )
        ],
        *[(cls, {"damping": value}) for cls in (FixedPointIteration, Anderson, Broyden) for value in (-0.1, 1.0)],
        (Anderson, {"history_size": 0}),
        (Anderson, {"history_size": 1.5}),
        (Anderson, {"ridge": -0.1}),
        (Anderson, {"ridge": 1.0}),
        (Broyden, {"history_size": 0}),
        (Broyden, {"line_search_steps": -1}),
        (Broyden, {"line_search_steps": 0.5}),
        (GMRES, {"restart": 0}),
    ],
    ids=str,
)
def test_bad_value_raises_at_construction_and_names_the_field(cls, fields):
    with pytest.raises(ValueError, match="both 0" if len(fields) == 2 else next(iter(fields))) as error:
        cls(**fields)
    assert cls.__name__ in str(error.value)


@pytest.mark.parametrize("cls", ALL)
def test_unknown_keyword_and_positional_values_are_type_errors(cls):
    with pytest.raises(TypeError, match="stop_mode"):
        cls(stop_mode="abs")
    with pytest.raises(TypeError, match="positional"):
        cls(1e-3)


@pytest.mark.parametrize("cls", ALL)
def test_solver_is_an_immutable_value(cls):
    solver = cls(rtol=1e-2)
    with pytest.raises(AttributeError):
        solver.rtol = 1.0
    assert solver == cls(rtol=1e-2)
    assert solver != cls(rtol=1e-3)
    assert hash(solver) == hash(cls(rtol=1e-2))


def test_solver_keeps_no_more_vectors_than_its_window():
    z, g = torch.zeros(2, 7, dtype=torch.float64), torch.Generator().manual_seed(0)
    for solver, count in [
        (Anderson(history_size=3), lambda s: s.differences.size),
        (Broyden(history_size=3), lambda s: len(s.directions)),
        (GMRES(restart=3, max_steps=50), lambda s: s.basis.size),
    ]:
        state, kept = solver.init(z), []
        for _ in range(20):
            fz = torch.randn(2, 7, dtype=torch.float64, generator=g)
            z, state = solver.step(z, fz, fz - z, state)
            kept.append(count(state))
        assert max(kept) == 3


# --- each solver against its definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 40])
@solver_names
def test_num_stored_bounds_the_vectors_of_a_state_and_is_reached(solver_name, steps):
    solver = build(solver_name, max_steps=steps)
    slopes = torch.linspace(-0.9, 0.9, 47, dtype=torch.float64)  # so wide that nothing else in a state has this width
    z = torch.zeros(2, 47, dtype=torch.float64)
    state, most = solver.init(z), 0
    for _ in range(steps):
        fz = slopes * z + 1.0
        z, state = solver.step(z, fz, fz - z, state)
        leaves = {leaf.data_ptr(): leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)}
        states = [leaf for leaf in leaves.values() if leaf.ndim > 1 and leaf.shape[-1] == z.shape[-1]]
        most = max(most, sum(leaf.numel() for leaf in states) // z.numel())
    assert solver.num_stored - 2 <= most <= solver.num_stored


@solver_names
def test_map_without_fixed_point_gives_finite_points_and_a_status(solver_name):
    f = Recorder(lambda z: z + 1.0 + z.abs())
    solution = solve(f, torch.zeros(2, 3), solver=build(solver_name, max_steps=15))
    assert solution.result is Result.MAX_STEPS
    assert all(point.isfinite().all() for point in f.points)


@pytest.mark.parametrize(
    "solver", [GMRES(rtol=1e-8), Broyden(rtol=1e-8, max_steps=200), Anderson(rtol=1e-8, max_steps=200)]
)
def test_solver_as_backward_solver_counts_the_first_product_as_free(solver):
    problem = PROBLEMS["tanh"](torch.float64)
    shift = torch.zeros_like(problem.z0).requires_grad_()
    reports = []
    solution = solve(
        lambda z: problem.f(z + shift),
        problem.z0,
        solver=Broyden(rtol=1e-9, max_steps=100),
        adjoint=ImplicitAdjoint(solver=solver, callback=reports.append),
    )
    solution.value.sum().backward()
    (backward,) = reports
    assert backward.converged.all()
    assert backward.num_evals == int(backward.num_steps.max()) - 1
