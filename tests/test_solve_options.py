"""Less, more or other than a plain solve: kept states, step limits, truncated training, observers, complex states."""

import pytest
import torch
from torch import Tensor, nn

from deepeq import (
    DEQ,
    GMRES,
    Anderson,
    BackpropAdjoint,
    Broyden,
    FixedPointIteration,
    ImplicitAdjoint,
    NeumannAdjoint,
    PhantomAdjoint,
    Result,
    Unrolled,
    fixed_point,
    root_find,
)
from tests.problems import Recorder, solve

EXACT = Broyden(rtol=1e-12, max_steps=200, history_size=100)
IMPLICIT = ImplicitAdjoint(solver=GMRES(rtol=1e-12, max_steps=100))
SOLVERS = [FixedPointIteration(max_steps=60), Anderson(), Broyden(), GMRES(rtol=1e-3)]
solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
ONE_EVALUATION = {  # adjoints whose kept states are differentiable through one evaluation of f
    "implicit": ImplicitAdjoint(),
    "implicit_checkpoint": ImplicitAdjoint(checkpoint=True),
    "implicit_twice": ImplicitAdjoint(twice_differentiable=True),
    "phantom": PhantomAdjoint(steps=2),
    "phantom_last": PhantomAdjoint(steps=2, returns="last"),
    "neumann": NeumannAdjoint(),
}
adjoints = pytest.mark.parametrize("adjoint", ONE_EVALUATION.values(), ids=list(ONE_EVALUATION))


class Cell(nn.Module):
    """`tanh(W z + x)` in float64."""

    def __init__(self, gain: float = 0.8) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.w = nn.Parameter(gain * torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))[0])
        self.x = torch.randn(3, 4, generator=g, dtype=torch.float64)
        self.z0 = torch.zeros(3, 4, dtype=torch.float64)

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        return torch.tanh(z @ self.w.T + (self.x if x is None else x))


@pytest.fixture
def cell() -> Cell:
    return Cell()


# --- keep ------------------------------------------------------------------------------------------------------------


@adjoints
@pytest.mark.parametrize("solver", SOLVERS[:3], ids=lambda solver: type(solver).__name__)
def test_kept_state_is_f_of_the_point_of_its_step(cell, solver, adjoint):
    f = Recorder(cell)
    with torch.no_grad():
        fixed_point(f, cell.z0, solver=solver, verify=False)
    solution = solve(cell, cell.z0, solver=solver, adjoint=adjoint, keep=[2, 1, 3])
    for state, step in zip(solution.kept, (2, 1, 3), strict=True):
        point = f.points[step - 1]
        torch.testing.assert_close(state, cell(point))
        (gradient,) = torch.autograd.grad(state.square().sum(), cell.w, retain_graph=True)
        (expected,) = torch.autograd.grad(cell(point).square().sum(), cell.w)
        torch.testing.assert_close(gradient, expected)


def test_each_kept_state_costs_one_evaluation_with_gradients_and_none_without(cell):
    counts = {}
    for grad in (True, False):
        for keep in ((), (1, 3)):
            f = Recorder(cell)
            with torch.set_grad_enabled(grad):
                solution = fixed_point(f, cell.z0, keep=keep)
            assert solution.num_evals == f.count
            assert len(solution.kept) == len(keep)
            assert all(state.requires_grad == grad for state in solution.kept)
            counts[grad, keep] = f.count
    assert counts[True, (1, 3)] == counts[True, ()] + 2
    assert counts[False, (1, 3)] == counts[False, ()]


@adjoints
def test_kept_states_are_the_same_without_gradients(cell, adjoint):
    with_graph = solve(cell, cell.z0, adjoint=adjoint, keep=[1, 2])
    with torch.no_grad():
        without = solve(cell, cell.z0, adjoint=adjoint, keep=[1, 2])
    for a, b in zip(with_graph.kept, without.kept, strict=True):
        torch.testing.assert_close(a, b)


