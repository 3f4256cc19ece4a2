"""The loop: when it stops, what it keeps, and what it must not touch."""

from dataclasses import replace

import pytest
import torch

from deepeq import GMRES, Anderson, Broyden, FixedPointIteration, NewtonKrylov, Result, Solver
from deepeq.iterate import iterate
from deepeq.problem import Problem
from tests.problems import PROBLEMS, Recorder, relative_residual, solve

SOLVERS = [
    FixedPointIteration(rtol=1e-4, max_steps=40),
    Anderson(rtol=1e-4, max_steps=40),
    Broyden(rtol=1e-4, max_steps=40),
    GMRES(rtol=1e-4, max_steps=40),
]


def run(f, solver, z0, *, first=None, verify=False, **options):
    """`iterate`; the evaluation that verifies is left out where the evaluations of the search are looked at."""
    return iterate(Problem(function=f, first=first, verify=verify), solver, z0, **options)


solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)


@pytest.mark.parametrize("check_every", [2, 3, 4, 7, 100])
@pytest.mark.parametrize("problem_name", ["one_hard_sample", "affine", "rotation_slow"])
@solvers
def test_check_every_changes_the_cost_alone(solver, problem_name, check_every):
    problem = PROBLEMS[problem_name](torch.float64)
    every = run(problem.f, solver, problem.z0, check_every=1)
    f = Recorder(problem.f)
    seldom = run(f, solver, problem.z0, check_every=check_every)
    for name in ("value", "relative_residual", "converged", "num_steps"):
        assert torch.equal(getattr(every, name), getattr(seldom, name)), name
    assert every.result is seldom.result
    steps = int(every.num_steps.max())
    assert torch.equal(seldom.residual_history[:steps], every.residual_history)
    assert (seldom.residual_history[steps:] == every.residual_history[-1]).all()
    needed = min(-(-steps // check_every) * check_every, solver.max_steps)
    assert seldom.num_evals == f.count == len(seldom.residual_history) == needed


@solvers
def test_known_f_z0_saves_one_evaluation_and_nothing_else(solver):
    problem = PROBLEMS["affine"](torch.float64)
    plain, saving = Recorder(problem.f), Recorder(problem.f)
    without = run(plain, solver, problem.z0)
    given = run(saving, solver, problem.z0, first=problem.f(problem.z0))
    assert torch.equal(without.value, given.value)
    assert torch.equal(without.residual_history, given.residual_history)
    assert torch.equal(without.num_steps, given.num_steps)
    assert saving.count == given.num_evals == without.num_evals - 1 == plain.count - 1
    assert all(torch.equal(a, b) for a, b in zip(plain.points[1:], saving.points, strict=True))


@solvers
def test_known_f_z0_at_a_fixed_point_needs_no_evaluation(solver):
    problem = PROBLEMS["affine"](torch.float64)
    f = Recorder(problem.f)
    solution = run(f, solver, problem.z_star, first=problem.f(problem.z_star))
    assert f.count == solution.num_evals == 0
    assert solution.num_steps.tolist() == [1] * len(problem.z_star)


@pytest.mark.parametrize("max_steps", [1, 2, 5])
@solvers
def test_max_steps_bounds_the_evaluations(solver, max_steps):
    problem = PROBLEMS["rotation_slow"](torch.float64)
    f = Recorder(problem.f)
    solution = run(f, type(solver)(rtol=1e-12, max_steps=max_steps), problem.z0)
    assert f.count == solution.num_evals == len(solution.residual_history) == max_steps
    assert solution.num_steps.tolist() == [max_steps] * len(problem.z0)
    assert solution.result is Result.MAX_STEPS


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [1, 2, 5])
@solvers
def test_nonfinite_value_ends_its_own_problem_alone_and_keeps_the_best_points(solver, step, bad):
    """A mask that multiplies would turn the stored best point of sample 1 into NaN here."""
    problem = PROBLEMS["one_hard_sample"](torch.float64)
    count = 0

    def f(z):
        nonlocal count
        count += 1
        fz = problem.f(z)
        if count >= step:
            fz[1] = bad
        return fz

    healthy = run(problem.f, solver, problem.z0)
    solution = run(f, solver, problem.z0)
    assert solution.result is Result.NONFINITE
    assert not solution.converged[1]
    assert solution.num_steps[1] == step
    assert solution.value.isfinite().all()
    others = [0, 2]
    for name in ("value", "relative_residual", "converged", "num_steps"):
        assert torch.equal(getattr(solution, name)[others], getattr(healthy, name)[others]), name
    torch.testing.assert_close(relative_residual(problem.f, solution.value)[[0, 2]], solution.relative_residual[[0, 2]])
    if step == 1:
        assert torch.equal(solution.value[1], problem.z0[1])
    else:
        torch.testing.assert_close(relative_residual(problem.f, solution.value)[1], solution.relative_residual[1])
        assert solution.relative_residual[1] in healthy.residual_history[: step - 1, 1]
        assert solution.absolute_residual[1] <= (problem.f(problem.z0) - problem.z0)[1].norm() * (1 + 1e-12)


@pytest.mark.parametrize("later", [float("nan"), 0.0], ids=["nan", "better"])
@pytest.mark.parametrize("step", [1, 3])
@solvers
def test_sample_that_is_done_is_not_touched_by_what_f_says_later(solver, step, later):
    problem = PROBLEMS["affine"](torch.float64)
    z0 = problem.z0.clone()
    z0[0] = problem.z_star[0] * (1 + 1e-6)
    count = 0

    def f(z):
        nonlocal count
        count += 1
        fz = problem.f(z)
        if count > step:
            fz[0] = z[0] + later
        return fz

    solution = run(f, solver, z0)
    assert solution.result is not Result.NONFINITE
    assert solution.relative_residual[0] > 0
    assert (solution.residual_history[:, 0] == solution.relative_residual[0]).all()
    assert torch.equal(solution.value[0], z0[0])
    assert solution.converged[0]


class _Jump(FixedPointIteration):
    """A rule that jumps to infinity with one sample."""

    def step(self, z, fz, g, state):
        z_next = fz.clone()
        if z.abs().sum() > 0:
            z_next[1] = torch.inf
        return z_next, None


def test_nonfinite_point_of_a_rule_does_not_poison_the_best_point():
    problem = PROBLEMS["one_hard_sample"](torch.float64)
    solution = run(problem.f, _Jump(rtol=1e-4), problem.z0)
    assert solution.result is Result.NONFINITE
    assert not solution.converged[1]
    assert solution.num_steps[1] == 3
    assert solution.value.isfinite().all()
    torch.testing.assert_close(
        relative_residual(problem.f, solution.value), solution.relative_residual, rtol=1e-6, atol=1e-12
    )


class _Watch(FixedPointIteration):
    """Notes the modes that a rule runs under."""

    def step(self, z, fz, g, state):
        seen.append((torch.is_autocast_enabled("cpu"), (z @ z.T).dtype, fz.dtype))
        return super().step(z, fz, g, state)


seen: list[tuple[bool, torch.dtype, torch.dtype]] = []


def test_autocast_reaches_f_and_not_the_solver():
    weight, dtypes = 0.3 * torch.randn(4, 4), []

    def f(z):
        product = z @ weight
        dtypes.append(product.dtype)
        return torch.tanh(product.float() + 1.0)

    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(f, _Watch(max_steps=4, rtol=1e-9), torch.zeros(2, 4))
        assert torch.is_autocast_enabled("cpu")
    assert dtypes == [torch.bfloat16] * 4
    assert seen == [(False, torch.float32, torch.float32)] * 3


@pytest.mark.parametrize("solver", SOLVERS[:3], ids=lambda solver: type(solver).__name__)
def test_autocast_does_not_set_a_residual_floor(solver):
    """With 16-bit algebra in the solver the residual of an elementwise map would stop near 1e-2."""
    z0, slopes = torch.zeros(2, 6), torch.linspace(-0.8, 0.8, 6)
    tight = type(solver)(rtol=2e-6, max_steps=200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = run(lambda z: slopes * z + 1.0, tight, z0)
    without = run(lambda z: slopes * z + 1.0, tight, z0)
    assert solution.converged.all()
    assert torch.equal(solution.value, without.value)


def test_autocast_settings_of_the_caller_are_restored_inside_f():
    inside = []

    def f(z):
        inside.append(
            (
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
                torch.is_autocast_cache_enabled(),
            )
        )
        return 0.5 * z + 1.0

    for dtype, cache in [(torch.bfloat16, True), (torch.float16, False)]:
        inside.clear()
        with torch.autocast("cpu", dtype=dtype, cache_enabled=cache):
            run(f, FixedPointIteration(max_steps=2, rtol=1e-9), torch.zeros(1, 2))
        assert inside == [(True, dtype, cache)] * 2


@solvers
def test_iterate_raises_nothing_and_writes_into_nothing(solver):
    z0 = torch.randn(2, 3)
    before = z0.clone()
    returned = []

    def f(z):
        returned.append((z, z.clone()))
        return z * torch.nan if len(returned) == 3 else 2.0 * z.sin() + 1.0

    assert run(f, solver, z0).result is Result.NONFINITE
    assert torch.equal(z0, before)
    assert all(torch.equal(z, copy) for z, copy in returned)


@solvers
def test_iterate_is_a_pure_function_of_its_arguments(solver):
    problem = PROBLEMS["tanh"](torch.float32)
    first, second = (run(problem.f, solver, problem.z0) for _ in range(2))
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.residual_history, second.residual_history)


def test_huge_but_finite_map_is_not_mistaken_for_converged():
    solution = run(lambda z: 3.0 * z + 1e30, FixedPointIteration(max_steps=50), torch.zeros(1, 2))
    assert solution.result is not Result.CONVERGED
    assert not solution.converged.any()


def test_solver_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Solver()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [Anderson(max_steps=60), Anderson(projection="type_ii"), Broyden(max_steps=60)])
@pytest.mark.parametrize("shift", [lambda x: x, torch.tanh, lambda x: 1e-3 * x], ids=["x", "tanh", "small"])
def test_a_map_without_an_equilibrium_is_never_called_converged(shift, solver, dtype):
    """Where `f(z) = z + c`, the relative residual `||c|| / ||z||` falls with every step although nothing converges."""
    c = shift(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).to(dtype))
    solution = solve(lambda z: z + c, torch.zeros_like(c), solver=replace(solver, rtol=1e-2), nonfinite="keep")
    assert not solution.converged.any()


