"""Solves that fail: what is claimed, what is said, who is named, and what can still be used."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepeq import (
    DEQ,
    GMRES,
    Anderson,
    BackpropAdjoint,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    FixedPointIteration,
    ImplicitAdjoint,
    NeumannAdjoint,
    PhantomAdjoint,
    Result,
    Solver,
    fixed_point,
    root_find,
)
from tests.problems import PROBLEMS, solve

SOLVERS = [
    FixedPointIteration(max_steps=60),
    Anderson(max_steps=60),
    Broyden(max_steps=60),
    GMRES(rtol=1e-3, max_steps=60),
]
solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
ADJOINTS = {
    "implicit": ImplicitAdjoint(),
    "implicit_checkpoint": ImplicitAdjoint(checkpoint=True),
    "implicit_twice": ImplicitAdjoint(twice_differentiable=True),
    "phantom": PhantomAdjoint(),
    "neumann": NeumannAdjoint(),
    "backprop": BackpropAdjoint(),
}
adjoints = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=list(ADJOINTS))
SLOW = FixedPointIteration(max_steps=3)


def slow(z: Tensor) -> Tensor:
    return 0.9 * z + 1.0


# --- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("max_steps", [30, 100, 120, 130, 900, 1100])
@pytest.mark.parametrize("gain", [1.1, 2.0, -3.0])
def test_diverging_iteration_is_never_called_converged(gain, max_steps, dtype):
    """Far away `||g|| / ||f||` is small or constant, squares overflow, and `inf <= inf` holds."""
    z0 = torch.zeros(2, 3, dtype=dtype)
    f = lambda z: gain * z + 1.0  # noqa: E731
    solution = solve(f, z0, solver=FixedPointIteration(rtol=1e-2, max_steps=max_steps), nonfinite="keep")
    assert solution.result is not Result.CONVERGED
    assert not solution.converged.any()
    assert solution.value.isfinite().all()
    assert (solution.relative_residual > 1e-2).all()


@pytest.mark.parametrize("problem_name", ["rotation_diverging", "stiff", "diverging", "one_hard_sample"])
@pytest.mark.parametrize("history_size", [1, 2])
def test_short_history_never_claims_what_it_did_not_find(history_size, problem_name):
    problem = PROBLEMS[problem_name](torch.float32)
    solver = Broyden(rtol=1e-4, max_steps=500, history_size=history_size)
    solution = solve(problem.f, problem.z0, solver=solver, nonfinite="keep")
    right = (solution.value - problem.z_star).norm(dim=1) <= 1e-2 * problem.z_star.norm(dim=1)
    assert torch.equal(solution.converged, solution.converged & right)
    assert (solution.result is Result.CONVERGED) == bool(solution.converged.all())


@pytest.mark.parametrize("max_steps", [30, 300, 5000])
def test_diverging_backward_is_never_called_converged(max_steps):
    problem, reports = PROBLEMS["rotation_diverging"](torch.float32), []
    shift = torch.zeros_like(problem.z0).requires_grad_()
    adjoint = ImplicitAdjoint(
        solver=FixedPointIteration(rtol=1e-2, max_steps=max_steps), on_failure="raise", callback=reports.append
    )
    value = fixed_point(lambda z: problem.f(z) + shift, problem.z0, solver=Broyden(), adjoint=adjoint).value
    with pytest.raises(ConvergenceError, match="^backward pass: "):
        value.sum().backward()
    assert not reports[0].converged.any()
    assert reports[0].result is not Result.CONVERGED
    assert reports[0].value.isfinite().all()
    assert shift.grad is None


def test_far_point_with_a_smaller_relative_residual_is_not_the_best():
    """`z <- 2 z + 1` from 0: the relative residual falls from 1 to 1/2, and every point is farther from -1."""
    solution = solve(lambda z: 2.0 * z + 1.0, torch.zeros(1, 1), solver=FixedPointIteration(max_steps=20))
    assert (solution.residual_history[1:] < solution.residual_history[0]).all()
    assert solution.value.item() == 0.0
    assert solution.relative_residual.item() == solution.absolute_residual.item() == 1.0


def test_converged_point_may_be_farther_in_absolute_terms_than_the_first():
    """From a residual of 1e-3 at 1e-3 to one of 0.5 at 1000: relative accuracy is what was asked for."""

    def f(z):
        return torch.where(z < 1.5e-3, 2e-3, torch.where(z < 1.0, 1000.0, z + 0.5))

    solution = fixed_point(f, torch.full((1, 1), 1e-3), solver=FixedPointIteration())
    assert solution.converged.all()
    assert solution.value.item() == 1000.0


# --- non-finite values -----------------------------------------------------------------------------------------------


def one_breaks(step: int, bad: float = torch.nan, problems: tuple[int, ...] = (2,)):
    """Four problems `z = 0.5 z + i`, of which some return `bad` from a step on."""
    calls = 0
    shift = torch.arange(1.0, 5.0).unsqueeze(1).repeat(1, 2).requires_grad_()

    def f(z):
        nonlocal calls
        calls += 1
        fz = 0.5 * z + shift
        if calls >= step:
            broken = torch.zeros(4, 1, dtype=torch.bool)
            broken[list(problems)] = True
            fz = torch.where(broken, bad, fz)
        return fz

    return f, shift


OTHERS = [0, 1, 3]
STEADY = FixedPointIteration(rtol=1e-5, max_steps=60)


@adjoints
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_sample_is_named_and_the_others_are_solved(adjoint, bad):
    f, _ = one_breaks(6, bad)
    with pytest.raises(
        ConvergenceError,
        match=r"^f returned a non-finite value at step 6, in problem 2 of 4 \(samples are counted from 0\): ",
    ) as error:
        fixed_point(f, torch.zeros(4, 2), solver=STEADY, adjoint=adjoint)
    solution = error.value.solution
    assert str(error.value) == f"{solution.message}; error.solution and nonfinite='keep' give the other problems"
    assert solution.result is Result.NONFINITE
    assert solution.converged.tolist() == [True, True, False, True]
    assert solution.num_steps[2] == 6
    expected = 2.0 * torch.arange(1.0, 5.0).unsqueeze(1).expand(4, 2)
    torch.testing.assert_close(solution.value.detach()[OTHERS], expected[OTHERS], rtol=1e-3, atol=0.0)
    assert solution.value.isfinite().all()


def test_first_of_several_bad_samples_is_named_and_the_rest_are_counted():
    f, _ = one_breaks(4, problems=(1, 2, 3))
    with pytest.raises(ConvergenceError, match=r"at step 4, in problem 1 of 4 .*, and in 2 more: "):
        fixed_point(f, torch.zeros(4, 2), solver=STEADY)


@pytest.mark.parametrize("on_failure", ["ignore", "warn", "raise"])
def test_kept_nonfinite_solution_is_treated_like_a_missed_tolerance(on_failure):
    f, _ = one_breaks(6)

    def run():
        return fixed_point(f, torch.zeros(4, 2), solver=STEADY, nonfinite="keep", on_failure=on_failure)

    said = "f returned a non-finite value at step 6, in problem 2"
    if on_failure == "raise":
        with pytest.raises(ConvergenceError, match=said):
            run()
        return
    if on_failure == "warn":
        with pytest.warns(ConvergenceWarning, match=said):
            solution = run()
    else:
        solution = run()
    assert solution.result is Result.NONFINITE
    assert solution.converged.tolist() == [True, True, False, True]
    assert solution.value.isfinite().all()


def test_kept_nonfinite_problem_holds_its_best_finite_point_and_the_others_their_gradients():
    """`f` is finite at the best point: it broke at a later one."""
    slopes = torch.tensor([[0.5], [-1.5]])
    shift = torch.ones(2, 1, requires_grad=True)

    def f(z):
        fz = slopes * z + shift
        return torch.where(fz.abs() > 3.0, torch.nan, fz)

    solution = solve(f, torch.full((2, 1), 0.5), solver=FixedPointIteration(rtol=1e-5, max_steps=60), nonfinite="keep")
    assert solution.converged.tolist() == [True, False]
    assert solution.value[1].item() == 0.5
    torch.testing.assert_close(solution.relative_residual[1].item(), 0.25 / 0.25)
    (gradient,) = torch.autograd.grad(solution.value.sum(), shift)
    torch.testing.assert_close(gradient, torch.tensor([[2.0], [0.4]]), rtol=1e-3, atol=0.0)


def test_deq_hands_on_what_happens_to_nonfinite_values():
    class Breaking(nn.Module):
        def forward(self, z, x):
            return torch.where(x > 3.0, torch.nan, 0.5 * z + x)

    x = torch.tensor([[1.0], [4.0]])
    with pytest.raises(ConvergenceError, match=r"step 1 \(the first evaluation, at z0\), in problem 1 of 2"):
        DEQ(Breaking())(x)
    solution = DEQ(Breaking(), nonfinite="keep", on_failure="ignore")(x)
    assert solution.converged.tolist() == [True, False]


def test_nonfinite_gradient_of_one_sample_names_the_backward_pass_and_the_sample():
    bias = torch.zeros(3, 2, requires_grad=True)
    value = fixed_point(lambda z: 0.5 * z + bias, torch.ones(3, 2), solver=Broyden(atol=1e-6)).value
    gradient = torch.zeros(3, 2)
    gradient[1, 0] = torch.inf
    with pytest.raises(ConvergenceError, match=r"^backward pass: .*problem 1 of 3"):
        value.backward(gradient)


@pytest.mark.parametrize("returns", ["equilibrium", "last"])
def test_overflow_of_phantom_steps_spoils_the_value_only_where_it_is_asked_for(returns):
    """The equilibrium -1/2 of `3 z + 1` repels; 200 steps from nearby overflow float32."""
    bias = torch.ones(1, 1, requires_grad=True)
    adjoint = PhantomAdjoint(steps=200, returns=returns)
    with torch.no_grad():
        expected = fixed_point(lambda z: 3.0 * z + bias, torch.full((1, 1), 0.1)).value
    start = Broyden() if returns == "equilibrium" else FixedPointIteration(max_steps=1)
    f = lambda z: 3.0 * z + bias + 1e-3 * z.square()  # noqa: E731
    solution = solve(f, torch.full((1, 1), 0.1), adjoint=adjoint, solver=start)
    value = solution.value
    if returns == "equilibrium":
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=0.0)
        assert solution.converged.all()
        assert "the steps of PhantomAdjoint overflow" in solution.message
    else:
        assert not value.isfinite().all() or value.abs().item() > 1e3


# --- on_failure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [fixed_point, root_find])
def test_default_warns_and_returns(entry):
    f = slow if entry is fixed_point else lambda z: slow(z) - z
    solver = SLOW if entry is fixed_point else FixedPointIteration(max_steps=2, damping=0.9)
    with pytest.warns(ConvergenceWarning, match="above its tolerance") as caught:
        solution = entry(f, torch.zeros(2, 3), solver=solver)
    assert len(caught) == 1
    assert str(caught[0].message) == solution.message
    assert solution.result is Result.MAX_STEPS


@pytest.mark.parametrize("entry", [fixed_point, root_find])
def test_warning_points_at_the_line_of_the_user(entry):
    f = slow if entry is fixed_point else lambda z: slow(z) - z
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entry(f, torch.zeros(2, 3), solver=FixedPointIteration(max_steps=2, damping=0.9))
    (warning,) = caught
    assert Path(warning.filename) == Path(__file__)
    assert "entry(f" in Path(warning.filename).read_text().splitlines()[warning.lineno - 1]


def test_warning_of_a_layer_and_of_its_backward_point_at_the_lines_of_the_user():
    layer = DEQ(nn.Identity(), adjoint=ImplicitAdjoint(solver=GMRES(rtol=1e-12, max_steps=2)), solver=SLOW)
    layer.cell.forward = lambda z, x: torch.tanh(z @ x)
    x = 0.9 * torch.linalg.qr(torch.randn(3, 3))[0].requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = layer(x, z0=torch.ones(3, 3)).value
        value.sum().backward()
    lines = Path(__file__).read_text().splitlines()
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)] * 2
    assert "layer(x" in lines[caught[0].lineno - 1]
    assert "backward()" in lines[caught[1].lineno - 1]


@pytest.mark.parametrize("on_failure", ["ignore", "warn", "raise"])
def test_layer_does_on_failure_what_it_was_told(on_failure):
    class Slow(nn.Module):
        def forward(self, z, x):
            return 0.9 * z + x

    layer, x = DEQ(Slow(), solver=SLOW, on_failure=on_failure), torch.ones(2, 3)
    if on_failure == "raise":
        with pytest.raises(ConvergenceError, match="above its tolerance") as error:
            layer(x)
        assert error.value.solution.value.shape == (2, 3)
        return
    if on_failure == "warn":
        with pytest.warns(ConvergenceWarning, match="above its tolerance"):
            solution = layer(x)
    else:
        solution = layer(x)
    assert solution.result is Result.MAX_STEPS


def test_solve_that_converged_says_nothing():
    solution = fixed_point(torch.cos, torch.zeros(2, 3), on_failure="raise")
    assert solution.message == ""


@pytest.mark.parametrize("options", [{"on_failure": "throw"}, {"on_failure": None}, {"nonfinite": "ignore"}], ids=str)
def test_unknown_choice_is_named_with_the_known_ones(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name}=.*must be one of .*'raise'"):
        fixed_point(torch.cos, torch.zeros(2, 3), **options)


# --- sentences -------------------------------------------------------------------------------------------------------


def message(f, z0, solver, **options) -> str:
    return solve(f, z0, solver=solver, **options).message


@pytest.mark.parametrize(
    "solver",
    [
        Broyden(rtol=1e-9, max_steps=40, history_size=3),
        Anderson(rtol=1e-9, max_steps=40, history_size=3),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_short_history_is_told_to_grow(solver):
    problem = PROBLEMS["one_hard_sample"](torch.float64)
    said = message(problem.f, problem.z0, solver)
    assert "history_size=3" in said
    assert "raise it" in said
    assert "in 1e-3" not in said


@pytest.mark.parametrize("solver", [Broyden(max_steps=40), Anderson(max_steps=40)], ids=lambda s: type(s).__name__)
def test_history_is_not_blamed_where_it_was_never_full(solver):
    problem = PROBLEMS["one_hard_sample"](torch.float64)
    short = type(solver)(rtol=1e-12, max_steps=5)
    assert "history_size" not in message(problem.f, problem.z0, short)


def test_equilibrium_near_zero_asks_for_atol():
    said = message(lambda z: 0.5 * z, torch.ones(2, 3), FixedPointIteration(max_steps=30))
    assert "set atol" in said
    assert "near zero" in said
    fixed_point(lambda z: 0.5 * z, torch.ones(2, 3), solver=FixedPointIteration(atol=1e-4, max_steps=30))


def test_rounding_level_asks_for_more_digits():
    matrix = 0.7 * torch.linalg.qr(torch.randn(20, 20))[0]
    said = message(
        lambda z: torch.tanh(z @ matrix.T + 1.0),
        torch.zeros(2, 20),
        Broyden(rtol=1e-11, max_steps=100, history_size=100),
    )
    assert "the residual is at rounding level: raise rtol" in said


def test_iteration_that_leaves_its_best_point_asks_for_a_safer_one():
    said = message(lambda z: -3.0 * z + 4.0, torch.full((2, 1), 1.001), FixedPointIteration(rtol=1e-5, max_steps=20))
    assert "moves away from its best point" in said
    assert "NewtonKrylov" in said


def test_iteration_that_grows_without_bound_is_not_said_to_stand_still():
    matrix = 2.0 * torch.tensor([[0.0, -1.0], [1.0, 0.0]])  # the relative residual of growing states stays the same
    said = message(lambda z: z @ matrix + 1.0, torch.zeros(1, 2), FixedPointIteration(max_steps=25))
    assert "moves away from its best point" in said
    assert "stopped falling" not in said


@pytest.mark.parametrize(("batch_size", "width"), [(1, 32), (1, 512), (8, 16)])
@pytest.mark.parametrize("graph", [False, True])
def test_ordinary_dropout_is_named(batch_size: int, width: int, graph: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(width, width), torch.randn(batch_size, width)
    with (
        torch.set_grad_enabled(graph),
        pytest.warns(ConvergenceWarning, match="draws random numbers, as ordinary drop"),
    ):
        fixed_point(lambda z: torch.dropout(torch.tanh(0.3 * linear(z) + x), 0.3, True), torch.zeros_like(x))


def test_a_failing_map_that_is_not_random_is_not_called_random() -> None:
    weight = torch.linalg.qr(torch.randn(16, 16))[0]
    with pytest.warns(ConvergenceWarning) as caught:
        solution = fixed_point(
            lambda z: torch.tanh(3 * z @ weight + 1.0), torch.zeros(2, 16), solver=Broyden(max_steps=4)
        )
    assert "random" not in str(caught[0].message)
    assert solution.num_evals == 4 + 1 + 2  # the graph, and two for the question whether the map is random


def test_state_of_several_tensors_is_one_argument() -> None:
    with pytest.raises(
        TypeError, match=r"f is called with the whole state as one argument, here a tuple of 2; take one"
    ):
        fixed_point(lambda a, b: (0.5 * a, 0.5 * b), (torch.ones(2, 3), torch.ones(2, 1)))


def test_injection_of_another_width_is_named() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(32, 32)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.mix(z) + x)

    sentence = r"fails at the first state, of shape \(4, 64\): .*if the input has another width .* project it"
    with pytest.raises(RuntimeError, match=sentence):
        DEQ(Cell())(torch.randn(4, 64))


def test_error_of_the_map_itself_passes_unchanged() -> None:
    with pytest.raises(TypeError, match="^mine$"):
        fixed_point(lambda z: (_ for _ in ()).throw(TypeError("mine")), torch.ones(2, 3))
    with pytest.raises(KeyError, match="mine"):
        fixed_point(lambda z: {}["mine"], torch.ones(2, 3))


def test_error_of_a_solve_inside_of_the_map_passes_unchanged() -> None:
    def f(z: Tensor) -> Tensor:
        raise ConvergenceError("divide g and z by their typical sizes", inner)

    inner = fixed_point(torch.cos, torch.zeros(1, 1))
    with pytest.raises(ConvergenceError, match="^divide g and z by their typical sizes$") as caught:
        fixed_point(f, torch.ones(2, 3))
    assert caught.value.solution is inner


def test_vector_that_is_taken_for_a_batch_is_named() -> None:
    weight = 2.0 * torch.linalg.qr(torch.randn(16, 16))[0]
    said = message(lambda z: torch.tanh(weight @ z + 1.0), torch.zeros(16), Broyden(max_steps=20))
    assert "give z0 the shape (1, 16), or set batch_dims=0" in said


def test_step_that_returns_one_value_is_named() -> None:
    class Half(FixedPointIteration):
        def step(self, z, fz, g, state):  # type: ignore[override]
            return z + 0.5 * g

    with pytest.raises(TypeError, match=r"step of Half must return two values, .* got Tensor"):
        fixed_point(torch.cos, torch.zeros(3, 2), solver=Half())


def test_solution_prints_as_one_line() -> None:
    solution = fixed_point(torch.cos, torch.zeros(5, 3), solver=Broyden())
    steps = int(solution.num_steps.max())
    worst = float(solution.relative_residual.max())
    assert str(solution) == f"Solution(CONVERGED, 5 problems, {steps + 1} evaluations, worst residual {worst:.1e})"
    assert str(solution) == repr(solution)
    with torch.no_grad():
        single = fixed_point(torch.cos, torch.zeros(1, 3), solver=Broyden(max_steps=1), on_failure="ignore")
    assert str(single).startswith("Solution(MAX_STEPS, 1 problem, ")


def test_iteration_that_is_still_falling_asks_for_steps():
    assert message(slow, torch.zeros(2, 1), FixedPointIteration(rtol=1e-6, max_steps=25)).endswith(
        "the residual is still falling: raise max_steps, or loosen rtol"
    )


def test_iteration_that_falls_no_more_asks_for_another_method():
    matrix = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    said = message(lambda z: z @ matrix + 1.0, torch.zeros(1, 2), FixedPointIteration(max_steps=25))
    assert "the residual has stopped falling" in said
    assert "still falling" not in said


def test_sentence_is_about_the_worst_problem_and_its_numbers():
    slopes = torch.tensor([[0.5], [0.99], [0.9]])
    solution = solve(lambda z: slopes * z + 1.0, torch.zeros(3, 1), solver=FixedPointIteration(max_steps=20))
    assert solution.message.startswith(
        f"the residual of problem 1 of 3 (counted from 0) is {solution.relative_residual[1]:.1e} after 20 steps, "
        "above its tolerance (rtol=0.001, atol=0); "
    )


def test_no_steps_are_told_as_such():
    said = message(slow, torch.zeros(2, 1), FixedPointIteration(max_steps=0))
    assert "max_steps=0 of FixedPointIteration runs no search" in said


def test_backward_sentence_gives_the_advice_of_a_linear_equation():
    bias = torch.ones(2, 3, requires_grad=True)
    slopes = torch.tensor([0.9, -0.5, 0.3])
    adjoint = ImplicitAdjoint(solver=Broyden(rtol=1e-10, max_steps=3))
    value = fixed_point(lambda z: slopes * z + bias, torch.zeros(2, 3), adjoint=adjoint).value
    with pytest.warns(ConvergenceWarning, match=r"^backward pass: .* raise max_steps, loosen rtol .*, or take GMRES"):
        value.sum().backward()


@solvers
def test_every_failure_has_one_sentence_and_every_sentence_a_way_out(solver):
    short = type(solver)(rtol=1e-12, max_steps=4)
    for name in ("rotation_slow", "stiff", "tanh"):
        problem = PROBLEMS[name](torch.float64)
        said = message(problem.f, problem.z0, short)
        assert any(word in said for word in ("raise", "try", "use ")), said
        assert "\n" not in said


# --- mistakes of beginners -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [lambda s: s * 2, lambda s: 2 * s, lambda s: s + 1, lambda s: s.shape, lambda s: s.sum(), lambda s: s @ s.value],
    ids=["times", "times_left", "plus", "shape", "sum", "matmul"],
)
def test_a_solution_that_is_used_as_a_tensor_names_its_value(use) -> None:
    solution = fixed_point(torch.cos, torch.zeros(1, 1))
    with pytest.raises((TypeError, AttributeError), match=r"\.value"):
        use(solution)


def test_a_solution_as_first_state_names_its_value() -> None:
    solution = fixed_point(torch.cos, torch.zeros(1, 1))
    with pytest.raises(TypeError, match=r"z0 is a Solution; give its \.value"):
        fixed_point(torch.cos, solution)


@dataclass(frozen=True, kw_only=True)
class _Rule(Solver):
    how: str = ""

    @property
    def num_stored(self) -> int:
        return 0

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, g: Tensor, state: None) -> Any:
        if self.how == "in place":
            z += g
            return z, state
        return (z + g)[:1], state


@pytest.mark.parametrize(
    ("how", "sentence"),
    [("in place", "changed z in place"), ("shape", r"of shape \(2, 3\) .*got a tuple of \(1, 3\), \(None,\)")],
)
def test_a_rule_that_breaks_its_contract_is_named(how: str, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3), solver=_Rule(how=how))


@pytest.mark.parametrize("gain", [0.9, 1.0], ids=["falling", "stands still"])
def test_the_tolerance_that_is_set_is_the_one_to_loosen(gain: float) -> None:
    solver = FixedPointIteration(rtol=0.0, atol=1e-6, max_steps=6)
    said = message(lambda z: gain * z + 1, torch.zeros(1, 1), solver)
    assert "loosen atol" in said
    assert "loosen rtol" not in said


def test_the_tolerance_of_a_backward_solve_that_is_set_is_the_one_to_loosen() -> None:
    shift = torch.ones(1, 2, requires_grad=True)
    adjoint = ImplicitAdjoint(solver=Broyden(rtol=0.0, atol=1e-9, max_steps=1))
    value = fixed_point(lambda z: 0.9 * z.flip(1) + shift, torch.zeros(1, 2), solver=Broyden(), adjoint=adjoint).value
    with pytest.warns(ConvergenceWarning, match=r"loosen atol, or take GMRES\(\)"):
        value[0, 0].backward()


def test_equilibrium_near_zero_asks_for_a_larger_atol_where_one_is_set() -> None:
    said = message(lambda z: 0.5 * z, torch.ones(2, 3), FixedPointIteration(rtol=0.0, atol=1e-12, max_steps=30))
    assert said.endswith("near zero, where a relative residual says little: raise max_steps or atol")


def test_a_residual_just_above_its_tolerance_does_not_look_like_it() -> None:
    solver = FixedPointIteration(rtol=0.1, max_steps=9)
    message = fixed_point(lambda z: 0.98 * z + 1, torch.zeros(1, 1), solver=solver, on_failure="ignore").message
    worst = float(re.search(r"is (\S+) after", message)[1])
    assert worst > 0.1