@adjoints
def test_step_after_the_end_keeps_the_value_and_its_gradient(cell, adjoint):
    solution = solve(cell, cell.z0, adjoint=adjoint, keep=[1, 100])
    assert torch.equal(solution.kept[1], solution.value)
    gradients = [
        torch.autograd.grad(state.sum(), cell.w, retain_graph=True)[0] for state in (solution.kept[1], solution.value)
    ]
    assert torch.equal(*gradients)


def test_loss_along_the_way_and_at_the_end_adds_both_gradients(cell):
    solution = fixed_point(cell, cell.z0, keep=[2])
    parts = [torch.autograd.grad(z.sum(), cell.w, retain_graph=True)[0] for z in (solution.kept[0], solution.value)]
    (total,) = torch.autograd.grad(solution.kept[0].sum() + solution.value.sum(), cell.w)
    torch.testing.assert_close(total, parts[0] + parts[1])


def test_backprop_adjoint_keeps_states_with_the_graph_of_all_steps_before(cell):
    solution = fixed_point(
        cell, cell.z0, solver=FixedPointIteration(max_steps=100), adjoint=BackpropAdjoint(), keep=[3]
    )
    by_hand = cell(cell(cell(cell.z0)))
    torch.testing.assert_close(solution.kept[0], by_hand)
    (gradient,) = torch.autograd.grad(solution.kept[0].sum(), cell.w)
    (expected,) = torch.autograd.grad(by_hand.sum(), cell.w)
    torch.testing.assert_close(gradient, expected)


def test_kept_state_has_the_structure_of_z0():
    z0 = {"a": torch.zeros(2, 3), "b": (torch.zeros(2, 1),)}

    def f(state):
        return {"a": 0.5 * state["a"] + 1.0, "b": (0.2 * state["b"][0] + 1.0,)}

    (kept,) = fixed_point(f, z0, keep=[1]).kept
    assert torch.equal(kept["a"], torch.ones(2, 3))
    assert torch.equal(kept["b"][0], torch.ones(2, 1))


def test_root_keeps_the_next_point_of_its_map():
    (kept,) = root_find(lambda z: 1.0 - z, torch.zeros(2, 3), keep=[1]).kept
    torch.testing.assert_close(kept, torch.ones(2, 3), rtol=1e-3, atol=0.0)  # the scale makes it Newton's step


@pytest.mark.parametrize("keep", [[0], [-1], [1.0], [True], ["1"]], ids=str)
def test_bad_keep_is_named(keep):
    with pytest.raises(ValueError, match="keep="):
        fixed_point(torch.cos, torch.zeros(2, 3), keep=keep)


# --- least steps -----------------------------------------------------------------------------------------------------


@solvers
@pytest.mark.parametrize("grad", [True, False])
def test_every_problem_takes_its_least_steps(solver, grad):
    slopes = torch.tensor([[0.5], [0.9], [0.0]])
    z0 = torch.tensor([[2.0], [0.0], [0.0]])  # the first one is there already
    free = type(solver)(rtol=1e-3, max_steps=200)
    held = type(solver)(rtol=1e-3, max_steps=200, min_steps=6)
    with torch.set_grad_enabled(grad):
        expected = fixed_point(lambda z: slopes * z + 1.0, z0, solver=free)
        solution = fixed_point(lambda z: slopes * z + 1.0, z0, solver=held)
    assert torch.equal(solution.num_steps, expected.num_steps.clamp_min(6))
    assert expected.num_steps[0] == 1
    assert solution.converged.all()
    assert (solution.relative_residual <= expected.relative_residual).all()


# --- no steps --------------------------------------------------------------------------------------------------------


