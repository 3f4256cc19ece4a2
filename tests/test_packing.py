"""What one problem is: `batch_dims` and `segments` against separate solves, and what is said without them."""

import math

import pytest
import torch
from torch import Tensor

from deepeq import (
    GMRES,
    Anderson,
    BackpropAdjoint,
    Broyden,
    ConvergenceWarning,
    FixedPointIteration,
    ImplicitAdjoint,
    NeumannAdjoint,
    PhantomAdjoint,
    Result,
    fixed_point,
    root_find,
)
from tests.problems import Recorder, relative_residual, solve

EXACT = Broyden(rtol=1e-12, max_steps=200, history_size=100)
IMPLICIT = ImplicitAdjoint(solver=GMRES(rtol=1e-12, max_steps=100))
ADJOINTS = {
    "implicit": ImplicitAdjoint(),
    "implicit_checkpoint": ImplicitAdjoint(checkpoint=True),
    "implicit_twice": ImplicitAdjoint(twice_differentiable=True),
    "phantom": PhantomAdjoint(),
    "neumann": NeumannAdjoint(),
}
adjoints = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=list(ADJOINTS))


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def contraction(size: int, gain: float = 0.8) -> Tensor:
    return (gain * torch.linalg.qr(draw(size, size, seed=3))[0]).requires_grad_()


# --- batch_dims ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_dims", [0, 1, 2, 3])
def test_value_and_gradient_are_those_of_one_dense_solve_for_each_problem(batch_dims):
    shape = (2, 3, 4)
    size = math.prod(shape[batch_dims:])
    matrix, b, weights = contraction(size), draw(*shape).requires_grad_(), draw(*shape, seed=2)

    def f(z):
        return (z.reshape(-1, size) @ matrix.T).reshape(shape) + b

    solution = fixed_point(f, torch.zeros_like(b), batch_dims=batch_dims, solver=EXACT, adjoint=IMPLICIT)
    direct = torch.linalg.solve(torch.eye(size, dtype=b.dtype) - matrix, b.reshape(-1, size).T).T.reshape(shape)
    torch.testing.assert_close(solution.value, direct, rtol=1e-9, atol=1e-10)
    gradients, expected = (torch.autograd.grad((weights * z).sum(), (matrix, b)) for z in (solution.value, direct))
    for a, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)
    per_problem = shape[:batch_dims] or (1,)
    for name in ("relative_residual", "absolute_residual", "converged", "num_steps"):
        assert getattr(solution, name).shape == per_problem, name
    assert solution.residual_history.shape == (int(solution.num_steps.max()), *per_problem)


@pytest.mark.parametrize("entry", [fixed_point, root_find])
def test_parts_of_a_coupled_state_may_have_any_shapes(entry):
    """`a = 0.5 mean(b) + 1` and `b = a + 0.2 b` with a scalar and a matrix: `a = 8 / 3`, `b = 10 / 3`."""

    def f(state):
        a, b = state
        return 0.5 * b.mean() + 1.0, a + 0.2 * b

    def g(state):
        return tuple(after - before for after, before in zip(f(state), state, strict=True))

    z0 = (torch.zeros((), dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64))
    solution = entry(f if entry is fixed_point else g, z0, batch_dims=0, solver=EXACT)
    torch.testing.assert_close(solution.value[0].item(), 8 / 3)
    torch.testing.assert_close(solution.value[1], torch.full_like(z0[1], 10 / 3))
    assert solution.converged.tolist() == [True]


def test_samples_beside_each_other_do_not_change_a_coupled_problem():
    """Rows of a batch are frozen one by one; a coupled state goes on until all of it is found."""
    matrix, b = contraction(6).detach(), draw(3, 2)
    solution = fixed_point(
        lambda z: (z.reshape(6) @ matrix.T).reshape(3, 2) + b, torch.zeros(3, 2).double(), batch_dims=0
    )
    flat = fixed_point(lambda z: z @ matrix.T + b.reshape(1, 6), torch.zeros(1, 6).double())
    assert torch.equal(solution.value.reshape(1, 6), flat.value)
    assert torch.equal(solution.residual_history, flat.residual_history)


