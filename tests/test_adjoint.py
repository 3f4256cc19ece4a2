"""Gradients of an equilibrium: exact where promised, equal to their formula elsewhere, and at the promised cost."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from deepeq import (
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
    Solution,
    fixed_point,
    root_find,
)
from tests.problems import Recorder, solve

EXACT = Broyden(rtol=1e-13, max_steps=200)
EXACT_BACKWARD = GMRES(rtol=1e-13)
IMPLICIT = ImplicitAdjoint(solver=EXACT_BACKWARD)

FORWARD_SOLVERS = {
    "fixed_point_iteration": FixedPointIteration(rtol=1e-13, max_steps=500),
    "anderson": Anderson(rtol=1e-13, max_steps=500),
    "broyden": Broyden(rtol=1e-13, max_steps=500),
    "broyden_line_search": Broyden(rtol=1e-13, max_steps=500, line_search_steps=2),
}
BACKWARD_SOLVERS = {**FORWARD_SOLVERS, "gmres": GMRES(rtol=1e-13, max_steps=500)}

ADJOINTS = {
    "implicit": ImplicitAdjoint(),
    "implicit_checkpoint": ImplicitAdjoint(checkpoint=True),
    "implicit_twice": ImplicitAdjoint(twice_differentiable=True),
    "phantom": PhantomAdjoint(),
    "neumann": NeumannAdjoint(terms=3),
    "backprop": BackpropAdjoint(),
}
adjoints = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=list(ADJOINTS))
implicit_adjoints = pytest.mark.parametrize(
    "adjoint",
    [
        IMPLICIT,
        ImplicitAdjoint(solver=EXACT_BACKWARD, checkpoint=True),
        ImplicitAdjoint(solver=EXACT_BACKWARD, twice_differentiable=True),
    ],
    ids=["one_graph", "checkpoint", "twice_differentiable"],
)


class Cell:
    """`f(z) = tanh(z W^T + x U^T + b)`, a contraction of N = 4 components; `leaves` are all that wants a gradient."""

    def __init__(self, dtype: torch.dtype = torch.float64, batch_size: int = 3, gain: float = 0.8) -> None:
        g = torch.Generator().manual_seed(8)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.w = (gain * torch.linalg.qr(normal(4, 4))[0]).to(dtype).requires_grad_()
        self.u = (0.5 * normal(4, 2)).to(dtype).requires_grad_()
        self.b = (0.1 * normal(4)).to(dtype).requires_grad_()
        self.x = normal(batch_size, 2).to(dtype).requires_grad_()
        self.z0 = torch.zeros(batch_size, 4, dtype=dtype)
        self.weights = normal(batch_size, 4).to(dtype)  # of the loss

    @property
    def leaves(self) -> list[Tensor]:
        return [self.w, self.u, self.b, self.x]

    def __call__(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.w.T + self.x @ self.u.T + self.b)

    def loss(self, z: Tensor) -> Tensor:
        return (self.weights * z).sum() + 0.5 * z.square().sum()

    def exact(self) -> Tensor:
        """The equilibrium to rounding."""
        z = self.z0
        with torch.no_grad():
            for _ in range(300):
                z = self(z)
        return z

    def dense(self) -> tuple[Tensor, Tensor]:
        """`(I - J)` as one `(B N, B N)` matrix, and `dl/dz*` as a vector, at the exact equilibrium."""
        z = self.exact()
        size = z.numel()
        jacobian = torch.autograd.functional.jacobian(self, z).reshape(size, size)
        return torch.eye(size, dtype=z.dtype) - jacobian.detach(), (self.weights + z).reshape(-1)

    def pull_back(self, u: Tensor) -> list[Tensor]:
        """`u^T df/d(leaf)` at the exact equilibrium."""
        return list(torch.autograd.grad(self(self.exact()), self.leaves, u.reshape(self.z0.shape)))

    def closed_form(self) -> list[Tensor]:
        a, v = self.dense()
        return self.pull_back(torch.linalg.solve(a.T, v))

    def gradients(self, **solve) -> list[Tensor]:
        solution = fixed_point(self, self.z0, **{"solver": EXACT, **solve})
        return list(torch.autograd.grad(self.loss(solution.value), self.leaves))


@pytest.fixture
def cell() -> Cell:
    return Cell()


def assert_same(actual: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    """Relative to the norm of each gradient."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).norm() <= rtol * e.norm(), (a, e)


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    a, e = (torch.cat([t.reshape(-1) for t in side]) for side in (actual, expected))
    return ((a - e).norm() / e.norm()).item()


# --- exactness -------------------------------------------------------------------------------------------------------


@implicit_adjoints
def test_implicit_gradient_matches_closed_form(cell, adjoint):
    assert_same(cell.gradients(adjoint=adjoint), cell.closed_form(), rtol=1e-8)


@implicit_adjoints
def test_implicit_gradient_matches_unrolling(cell, adjoint):
    z = cell.z0
    for _ in range(200):
        z = cell(z)
    unrolled = torch.autograd.grad(cell.loss(z), cell.leaves)
    assert_same(cell.gradients(adjoint=adjoint), list(unrolled), rtol=1e-6)