@pytest.mark.parametrize("num_steps", [400, 4000])
def test_plain_iteration_away_from_everything_is_told_as_such(num_steps):
    solver = FixedPointIteration(rtol=1e-2, max_steps=num_steps)
    solution = solve(lambda z: z + 1.0, torch.zeros(1, 3), solver=solver)
    assert not solution.converged.any()
    assert "no equilibrium in sight" in solution.message


@pytest.mark.parametrize("slope", [0.9, 0.99, 0.999])
def test_an_equilibrium_far_away_is_found(slope):
    z0 = torch.zeros(1, 4, dtype=torch.float64)
    solution = solve(lambda z: slope * z + 1.0, z0, solver=Anderson(rtol=1e-6))
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, torch.full_like(z0, 1 / (1 - slope)), rtol=1e-3, atol=0.0)


def test_a_start_beside_an_unstable_equilibrium_may_leave_it():
    """The first residual is tiny there, and no measure of the others."""
    solution = solve(lambda z: torch.tanh(3 * z) + 1e-9, torch.zeros(1, 1), solver=FixedPointIteration(max_steps=60))
    assert solution.converged.all()
    assert solution.value.item() == pytest.approx(0.9949, abs=1e-3)


# --- problems that are done leave the solve -------------------------------------------------------------------------