@pytest.mark.parametrize("batch_dims", [-1, 1.0, True, None])
def test_bad_batch_dims_is_named(batch_dims):
    with pytest.raises(ValueError, match="batch_dims="):
        fixed_point(torch.cos, torch.zeros(2, 3), batch_dims=batch_dims)


def test_more_batch_dims_than_dimensions_is_an_error():
    with pytest.raises(ValueError, match="first 3 dimensions"):
        fixed_point(torch.cos, torch.zeros(2, 3), batch_dims=3)


# --- segments --------------------------------------------------------------------------------------------------------

SEGMENTS = {
    "sorted": [0, 0, 0, 1, 1, 2, 2, 2, 2],
    "unsorted": [2, 0, 1, 0, 2, 1, 2, 0, 1],
    "with_an_empty_one": [3, 0, 0, 3, 1, 1, 1, 3, 0],
    "single_rows": [4, 2, 0, 3, 1, 5, 7, 6, 8],
    "one_alone": [0, 0, 0, 0, 0, 0, 0, 0, 0],
}


class Ragged:
    """`f(z) = tanh(z W + (mean of the rows of the problem) U + b)` on states `(R, 2)` and `(R, 1, 1)`."""

    def __init__(self, segments: Tensor) -> None:
        self.segments, rows = segments, len(segments)
        self.w, self.u = (0.5 * torch.linalg.qr(draw(3, 3, seed=s))[0] for s in (4, 5))
        self.b = draw(rows, 3)
        self.weights = draw(rows, 3, seed=6)
        self.leaves = [leaf.requires_grad_() for leaf in (self.w, self.u, self.b)]

    def of(self, rows: Tensor, segments: Tensor):
        """The map of these rows alone."""
        size = int(segments.max()) + 1
        counts = torch.bincount(segments, minlength=size).clamp_min(1).unsqueeze(1)

        def f(state):
            z = torch.cat([state[0], state[1].squeeze(2)], dim=1)
            mean = z.new_zeros(size, 3).index_add(0, segments, z) / counts
            z = torch.tanh(z @ self.w + mean[segments] @ self.u + self.b[rows])
            return z[:, :2], z[:, 2:].unsqueeze(2)

        return f

    def loss(self, state, rows: Tensor) -> Tensor:
        z = torch.cat([state[0], state[1].squeeze(2)], dim=1)
        return (self.weights[rows] * z).sum() + z.square().sum()


def zeros(rows: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, 2, dtype=torch.float64), torch.zeros(rows, 1, 1, dtype=torch.float64)


@pytest.mark.parametrize("solver", [EXACT, Anderson(rtol=1e-12, max_steps=200)], ids=["broyden", "anderson"])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=list(SEGMENTS))
def test_segments_give_what_separate_solves_give(segments, solver):
    segments = torch.tensor(segments)
    ragged, rows = Ragged(segments), torch.arange(len(segments))
    together = fixed_point(
        ragged.of(rows, segments), zeros(len(rows)), segments=segments, solver=solver, adjoint=IMPLICIT
    )
    gradients = torch.autograd.grad(ragged.loss(together.value, rows), ragged.leaves)
    expected = [torch.zeros_like(leaf) for leaf in ragged.leaves]
    for problem in range(int(segments.max()) + 1):
        own = (segments == problem).nonzero().squeeze(1)
        if not len(own):
            assert together.relative_residual[problem] == 0
            assert together.converged[problem]
            continue
        alone = fixed_point(
            ragged.of(own, torch.zeros_like(own)), zeros(len(own)), batch_dims=0, solver=solver, adjoint=IMPLICIT
        )
        for a, b in zip(alone.value, together.value, strict=True):
            torch.testing.assert_close(a, b[own], rtol=1e-9, atol=1e-10)
        assert together.num_steps[problem] == alone.num_steps
        steps = int(alone.num_steps)
        torch.testing.assert_close(
            together.residual_history[:steps, problem], alone.residual_history[:, 0], rtol=1e-2, atol=1e-13
        )
        for total, part in zip(
            expected, torch.autograd.grad(ragged.loss(alone.value, own), ragged.leaves), strict=True
        ):
            total += part
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_residual_of_a_segment_is_that_of_its_rows():
    segments, slopes = torch.tensor([1, 0, 1]), torch.tensor([[0.9], [0.5], [-0.3]], dtype=torch.float64)
    solution = solve(
        lambda z: slopes * z + 1.0, torch.zeros_like(slopes), segments=segments, solver=FixedPointIteration(max_steps=3)
    )
    for problem, own in enumerate(([1], [0, 2])):
        f = lambda z, own=own: (slopes[own] * z.T + 1.0).T  # noqa: E731
        expected = relative_residual(f, solution.value[own].T)
        torch.testing.assert_close(solution.relative_residual[problem : problem + 1], expected)
        absolute = (f(solution.value[own].T) - solution.value[own].T).norm()
        torch.testing.assert_close(solution.absolute_residual[problem], absolute)