def test_default_gradient_is_the_exact_one(cell):
    """Not a one-step approximation: the default tolerances leave an error of about `rtol` of the forward solve."""
    value = fixed_point(cell, cell.z0).value
    assert_same(list(torch.autograd.grad(cell.loss(value), cell.leaves)), cell.closed_form(), rtol=5e-3)


def test_jacobian_and_last_product_are_both_taken_at_the_returned_value(cell):
    """At a loose solution `z`, not at `f(z)`, and not one here and the other there."""
    solution = fixed_point(cell, cell.z0, solver=FixedPointIteration(rtol=0.2), adjoint=IMPLICIT)
    z = solution.value.detach()
    assert (solution.relative_residual > 0.01).all()
    jacobian = torch.autograd.functional.jacobian(cell, z).reshape(z.numel(), z.numel())
    v = (cell.weights + z).reshape(-1)
    u = torch.linalg.solve(torch.eye(z.numel(), dtype=z.dtype) - jacobian.T, v)
    expected = torch.autograd.grad(cell(z), cell.leaves, u.reshape(z.shape))
    assert_same(
        list(torch.autograd.grad(cell.loss(solution.value), cell.leaves)), [e.detach() for e in expected], rtol=1e-9
    )


@pytest.mark.parametrize("solver", FORWARD_SOLVERS.values(), ids=list(FORWARD_SOLVERS))
def test_backprop_through_the_solver_matches_closed_form(cell, solver):
    loose = type(solver)(rtol=1e-10, max_steps=500)  # at rounding level the divisions of a solver lose digits
    assert_same(cell.gradients(solver=loose, adjoint=BackpropAdjoint()), cell.closed_form(), rtol=1e-6)


def test_gradient_agrees_in_float32():
    single, double = Cell(torch.float32), Cell(torch.float64)
    gradients = single.gradients(
        solver=Broyden(rtol=1e-6, max_steps=100), adjoint=ImplicitAdjoint(solver=GMRES(rtol=1e-6))
    )
    assert all(g.dtype == torch.float32 for g in gradients)
    assert_same([g.double() for g in gradients], double.closed_form(), rtol=1e-5)