@solvers
@pytest.mark.parametrize("grad", [True, False])
def test_no_steps_return_the_first_point(cell, solver, grad):
    z0, f = torch.full_like(cell.z0, 0.3), Recorder(cell)
    with torch.set_grad_enabled(grad):
        solution = solve(f, z0, solver=type(solver)(max_steps=0))
    assert torch.equal(solution.value, z0)
    assert solution.value is not z0
    assert solution.result is Result.MAX_STEPS
    assert not solution.converged.any()
    assert solution.num_steps.tolist() == [0, 0, 0]
    assert solution.residual_history.shape == (0, 3)
    assert solution.num_evals == f.count <= 1
    if grad:
        torch.testing.assert_close(solution.absolute_residual, (cell(z0) - z0).norm(dim=1).detach())


def by_hand(cell: Cell, z: Tensor, steps: int, damping: float) -> Tensor:
    for _ in range(steps):
        z = damping * z + (1.0 - damping) * cell(z)
    return z


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("warm_up", [0, 3])
def test_last_phantom_step_is_truncated_backpropagation(cell, steps, damping, warm_up):
    solver = FixedPointIteration(rtol=1e-12, max_steps=warm_up)
    adjoint = PhantomAdjoint(steps=steps, damping=damping, returns="last")
    z0 = torch.full_like(cell.z0, 0.3)
    with torch.no_grad():
        start = by_hand(cell, z0, warm_up, 0.0)
    expected = by_hand(cell, start, steps, damping)
    solution = solve(cell, z0, solver=solver, adjoint=adjoint)
    torch.testing.assert_close(solution.value, expected)
    gradients = [torch.autograd.grad(z.square().sum(), cell.w)[0] for z in (solution.value, expected)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        before = by_hand(cell, start, steps - 1, damping)
        torch.testing.assert_close(solve(cell, z0, solver=solver, adjoint=adjoint).value, expected)
    distance, size = (cell(before) - before).norm(dim=1), cell(before).norm(dim=1)
    torch.testing.assert_close(solution.relative_residual, (distance / size).detach())
    torch.testing.assert_close(solution.absolute_residual, distance.detach())
    assert solution.num_evals == warm_up + steps
    assert not solution.converged.any()


@pytest.mark.parametrize("max_steps", [0, 30])
def test_truncation_that_was_asked_for_is_no_failure(cell, max_steps):
    adjoint = PhantomAdjoint(steps=2, returns="last")
    solution = fixed_point(cell, cell.z0, solver=Broyden(max_steps=max_steps), adjoint=adjoint, on_failure="raise")
    assert solution.message == ""
    assert solution.result is Result.MAX_STEPS


def test_warm_started_truncated_training_moves_to_the_equilibrium(cell):
    """With `returns="equilibrium"` and no steps of a solver the state would stay where it is."""
    layer = DEQ(cell, solver=Broyden(max_steps=0), adjoint=PhantomAdjoint(steps=2, returns="last"))
    z, hand = cell.z0, cell.z0
    for _ in range(40):
        z = layer(cell.x, z0=z.detach()).value
        hand = by_hand(cell, hand.detach(), 2, 0.0)
        torch.testing.assert_close(z, hand)
    torch.testing.assert_close(z, fixed_point(cell, cell.z0, solver=EXACT).value, rtol=1e-6, atol=1e-6)


def test_unknown_return_is_named():
    with pytest.raises(ValueError, match="returns='first' of PhantomAdjoint"):
        PhantomAdjoint(returns="first")


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("no_grad_depth", [0, 1, 4])
def test_layers_without_a_graph_are_truncated_backpropagation(cell, no_grad_depth, checkpoint):
    layer = Unrolled(cell, 3, no_grad_depth=no_grad_depth, checkpoint=checkpoint, keep_every=2)
    solution = layer(cell.x)
    with torch.no_grad():
        start = by_hand(cell, cell.z0, no_grad_depth, 0.0)
    states = [by_hand(cell, start, steps, 0.0) for steps in (2, 3)]
    torch.testing.assert_close(solution.value, states[1])
    torch.testing.assert_close(solution.kept[0], states[0])
    assert solution.num_evals == len(solution.residual_history) == no_grad_depth + 3
    for a, b in ((solution.value, states[1]), (solution.kept[0], states[0])):
        gradients = [torch.autograd.grad(z.square().sum(), cell.w, retain_graph=True)[0] for z in (a, b)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("no_grad_depth", [-1, 1.0, True])
def test_bad_no_grad_depth_is_named(no_grad_depth):
    with pytest.raises(ValueError, match="no_grad_depth="):
        Unrolled(Cell(), 3, no_grad_depth=no_grad_depth)


# --- observers -------------------------------------------------------------------------------------------------------


@solvers
@pytest.mark.parametrize("grad", [True, False])
def test_callback_sees_each_step(solver, grad):
    slopes, seen = torch.tensor([[0.9], [0.1]], dtype=torch.float64), []
    f = Recorder(lambda z: slopes * z + 1.0)
    with torch.set_grad_enabled(grad):
        solution = fixed_point(
            f,
            torch.zeros(2, 1, dtype=torch.float64),
            solver=type(solver)(rtol=1e-5, max_steps=200),
            callback=lambda *step: seen.append(step),
        )
    steps = int(solution.num_steps.max())
    assert [step for step, _, _ in seen] == list(range(1, steps + 1))
    for (step, state, residual), point in zip(seen, f.points, strict=False):
        assert torch.equal(state, point)
        assert not residual.requires_grad
        running = solution.num_steps >= step
        assert torch.equal(residual[running], solution.residual_history[step - 1][running])


def test_callback_receives_states_with_the_structure_of_z0():
    seen = []
    fixed_point(
        lambda s: {"a": 0.5 * s["a"] + 1.0},
        {"a": torch.zeros(2, 3, 4)},
        batch_dims=2,
        callback=lambda step, state, residual: seen.append((state["a"].shape, residual.shape)),
    )
    assert set(seen) == {((2, 3, 4), (2, 3))}


def test_exception_of_a_callback_ends_the_solve():
    def stop(step, state, residual):
        if step == 2:
            raise KeyboardInterrupt

    f = Recorder(torch.cos)
    with pytest.raises(KeyboardInterrupt):
        fixed_point(f, torch.zeros(2, 3), callback=stop)
    assert f.count == 2


# --- complex states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@solvers
def test_complex_equilibrium_has_the_value_and_gradient_of_a_dense_solve(solver, dtype):
    g = torch.Generator().manual_seed(3)
    matrix = (0.6 * torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.complex128))[0]).to(dtype)
    b = torch.randn(3, 4, generator=g, dtype=torch.complex128).to(dtype)
    matrix, b = matrix.requires_grad_(), b.requires_grad_()
    tight = type(solver)(rtol=1e-6 if dtype == torch.complex64 else 1e-10, max_steps=200)
    solution = fixed_point(
        lambda z: z @ matrix.T + b, torch.zeros_like(b), solver=tight, adjoint=ImplicitAdjoint(solver=tight)
    )
    direct = torch.linalg.solve(torch.eye(4, dtype=dtype) - matrix, b.T).T
    assert solution.value.dtype == dtype
    assert solution.relative_residual.dtype == dtype.to_real()
    torch.testing.assert_close(solution.value, direct, rtol=1e-4, atol=1e-4)
    for loss in (lambda z: z.abs().square().sum(), lambda z: (z.real * z.imag).sum()):
        found, expected = (
            torch.autograd.grad(loss(z), (matrix, b), retain_graph=True) for z in (solution.value, direct)
        )
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3)