def test_state_without_rows_is_a_batch_of_one_that_is_done():
    solution = fixed_point(torch.cos, torch.zeros(0, 3), segments=torch.zeros(0, dtype=torch.int64))
    assert solution.value.shape == (0, 3)
    assert solution.converged.all()


@pytest.mark.parametrize(
    ("segments", "error", "message"),
    [
        (torch.tensor([0.0, 1.0]), TypeError, r"torch\.float32"),
        ([0, 1], TypeError, "list"),
        (torch.tensor([0, 1, 1]), ValueError, r"segments has shape \(3,\)"),
        (torch.tensor([[0], [1]]), ValueError, r"segments has shape \(2, 1\)"),
        (torch.tensor([0, -1]), ValueError, "-1"),
    ],
    ids=["floats", "list", "too_long", "two_dimensions", "negative"],
)
def test_bad_segments_are_named(segments, error, message):
    with pytest.raises(error, match=message):
        fixed_point(torch.cos, torch.zeros(2, 3), segments=segments)


def test_segments_and_batch_dims_together_are_an_error():
    with pytest.raises(ValueError, match="give one of them"):
        fixed_point(torch.cos, torch.zeros(2, 3), segments=torch.tensor([0, 1]), batch_dims=0)


# --- forgotten coupling ----------------------------------------------------------------------------------------------

SHIFT = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
START = torch.zeros(2, 1, dtype=torch.float64)


def chain(z: Tensor, shift: Tensor = SHIFT) -> Tensor:
    """Row 0 is row 1, and row 1 is two: row 0 looks solved at zero as long as row 1 is there too."""
    return torch.cat([z[1:], 0.5 * z[1:]]) + shift


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@adjoints
def test_forgotten_coupling_is_told_and_nobody_is_called_converged(adjoint, grad):
    with torch.set_grad_enabled(grad):
        with pytest.warns(
            ConvergenceWarning, match=r"depend on each other: set batch_dims=0 for one coupled state, or segments"
        ):
            solution = fixed_point(chain, START, adjoint=adjoint)
        coupled = fixed_point(chain, START, adjoint=adjoint, batch_dims=0)
    assert solution.result is Result.MAX_STEPS
    assert not solution.converged.any()
    torch.testing.assert_close(solution.relative_residual[0].item(), 1.0)  # f of row 0 is two, its value is zero
    torch.testing.assert_close(solution.absolute_residual[0].item(), 2.0, rtol=1e-2, atol=0.0)
    torch.testing.assert_close(coupled.value.detach(), torch.full_like(START, 2.0), rtol=1e-2, atol=0.0)
    assert coupled.converged.all()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@adjoints
def test_verify_false_believes_the_problems(adjoint, grad):
    """The control: what was found without the check is wrong, and is called converged."""
    with torch.set_grad_enabled(grad):
        solution = fixed_point(chain, START, adjoint=adjoint, verify=False)
    assert solution.converged.all()
    assert solution.value[0].item() == 0.0