PAIRS = {
    **{f"forward_{name}": (solver, EXACT_BACKWARD) for name, solver in FORWARD_SOLVERS.items()},
    **{f"backward_{name}": (EXACT, solver) for name, solver in BACKWARD_SOLVERS.items()},
}
QUICK = ("forward_anderson", "forward_broyden", "backward_gmres")  # the others are slow
pairs = pytest.mark.parametrize(
    ("forward", "backward"),
    [pytest.param(*pair, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, pair in PAIRS.items()],
)


@pairs
def test_gradcheck_with_every_solver_forward_and_backward(forward, backward):
    cell = Cell(batch_size=2, gain=0.5)

    def equilibrium(w, u, b, x):
        return fixed_point(
            lambda z: torch.tanh(z @ w.T + x @ u.T + b),
            cell.z0,
            solver=forward,
            adjoint=ImplicitAdjoint(solver=backward),
        ).value

    assert torch.autograd.gradcheck(equilibrium, cell.leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


@pairs
def test_gradgradcheck_with_every_solver_forward_and_backward(forward, backward):
    cell = Cell(batch_size=1, gain=0.5)
    adjoint = ImplicitAdjoint(solver=backward, twice_differentiable=True)

    def equilibrium(w, b, x):
        return fixed_point(
            lambda z: torch.tanh(z @ w.T + x @ cell.u.detach().T + b), cell.z0, solver=forward, adjoint=adjoint
        ).value

    inputs = (cell.w, cell.b, cell.x)
    assert torch.autograd.gradgradcheck(equilibrium, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_hessian_of_a_scalar_equilibrium_matches_its_formula():
    """`z = cos(a z)`: `z' = -z s / (1 + a s)` with `s = sin(a z)`, and once more by differences of that formula."""

    def first(a: float) -> float:
        z = 0.5
        for _ in range(500):
            z = torch.cos(torch.tensor(a * z, dtype=torch.float64)).item()
        s = torch.sin(torch.tensor(a * z, dtype=torch.float64)).item()
        return -z * s / (1 + a * s)

    a = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    adjoint = ImplicitAdjoint(solver=EXACT_BACKWARD, twice_differentiable=True)
    value = fixed_point(
        lambda z: torch.cos(a * z), torch.zeros(1, 1, dtype=torch.float64), solver=EXACT, adjoint=adjoint
    ).value
    (gradient,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    (hessian,) = torch.autograd.grad(gradient, a)
    h = 1e-5
    assert gradient.item() == pytest.approx(first(0.9), rel=1e-9)
    assert hessian.item() == pytest.approx((first(0.9 + h) - first(0.9 - h)) / (2 * h), rel=1e-6)


@pytest.mark.parametrize(
    "adjoint",
    [IMPLICIT, ImplicitAdjoint(checkpoint=True), NeumannAdjoint(terms=2)],
    ids=["one_graph", "checkpoint", "neumann"],
)
def test_second_derivative_without_the_option_raises(cell, adjoint):
    value = fixed_point(cell, cell.z0, adjoint=adjoint).value
    with pytest.raises(RuntimeError, match="twice_differentiable=True"):
        torch.autograd.grad(value.sum(), cell.leaves, create_graph=True)


def test_third_derivative_raises(cell):
    adjoint = ImplicitAdjoint(solver=EXACT_BACKWARD, twice_differentiable=True)
    value = fixed_point(cell, cell.z0, solver=EXACT, adjoint=adjoint).value
    (first,) = torch.autograd.grad(value.sum(), cell.x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), cell.x, create_graph=True)
    with pytest.raises(RuntimeError, match="third order"):
        torch.autograd.grad(second.square().sum(), cell.x)


def test_gradient_does_not_depend_on_z0(cell):
    z0 = (cell.exact() + 0.3).requires_grad_()
    value = fixed_point(cell, z0, solver=EXACT, adjoint=IMPLICIT).value
    gradients = torch.autograd.grad(cell.loss(value), [*cell.leaves, z0], allow_unused=True)
    assert gradients[-1] is None
    assert_same(list(gradients[:-1]), cell.closed_form(), rtol=1e-8)


def test_gradient_of_a_map_whose_plain_iteration_diverges(cell):
    """Theorem 1 asks that `I - J` be invertible, not that `J` be a contraction."""
    m = torch.tensor([[1.5, 1.0], [-1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    value = fixed_point(lambda z: z @ m.T + b, torch.zeros_like(b), solver=EXACT, adjoint=IMPLICIT).value
    gradients = torch.autograd.grad(value.square().sum(), (m, b))
    direct = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - m, b.T).T
    assert_same(list(gradients), list(torch.autograd.grad(direct.square().sum(), (m, b))), rtol=1e-8)


def test_root_find_gradient_is_that_of_the_root():
    a = torch.tensor([[2.0], [3.0]], dtype=torch.float64, requires_grad=True)
    value = root_find(lambda z: 0.3 * (a - z.square()), torch.ones_like(a), solver=EXACT, adjoint=IMPLICIT).value
    (gradient,) = torch.autograd.grad(value.sum(), a)
    torch.testing.assert_close(value, a.sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, 0.5 / a.sqrt(), rtol=1e-9, atol=0)


# --- every tensor that f touches -------------------------------------------------------------------------------------


@adjoints
def test_every_closed_over_tensor_gets_a_gradient(adjoint):
    """A parameter of a module, a leaf, a non-leaf, a tensor in a container, one used outside f as well, a default."""
    module = nn.Linear(3, 3).double()
    with torch.no_grad():
        module.weight.mul_(0.5)
    leaf, source, boxed, shared = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4))
    unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
    non_leaf, box = source.sin(), {"deep": [boxed]}

    def f(z, default=shared):
        return torch.tanh(module(z) + leaf * non_leaf + box["deep"][0] + default)

    value = fixed_point(f, torch.zeros(2, 3, dtype=torch.float64), adjoint=adjoint).value
    wanted = [module.weight, module.bias, leaf, source, boxed, shared]
    gradients = torch.autograd.grad((value * shared).sum(), [*wanted, unused], allow_unused=True)
    assert gradients[-1] is None
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients[:-1])


def test_gradients_of_non_leaf_and_shared_tensors_match_unrolling():
    source = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    m = torch.tensor([0.5, -0.4, 0.3], dtype=torch.float64, requires_grad=True)

    def output(solve):
        injection = source.sin() * m
        return (solve(lambda z: torch.tanh(m * z + injection)) * injection).square().sum()  # used outside too

    def unrolled(f):
        z = torch.zeros_like(source)
        for _ in range(200):
            z = f(z)
        return z

    def implicit(f):
        return fixed_point(f, torch.zeros_like(source), solver=EXACT, adjoint=IMPLICIT).value

    expected = torch.autograd.grad(output(unrolled), (source, m))
    assert_same(list(torch.autograd.grad(output(implicit), (source, m))), list(expected), rtol=1e-8)


@adjoints
def test_constant_map_passes_its_gradient_through(adjoint):
    constant = torch.randn(2, 3, requires_grad=True)
    value = fixed_point(lambda z: constant, torch.zeros(2, 3), adjoint=adjoint).value
    value.sum().backward()
    torch.testing.assert_close(constant.grad, torch.ones(2, 3))


@adjoints
def test_equilibrium_inside_an_equilibrium(adjoint):
    """The outer map solves an inner one: `y = y / 2 + z / 4 + a`, so `z = tanh(z / 2 + 2 a)`."""
    a = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    inner_adjoint = ImplicitAdjoint(solver=EXACT_BACKWARD, twice_differentiable=adjoint is ADJOINTS["implicit_twice"])

    def outer(z):
        y = fixed_point(lambda y: 0.5 * y + 0.25 * z + a, torch.zeros_like(z), solver=EXACT, adjoint=inner_adjoint)
        return torch.tanh(y.value)

    value = fixed_point(outer, torch.zeros(1, 1, dtype=torch.float64), solver=EXACT, adjoint=adjoint).value
    (gradient,) = torch.autograd.grad(value.sum(), a)
    s = 1 - value.item() ** 2
    exact = 2 * s / (1 - 0.5 * s)
    biased = {"phantom": 2 * s, "neumann": 2 * s * (1 + 0.5 * s + 0.25 * s * s)}
    name = next(name for name, known in ADJOINTS.items() if known is adjoint)
    assert gradient.item() == pytest.approx(biased.get(name, exact), rel=1e-4)


# --- the cheap adjoints ----------------------------------------------------------------------------------------------


def test_one_phantom_step_one_neumann_term_and_jacobian_free_are_the_same(cell):
    _, v = cell.dense()
    jacobian_free = cell.pull_back(v)
    for adjoint in (PhantomAdjoint(), PhantomAdjoint(steps=1), NeumannAdjoint(), NeumannAdjoint(terms=1)):
        assert_same(cell.gradients(adjoint=adjoint), jacobian_free, rtol=1e-9)


@pytest.mark.parametrize("terms", [1, 2, 3, 7])
def test_neumann_gradient_matches_its_series(cell, terms):
    a, v = cell.dense()
    j_t = (torch.eye(len(v), dtype=v.dtype) - a).T
    u = sum(torch.linalg.matrix_power(j_t, k) @ v for k in range(terms))
    assert_same(cell.gradients(adjoint=NeumannAdjoint(terms=terms)), cell.pull_back(u), rtol=1e-9)


@pytest.mark.parametrize("damping", [0.0, 0.4])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_phantom_gradient_matches_its_formula(cell, steps, damping):
    """Eq. 9 of Geng et al.: `u = (1 - damping) sum_k ((1 - damping) J^T + damping I)^k v`."""
    a, v = cell.dense()
    identity = torch.eye(len(v), dtype=v.dtype)
    step = (1 - damping) * (identity - a).T + damping * identity
    u = (1 - damping) * sum(torch.linalg.matrix_power(step, k) @ v for k in range(steps))
    assert_same(cell.gradients(adjoint=PhantomAdjoint(steps=steps, damping=damping)), cell.pull_back(u), rtol=1e-9)


@pytest.mark.parametrize(
    "family", [lambda k: NeumannAdjoint(terms=k), lambda k: PhantomAdjoint(steps=k)], ids=["neumann", "phantom"]
)
def test_more_terms_come_closer_to_the_exact_gradient(cell, family):
    exact = cell.closed_form()
    errors = [relative_error(cell.gradients(adjoint=family(k)), exact) for k in (1, 4, 16, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-2
    assert errors[-1] < 1e-5


@adjoints
def test_all_adjoints_return_the_solvers_value(cell, adjoint):
    loose = Broyden(rtol=1e-2)
    with torch.no_grad():
        expected = fixed_point(cell, cell.z0, solver=loose)
    solution = fixed_point(cell, cell.z0, solver=loose, adjoint=adjoint)
    assert torch.equal(solution.value, expected.value)
    assert torch.equal(solution.relative_residual, expected.relative_residual)
    assert torch.equal(solution.num_steps, expected.num_steps)


@pytest.mark.parametrize(
    ("cls", "fields", "error"),
    [
        (NeumannAdjoint, {"terms": 0}, ValueError),
        (NeumannAdjoint, {"terms": 1.5}, ValueError),
        (PhantomAdjoint, {"steps": 0}, ValueError),
        (PhantomAdjoint, {"steps": True}, ValueError),
        (PhantomAdjoint, {"damping": 1.0}, ValueError),
        (PhantomAdjoint, {"damping": -0.1}, ValueError),
        (ImplicitAdjoint, {"solver": "gmres"}, TypeError),
        (ImplicitAdjoint, {"checkpoint": True, "twice_differentiable": True}, ValueError),
    ],
    ids=str,
)
def test_bad_adjoint_raises_at_construction_and_names_the_field(cls, fields, error):
    with pytest.raises(error, match=next(iter(fields))):
        cls(**fields)
    with pytest.raises(TypeError, match="tau"):
        cls(tau=1.0)


# --- tolerances and reports of the backward solve --------------------------------------------------------------------


def test_looser_backward_tolerance_gives_a_worse_gradient(cell):
    exact, errors = cell.closed_form(), []
    for rtol in (1e-1, 1e-3, 1e-6, 1e-10):
        adjoint = ImplicitAdjoint(solver=FixedPointIteration(rtol=rtol, max_steps=500))
        errors.append(relative_error(cell.gradients(adjoint=adjoint), exact))
        assert errors[-1] < 10 * rtol
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3


def test_looser_forward_tolerance_gives_a_worse_gradient(cell):
    exact = cell.closed_form()
    errors = [
        relative_error(cell.gradients(solver=FixedPointIteration(rtol=rtol, max_steps=500), adjoint=IMPLICIT), exact)
        for rtol in (1e-1, 1e-3, 1e-6, 1e-10)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-8


def test_backward_tolerance_is_relative_to_the_incoming_gradient(cell):
    steps, gradients = [], []
    for scale in (1e-6, 1.0, 1e6):
        reports = []
        adjoint = ImplicitAdjoint(solver=GMRES(rtol=1e-6), callback=reports.append)
        value = fixed_point(cell, cell.z0, solver=EXACT, adjoint=adjoint).value
        gradients.append([g / scale for g in torch.autograd.grad(scale * cell.loss(value), cell.leaves)])
        steps.append(reports[0].num_steps.tolist())
    assert steps[0] == steps[1] == steps[2]
    assert_same(gradients[0], gradients[1], rtol=1e-9)
    assert_same(gradients[2], gradients[1], rtol=1e-9)


def test_callback_receives_the_backward_solution(cell):
    reports: list[Solution] = []
    value = fixed_point(
        cell, cell.z0, solver=EXACT, adjoint=ImplicitAdjoint(solver=EXACT_BACKWARD, callback=reports.append)
    ).value
    assert reports == []
    cell.loss(value).backward()
    (report,) = reports
    assert isinstance(report, Solution)
    assert report.result is Result.CONVERGED
    a, v = cell.dense()
    torch.testing.assert_close(report.value.reshape(-1), torch.linalg.solve(a.T, v), rtol=1e-9, atol=1e-12)
    assert not report.value.requires_grad


def test_callback_exception_reaches_the_caller_and_the_next_solve_is_clean(cell):
    def refuse(report):
        raise KeyboardInterrupt

    value = fixed_point(cell, cell.z0, adjoint=ImplicitAdjoint(callback=refuse)).value
    with pytest.raises(KeyboardInterrupt):
        value.sum().backward()
    assert_same(cell.gradients(adjoint=IMPLICIT), cell.closed_form(), rtol=1e-8)


@pytest.mark.parametrize("on_failure", ["ignore", "warn", "raise"])
def test_backward_that_stops_short_does_as_it_was_told(cell, on_failure):
    reports = []
    adjoint = ImplicitAdjoint(solver=GMRES(rtol=1e-12, max_steps=2), on_failure=on_failure, callback=reports.append)
    value = fixed_point(cell, cell.z0, adjoint=adjoint).value
    said = "^backward pass: the residual of problem . of 3 .* raise max_steps.* Gradients are less exact than asked for"
    if on_failure == "raise":
        with pytest.raises(ConvergenceError, match=said) as error:
            value.sum().backward()
        assert error.value.solution is reports[0]
    elif on_failure == "warn":
        with pytest.warns(ConvergenceWarning, match=said):
            value.sum().backward()
    else:
        value.sum().backward()
    assert reports[0].result is Result.MAX_STEPS


@pytest.mark.parametrize("adjoint", [IMPLICIT, ImplicitAdjoint(checkpoint=True)], ids=["one_graph", "checkpoint"])
def test_nan_gradient_raises(cell, adjoint):
    value = fixed_point(cell, cell.z0, adjoint=adjoint).value
    gradient = torch.zeros_like(value)
    gradient[1, 2] = torch.nan
    with pytest.raises(ConvergenceError, match="backward pass") as error:
        value.backward(gradient)
    assert error.value.solution.result is Result.NONFINITE


def test_product_that_turns_nan_raises_and_names_it():
    """`sqrt(|z|)` at the equilibrium 0 has no derivative; 0 * inf appears in the first product."""
    bias = torch.zeros(1, 2, requires_grad=True)
    value = fixed_point(lambda z: (z * 0.0).abs().sqrt() + bias, torch.zeros(1, 2)).value
    with pytest.raises(ConvergenceError, match="^backward pass: .* at step 2, in problem 0 of 1"):
        value.sum().backward()


@pytest.mark.parametrize("backward", BACKWARD_SOLVERS.values(), ids=list(BACKWARD_SOLVERS))
def test_zero_gradient_gives_zero_gradients(cell, backward):
    value = fixed_point(cell, cell.z0, adjoint=ImplicitAdjoint(solver=backward)).value
    gradients = torch.autograd.grad(value, cell.leaves, torch.zeros_like(value))
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("backward", BACKWARD_SOLVERS.values(), ids=list(BACKWARD_SOLVERS))
def test_zero_gradient_of_one_sample_leaves_the_others_exact(cell, backward):
    cell.weights = torch.zeros_like(cell.weights)
    value = fixed_point(cell, cell.z0, solver=EXACT, adjoint=ImplicitAdjoint(solver=backward)).value
    (gradient,) = torch.autograd.grad(value[1].sum(), cell.x)
    a, v = cell.dense()
    v = torch.zeros_like(cell.z0)
    v[1] = 1.0
    expected = cell.pull_back(torch.linalg.solve(a.T, v.reshape(-1)))[3]
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


def test_tiny_incoming_gradient_is_not_lost():
    cell = Cell(torch.float32)
    value = fixed_point(cell, cell.z0).value
    (reference,) = torch.autograd.grad(value.sum(), cell.x, retain_graph=True)
    (tiny,) = torch.autograd.grad(value, cell.x, torch.full_like(value, 1e-25))
    torch.testing.assert_close(tiny / 1e-25, reference, rtol=1e-3, atol=1e-3)


# --- modes -----------------------------------------------------------------------------------------------------------


@implicit_adjoints
def test_two_forwards_before_a_backward(cell, adjoint):
    first = fixed_point(cell, cell.z0, solver=EXACT, adjoint=adjoint).value
    other = Cell()
    other.x = (other.x.detach() + 1.0).requires_grad_()
    second = fixed_point(other, other.z0, solver=EXACT, adjoint=adjoint).value
    assert_same(list(torch.autograd.grad(cell.loss(first), cell.leaves)), cell.closed_form(), rtol=1e-8)
    assert_same(list(torch.autograd.grad(other.loss(second), other.leaves)), other.closed_form(), rtol=1e-8)


@implicit_adjoints
def test_one_map_solved_twice_adds_both_gradients(cell, adjoint):
    values = [fixed_point(cell, cell.z0, solver=EXACT, adjoint=adjoint).value for _ in range(2)]
    sum(cell.loss(value) for value in values).backward()
    assert_same([leaf.grad for leaf in cell.leaves], [2 * g for g in cell.closed_form()], rtol=1e-8)


@implicit_adjoints
def test_second_backward_with_retain_graph_gives_the_same_gradient(cell, adjoint):
    loss = cell.loss(fixed_point(cell, cell.z0, solver=EXACT, adjoint=adjoint).value)
    expected = cell.closed_form()
    for retain in (True, True, False):
        gradients = torch.autograd.grad(loss, cell.leaves, retain_graph=retain)
        assert_same(list(gradients), expected, rtol=1e-8)


@adjoints
def test_second_backward_without_retain_graph_raises(cell, adjoint):
    value = fixed_point(cell, cell.z0, adjoint=adjoint).value
    value.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.sum().backward()


@adjoints
def test_gradients_follow_grad_mode_and_not_train_mode(adjoint):
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    with torch.no_grad():
        module[0].weight.mul_(0.5)
    gradients = []
    for mode in (module.train, module.eval):
        mode()
        value = fixed_point(module, torch.zeros(2, 3), adjoint=adjoint).value
        assert value.requires_grad
        gradients.append(torch.autograd.grad(value.sum(), list(module.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    module.train()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            f = Recorder(module)
            solution = fixed_point(f, torch.zeros(2, 3), adjoint=adjoint)
            assert not solution.value.requires_grad
            assert solution.value.grad_fn is None
            assert f.count == solution.num_evals <= int(solution.num_steps.max()) + 1  # one that verifies
            assert solution.value.is_inference() == (context is torch.inference_mode)


@adjoints
def test_value_requires_a_gradient_even_where_no_tensor_of_f_does(adjoint):
    """Which tensors `f` touches is not looked for: autograd records them all."""
    solution = fixed_point(torch.cos, torch.zeros(2, 3), adjoint=adjoint)
    assert solution.value.requires_grad
    assert not any(t.requires_grad for t in (solution.relative_residual, solution.residual_history, solution.converged))
    solution.value.sum().backward()
    with torch.no_grad():
        assert not fixed_point(torch.cos, torch.zeros(2, 3), adjoint=adjoint).value.requires_grad


@adjoints
def test_only_the_value_is_differentiable(cell, adjoint):
    solution = fixed_point(cell, cell.z0, adjoint=adjoint)
    assert solution.value.requires_grad
    assert not any(t.requires_grad for t in (solution.relative_residual, solution.residual_history))


def test_exception_inside_f_leaves_nothing_behind(cell):
    for fails_at in (1, 3, 6):
        count = 0

        def f(z, fails_at=fails_at):
            nonlocal count
            count += 1
            if count == fails_at:
                raise LookupError("from f")
            return cell(z)

        with pytest.raises(LookupError, match="from f"):
            fixed_point(f, cell.z0, solver=EXACT, adjoint=IMPLICIT)
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert_same(cell.gradients(adjoint=IMPLICIT), cell.closed_form(), rtol=1e-8)


def test_exception_inside_f_under_autocast_and_no_grad_restores_both(cell):
    def f(z):
        raise LookupError("from f")

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        with pytest.raises(LookupError, match="from f"):
            fixed_point(f, torch.zeros(2, 3))
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()


class _FailsOnce(torch.autograd.Function):
    armed = False

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, gradient):
        if _FailsOnce.armed:
            _FailsOnce.armed = False
            raise LookupError("from a product")
        return gradient


def test_exception_in_the_backward_leaves_nothing_behind(cell):
    value = fixed_point(lambda z: cell(_FailsOnce.apply(z)), cell.z0, solver=EXACT, adjoint=IMPLICIT).value
    _FailsOnce.armed = True
    with pytest.raises(LookupError, match="from a product"):
        cell.loss(value).backward()
    assert all(leaf.grad is None for leaf in cell.leaves)
    value = fixed_point(lambda z: cell(_FailsOnce.apply(z)), cell.z0, solver=EXACT, adjoint=IMPLICIT).value
    assert_same(list(torch.autograd.grad(cell.loss(value), cell.leaves)), cell.closed_form(), rtol=1e-8)


@adjoints
def test_parameter_changed_before_the_backward_is_an_error_and_not_a_wrong_gradient(cell, adjoint):
    expected = cell.gradients(solver=Broyden(), adjoint=adjoint)
    value = fixed_point(cell, cell.z0, solver=Broyden(), adjoint=adjoint).value
    loss = cell.loss(value)
    with torch.no_grad():
        cell.w.mul_(0.5)  # an optimizer step between forward and backward
    gradients, message = expected, ""
    try:
        gradients = list(torch.autograd.grad(loss, cell.leaves))
    except RuntimeError as error:
        message = str(error)
    assert not message or "modified by an inplace operation" in message or "f changed between" in message
    assert_same(gradients, expected, rtol=1e-12)  # one phantom step does not need w again
    assert message or isinstance(adjoint, PhantomAdjoint)


@adjoints
def test_changing_the_value_in_place_cannot_spoil_the_gradient(cell, adjoint):
    expected = torch.autograd.grad(fixed_point(cell, cell.z0, adjoint=adjoint).value.sum() * 2.0, cell.leaves)
    value = fixed_point(cell, cell.z0, adjoint=adjoint).value
    try:
        value.mul_(2.0)
    except RuntimeError:
        return  # a clear error is as good
    gradients = torch.autograd.grad(value.sum(), cell.leaves)
    assert_same(list(gradients), list(expected), rtol=1e-12)


def test_changing_the_value_in_place_without_gradients_leaves_z0_alone():
    z0 = torch.full((1, 2), 0.7390851)
    kept = z0.clone()
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            solution = fixed_point(torch.cos, z0)
            assert solution.num_steps.item() == 1
            solution.value.zero_()
            assert torch.equal(z0, kept)


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("implicit", 1, 0),
        ("implicit_checkpoint", 1, 2),
        ("implicit_twice", 2, 0),
        ("phantom", 1, 0),
        ("neumann", 1, 0),
        ("backprop", 0, 0),
    ],
)
def test_f_is_evaluated_exactly_as_often_as_reported(cell, name, forward, backward):
    f = Recorder(cell)
    solution = fixed_point(f, cell.z0, adjoint=ADJOINTS[name])
    assert solution.num_evals == f.count == int(solution.num_steps.max()) + forward
    solution.value.sum().backward()
    assert f.count == solution.num_evals + backward


def test_phantom_counts_its_steps(cell):
    f = Recorder(cell)
    solution = fixed_point(f, cell.z0, adjoint=PhantomAdjoint(steps=4))
    assert solution.num_evals == f.count == int(solution.num_steps.max()) + 4


class _CountBackward(torch.autograd.Function):
    """The identity; counts how often a gradient is computed through it."""

    @staticmethod
    def forward(ctx, tensor, counter):
        ctx.counter = counter
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.counter.append(1)
        return gradient, None


@pytest.mark.parametrize(("name", "products"), [("implicit", None), ("implicit_checkpoint", None), ("neumann", 2)])
def test_products_are_with_respect_to_z_alone(cell, name, products):
    """Parameters and inputs get their gradient once, after the solve; the solve makes products with `J^T` only."""
    reports, of_z, of_w, of_x = [], [], [], []
    adjoint = ADJOINTS[name]
    if products is None:
        adjoint = ImplicitAdjoint(callback=reports.append, checkpoint=adjoint.checkpoint)

    def f(z):
        w, x = _CountBackward.apply(cell.w, of_w), _CountBackward.apply(cell.x, of_x)
        return torch.tanh(_CountBackward.apply(z, of_z) @ w.T + x @ cell.u.T)

    value = fixed_point(f, cell.z0, adjoint=adjoint).value
    assert not of_z
    value.sum().backward()
    products = reports[0].num_evals if products is None else products
    assert products >= 2
    assert len(of_w) == len(of_x) == 1
    assert products <= len(of_z) <= products + 1  # one more where autograd goes on to z itself


class _Saved:
    """What the forward pass keeps for the backward: distinct storages, parameters and inputs excepted."""

    def __init__(self, leaves: list[Tensor]) -> None:
        self.known = {leaf.untyped_storage().data_ptr() for leaf in leaves}
        self.sizes: dict[int, int] = {}
        self.kept: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.kept.append(tensor.detach())  # so that no address is used twice
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def saved_bytes(cell: Cell, max_steps: int, adjoint) -> int:
    saved = _Saved([*cell.leaves, cell.z0])
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        solution = solve(
            cell, cell.z0, solver=FixedPointIteration(rtol=1e-15, max_steps=max_steps, damping=0.9), adjoint=adjoint
        )
        assert solution.num_steps.max() == max_steps  # so strongly damped, it is never done
    return saved.bytes


@pytest.mark.parametrize("name", [name for name in ADJOINTS if name != "backprop"])
def test_memory_kept_for_the_backward_does_not_grow_with_the_steps(cell, name):
    short, long = (saved_bytes(cell, steps, ADJOINTS[name]) for steps in (2, 200))
    assert short == long > 0


def test_memory_of_backprop_grows_with_the_steps(cell):
    """The control: the way of measuring sees what is kept."""
    assert saved_bytes(cell, 40, ADJOINTS["backprop"]) > 5 * saved_bytes(cell, 4, ADJOINTS["backprop"])


def test_checkpoint_keeps_less_than_one_graph():
    class Deep(Cell):
        def __call__(self, z):
            for _ in range(10):
                z = 0.9 * torch.tanh(z @ self.w.T + self.x @ self.u.T)
            return z

    cell = Deep()
    sizes = {
        name: saved_bytes(cell, 2, ADJOINTS[name]) for name in ("implicit", "implicit_checkpoint", "implicit_twice")
    }
    assert sizes["implicit_checkpoint"] < sizes["implicit"] / 4
    assert sizes["implicit_twice"] > 1.5 * sizes["implicit"]


def test_tensors_alive_after_the_forward_do_not_grow_with_the_steps(cell):
    def tensors() -> list[Tensor]:
        gc.collect()
        return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]

    def alive(max_steps: int) -> int:
        before = tensors()  # held, so that no identity is used twice
        solution = solve(
            cell, cell.z0, solver=Broyden(rtol=1e-15, max_steps=max_steps, history_size=100), adjoint=IMPLICIT
        )
        assert solution.num_steps.max() == max_steps
        known = {id(o) for o in before}
        return sum(id(o) not in known for o in tensors())

    assert alive(2) == alive(12)


@adjoints
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_leaked_without_the_garbage_collector(cell, adjoint, backward):
    gc.collect()
    gc.disable()
    try:

        def run() -> list[weakref.ref]:
            injection = cell.x @ cell.u.T
            holder = nn.Linear(1, 1)  # f itself has to die too

            def f(z):
                assert holder is not None
                return torch.tanh(z @ cell.w.T + injection)

            value = fixed_point(f, cell.z0, adjoint=adjoint).value
            if backward:
                value.sum().backward()
            return [weakref.ref(injection), weakref.ref(holder), weakref.ref(value)]

        assert [ref() for ref in run()] == [None] * 3
    finally:
        gc.enable()


def test_backward_does_not_leave_gradients_on_the_callers_z0(cell):
    z0 = cell.z0.clone().requires_grad_()
    fixed_point(cell, z0, adjoint=IMPLICIT).value.sum().backward()
    assert z0.grad is None


@pytest.mark.parametrize(
    "solver",
    [
        FixedPointIteration(max_steps=200),
        Anderson(max_steps=200),
        pytest.param(Broyden(max_steps=200)),
        pytest.param(Broyden(max_steps=200, line_search_steps=2)),
        pytest.param(GMRES(max_steps=200)),
    ],
    ids=str,
)
def test_backprop_gradient_is_finite_beside_a_sample_that_started_at_its_equilibrium(solver):
    slopes = torch.tensor([[0.5, 0.5, 0.5], [0.9, -0.9, 0.3]])
    bias = torch.tensor([[0.0], [1.0]]).expand(2, 3).clone().requires_grad_()
    value = fixed_point(lambda z: slopes * z + bias, torch.zeros(2, 3), solver=solver, adjoint=BackpropAdjoint()).value
    (gradient,) = torch.autograd.grad(value.sum(), bias)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[1], 1 / (1 - slopes[1]), rtol=1e-1, atol=0.0)


def _forward_mode(solve, x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        solve(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS = {
    "grad": lambda solve, x: torch.func.grad(lambda x: solve(x).sum())(x),
    "vmap": lambda solve, x: torch.func.vmap(solve)(x),
    "forward_mode": _forward_mode,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_unsupported_transform_raises_instead_of_losing_the_derivative(cell, transform):
    def solve(x):
        return fixed_point(lambda z: torch.tanh(z @ cell.w.T + x @ cell.u.T), cell.z0).value

    with pytest.raises(NotImplementedError, match=r"torch\.func transforms|forward-mode derivatives of an equilibrium"):
        transform(solve, cell.x.detach())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_derivative_is_not_dropped_where_nothing_wants_a_gradient():
    def solve(shift):
        return fixed_point(lambda z: 0.5 * z + shift, torch.zeros_like(shift))

    with pytest.raises(NotImplementedError, match="forward-mode derivatives of an equilibrium"):
        _forward_mode(solve, torch.ones(2, 3))