def test_complex_residual_is_that_of_complex_numbers():
    z0 = torch.zeros(2, 3, dtype=torch.complex64)
    solution = solve(lambda z: 0.5j * z + (3.0 + 4.0j), z0, solver=FixedPointIteration(max_steps=2))
    z = solution.value.detach()
    fz = 0.5j * z + (3.0 + 4.0j)
    torch.testing.assert_close(solution.relative_residual, (fz - z).norm(dim=1) / fz.norm(dim=1))


def test_complex_and_real_parts_of_one_state_keep_their_dtypes():
    z0 = {"field": torch.zeros(2, 3, dtype=torch.complex128), "size": torch.zeros(2, 1)}

    def f(state):
        size = state["size"].double()
        return {
            "field": 0.5j * state["field"] + size,
            "size": (0.2 * state["field"].abs().mean(dim=1, keepdim=True) + 1.0).float(),
        }

    solution = fixed_point(f, z0, solver=Broyden(rtol=1e-6, max_steps=60), norm="positions", keep=[1])
    field, size = solution.value["field"], solution.value["size"]
    assert (field.dtype, size.dtype) == (torch.complex128, torch.float32)
    torch.testing.assert_close(field, (size / (1.0 - 0.5j)).to(torch.complex128).expand(2, 3), rtol=1e-4, atol=1e-5)
    assert solution.kept[0]["field"].dtype == torch.complex128