def test_backprop_adjoint_tells_forgotten_coupling_too():
    with pytest.warns(ConvergenceWarning, match="batch_dims=0"):
        solution = fixed_point(chain, START, adjoint=BackpropAdjoint())
    assert not solution.converged.any()


def test_forgotten_coupling_of_segments_is_told():
    with pytest.warns(ConvergenceWarning, match="depend on each other"):
        fixed_point(chain, START, segments=torch.tensor([0, 1]))
    assert fixed_point(chain, START, segments=torch.tensor([0, 0])).converged.all()


def test_forgotten_coupling_raises_where_a_failure_does():
    with pytest.raises(RuntimeError, match="depend on each other"):
        fixed_point(chain, START, on_failure="raise")


@pytest.mark.parametrize(
    "solver", [GMRES(), Broyden(), Anderson(), FixedPointIteration()], ids=lambda s: type(s).__name__
)
def test_forgotten_coupling_of_the_backward_pass_is_told(solver):
    """`J^T` takes row 1 its gradient from row 0: it looks solved at zero as long as row 0 is there too."""
    shift = SHIFT.clone().requires_grad_()
    z0, exact = torch.full_like(START, 2.0), torch.tensor([[1.0], [2.0]], dtype=torch.float64)

    def gradient(**options):
        reports = []
        adjoint = ImplicitAdjoint(solver=solver, callback=reports.append)
        value = fixed_point(lambda z: chain(z, shift), z0, adjoint=adjoint, **options).value
        return torch.autograd.grad(value[0].sum(), shift)[0], reports[0]

    with pytest.warns(ConvergenceWarning, match=r"^backward pass: .*depend on each other"):
        _, report = gradient()
    assert not report.converged.any()
    wrong, report = gradient(verify=False)
    assert report.converged.all()
    assert wrong[1].item() == 0.0
    right, report = gradient(batch_dims=0)
    assert report.converged.all()
    torch.testing.assert_close(right, exact, rtol=1e-2, atol=0.0)


# --- what the check costs --------------------------------------------------------------------------------------------

SLOPES = torch.tensor([[0.5], [0.8], [-0.4]], dtype=torch.float64)


def affine(z: Tensor) -> Tensor:
    return SLOPES * z + 1.0


@adjoints
def test_check_costs_nothing_where_a_graph_is_built(adjoint):
    counts = []
    for verify in (True, False):
        f = Recorder(affine)
        solution = fixed_point(f, torch.zeros_like(SLOPES), adjoint=adjoint, verify=verify)
        assert solution.num_evals == f.count
        counts.append(f.count)
    assert counts[0] == counts[1]


def test_check_is_free_where_the_last_problem_was_done_in_the_last_evaluation():
    with torch.no_grad():
        f = Recorder(affine)
        solution = fixed_point(f, torch.zeros_like(SLOPES), solver=FixedPointIteration(max_steps=100))
    assert len(set(solution.num_steps.tolist())) > 1
    assert f.count == solution.num_evals == int(solution.num_steps.max())