class Slopes:
    """`f(z) = slope z + 1` for problems of very different difficulty, which counts the rows that it evaluates."""

    def __init__(self, slopes, log):
        self.slopes, self.log = slopes, log

    def __call__(self, z):
        self.log.append(len(z))
        return self.slopes * z + 1.0

    def take(self, rows):
        return Slopes(self.slopes[rows], self.log)


SLOPES = torch.cat([torch.linspace(0.0, 0.1, 12), torch.tensor([-2.0, 0.9, 0.99, 0.5])]).double().unsqueeze(1)
SLOPES = SLOPES + torch.linspace(-0.3, 0.0, 6, dtype=torch.float64) * (torch.arange(16).unsqueeze(1) >= 12)
SHRINKING = [
    FixedPointIteration(rtol=1e-6, max_steps=40, damping=0.4),
    Anderson(rtol=1e-9, max_steps=40),
    Broyden(rtol=1e-9, max_steps=40),
    GMRES(rtol=1e-9, max_steps=40),
    NewtonKrylov(rtol=1e-9, max_steps=40),
]


@pytest.mark.parametrize("solver", SHRINKING, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_answers_are_the_same_where_problems_that_are_done_leave(solver, with_gradients):
    logs, solutions = [], []
    for cls in (Slopes, type("Whole", (Slopes,), {"take": None})):
        logs.append([])
        with torch.set_grad_enabled(with_gradients):
            solutions.append(solve(cls(SLOPES, logs[-1]), torch.zeros(16, 6, dtype=torch.float64), solver=solver))
    left, whole = solutions
    torch.testing.assert_close(left.value, whole.value, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(left.relative_residual, whole.relative_residual, rtol=1e-6, atol=1e-13)
    assert torch.equal(left.num_steps, whole.num_steps)
    assert torch.equal(left.converged, whole.converged)
    assert left.num_evals == len(logs[0])
    if not isinstance(solver, NewtonKrylov):
        assert min(logs[0]) <= 4
        assert logs[0][-1] == 16  # the last one sees all problems, and checks them together
    assert min(logs[1]) == 16


@pytest.mark.parametrize("mode", ["autocast", "inference"])
def test_the_rows_that_remain_are_evaluated_in_the_modes_of_the_caller(mode):
    class Recorded(Slopes):
        def __call__(self, z):
            modes = torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
            self.log.append((len(z), modes))
            return self.slopes * z + 1.0

        def take(self, rows):
            return Recorded(self.slopes[rows], self.log)

    log, z0 = [], torch.zeros(16, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else torch.inference_mode():
        solve(Recorded(SLOPES, log), z0, solver=Anderson(rtol=1e-9, max_steps=40))
    assert min(size for size, _ in log) <= 4
    assert {modes for _, modes in log} == {(mode == "autocast", mode == "inference")}


def test_rows_that_leave_although_they_are_coupled_are_found_out():
    class Coupled(Slopes):
        def __call__(self, z):
            return super().__call__(z) + 0.3 * z.mean(dim=0, keepdim=True)

    solution = solve(Coupled(SLOPES, []), torch.zeros(16, 6, dtype=torch.float64), solver=Anderson(rtol=1e-6))
    assert not solution.converged.any()