def test_complex_result_for_a_real_state_is_named():
    with pytest.raises(TypeError, match=r"torch\.complex64 for a real state; start from a complex z0"):
        fixed_point(lambda z: z * 1j, torch.ones(2, 3))


# --- torch.func ------------------------------------------------------------------------------------------------------

REVERSE = {
    "grad": lambda loss, w: torch.func.grad(loss)(w),
    "vjp": lambda loss, w: torch.func.vjp(loss, w)[1](torch.ones((), dtype=w.dtype))[0],
    "jacrev": lambda loss, w: torch.func.jacrev(loss)(w),
}
UNSUPPORTED = {
    "vmap": lambda loss, w: torch.func.vmap(loss)(w.unsqueeze(0)),
    "jvp": lambda loss, w: torch.func.jvp(loss, (w,), (torch.ones_like(w),)),
    "jacfwd": lambda loss, w: torch.func.jacfwd(loss)(w),
}


@adjoints
@pytest.mark.parametrize("transform", [*REVERSE.values(), *UNSUPPORTED.values()], ids=[*REVERSE, *UNSUPPORTED])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_transform_of_torch_func_ends_in_one_sentence(cell, transform, adjoint):
    def loss(w):
        return fixed_point(lambda z: torch.tanh(z @ w.T + cell.x), cell.z0, adjoint=adjoint).value.sum()

    with pytest.raises(
        NotImplementedError, match=r"torch\.func transforms \(.*\) cannot pass through an equilibrium; use"
    ):
        transform(loss, cell.w.detach())


@pytest.mark.parametrize("name", ["grad", "vjp", "jvp"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_backprop_adjoint_passes_through_the_transforms_that_it_can(cell, name):
    def loss(w):
        solver = FixedPointIteration(rtol=1e-10, max_steps=200)
        f = lambda z: torch.tanh(z @ w.T + cell.x)  # noqa: E731
        return fixed_point(f, cell.z0, solver=solver, adjoint=BackpropAdjoint()).value.sum()

    w = cell.w.detach().requires_grad_()
    (expected,) = torch.autograd.grad(loss(w), w)
    if name == "jvp":
        _, tangent = torch.func.jvp(loss, (w.detach(),), (torch.ones_like(w),))
        torch.testing.assert_close(tangent, expected.sum(), rtol=1e-6, atol=1e-8)
        return
    torch.testing.assert_close(REVERSE[name](loss, w.detach()), expected, rtol=1e-6, atol=1e-8)


def test_equilibrium_inside_a_vmap_of_a_backprop_adjoint_is_refused(cell):
    def value(x):
        return fixed_point(lambda z: torch.tanh(z @ cell.w.T + x), cell.z0[:1], adjoint=BackpropAdjoint()).value

    with pytest.raises(NotImplementedError, match="Vmap"):
        torch.func.vmap(value)(cell.x)