def test_check_costs_one_evaluation_where_no_step_evaluated_the_returned_state():
    """`z <- -z + 1` from 0.4 and 0: no step of one has a better residual than the others, but for the first."""
    slopes = torch.tensor([[-1.2], [0.5]], dtype=torch.float64)
    with torch.no_grad():
        counts = {}
        for verify in (True, False):
            f = Recorder(lambda z: slopes * z + 1.0)
            solution = solve(f, torch.full_like(slopes, 0.4), solver=FixedPointIteration(max_steps=5), verify=verify)
            assert solution.num_evals == f.count
            counts[verify] = f.count
    assert counts == {True: 6, False: 5}
    assert solution.result is Result.MAX_STEPS


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_check_contradicts_no_honest_claim_at_the_rounding_level(grad):
    """Another kernel, or another order of a sum, may change the last digits between two evaluations."""
    matrix = contraction(30).detach().float()
    solver = Broyden(rtol=3e-7, max_steps=60, history_size=60)
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return (z @ matrix.T + 1.0) * (1.0 + (2e-7 if calls % 2 else 0.0))

    with torch.set_grad_enabled(grad):
        solution = solve(f, torch.zeros(3, 30), solver=solver)
    assert "depend on each other" not in solution.message


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(("batch_size", "others"), [(1, False), (3, True)])
def test_map_that_changes_between_calls_is_told(grad, batch_size, others):
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return 0.5 * z + torch.arange(1.0, batch_size + 1.0).unsqueeze(1) * (1.0 if calls < 12 else 2.0)

    # The first problem is there at once; the others need longer, until the map has changed.
    z0 = torch.tensor([[2.0], [0.0], [0.0]])[:batch_size]
    with torch.set_grad_enabled(grad):
        solver = FixedPointIteration(rtol=1e-6, max_steps=50, min_steps=11)
        solution = solve(f, z0, solver=solver)
    if batch_size == 1 and not grad:
        assert solution.converged.all()  # it stopped before the map changed: nobody can know
        return
    assert not solution.converged.any()
    assert "f is random or changes from call to call" in solution.message
    assert ("batch_dims=0" in solution.message) == others


@adjoints
def test_random_map_is_told(adjoint):
    """Its residual is small by luck once, and not at the next call."""
    g = torch.Generator().manual_seed(5)

    def f(z):
        return z + 0.02 * torch.randn(z.shape, generator=g, dtype=z.dtype) * torch.rand(1, generator=g).pow(4)

    z0, told = torch.ones(1, 2, dtype=torch.float64), 0
    for _ in range(20):
        solution = solve(f, z0, solver=FixedPointIteration(rtol=1e-3, max_steps=50), adjoint=adjoint)
        told += "random or changes from call to call" in solution.message
        assert not (told and solution.converged.any() and "random" in solution.message)
    assert told >= 3


# --- changes in place ------------------------------------------------------------------------------------------------


def through_data(z: Tensor) -> Tensor:
    z.data.mul_(0.5).add_(1.0)
    return z


def through_numpy(z: Tensor) -> Tensor:
    z.detach().numpy()[...] *= 0.5
    return z + 1.0


def ordinary(z: Tensor) -> Tensor:
    return z.mul_(0.5).add_(1.0)


def through_a_view(z: Tensor) -> Tensor:
    z[:, :1].mul_(0.5)
    return z + 1.0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__)
@pytest.mark.parametrize("f", [ordinary, through_a_view, through_data, through_numpy], ids=lambda f: f.__name__)
@pytest.mark.parametrize("entry", [fixed_point, root_find])
def test_change_in_place_is_an_error_however_it_is_made(entry, f, mode):
    with mode(), pytest.raises((ValueError, RuntimeError), match=r"in.place"):
        entry(f, torch.ones(2, 3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_change_in_place_at_a_later_step_is_an_error(mode):
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return 0.9 * z + 1.0 if calls < 5 else z.mul_(0.9).add_(1.0)

    with mode(), pytest.raises(ValueError, match="f changed its argument in place"):
        fixed_point(f, torch.ones(2, 3), solver=Broyden(rtol=1e-6, damping=0.5))


@pytest.mark.parametrize(
    "solver", [Broyden(), Anderson(), FixedPointIteration(), GMRES()], ids=lambda s: type(s).__name__
)
def test_map_that_writes_all_its_results_into_one_buffer_is_harmless(solver):
    buffer = torch.empty(2, 1)
    slopes = torch.tensor([[0.5], [-0.7]])
    with torch.no_grad():
        expected = fixed_point(lambda z: slopes * z + 1.0, torch.zeros(2, 1), solver=solver)
        solution = fixed_point(
            lambda z: torch.add(slopes * z, 1.0, out=buffer), torch.zeros(2, 1), solver=solver, keep=[1, 2]
        )
    assert torch.equal(solution.value, expected.value)
    assert torch.equal(solution.residual_history, expected.residual_history)
    assert torch.equal(solution.kept[0], torch.ones(2, 1))
