"""`fixed_point` and `root_find`: states of any structure and precision, mistakes, failures, autocast."""

import ast
import inspect
import math
import textwrap
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from deepeq import (
    GMRES,
    Anderson,
    BackpropAdjoint,
    Broyden,
    ConvergenceError,
    FixedPointIteration,
    ImplicitAdjoint,
    NeumannAdjoint,
    PhantomAdjoint,
    Result,
    Solution,
    fixed_point,
    root_find,
)
from deepeq.packing import Packing
from tests.problems import PROBLEMS, Recorder, relative_residual, solve

ADJOINTS = {
    "implicit": ImplicitAdjoint(),
    "implicit_checkpoint": ImplicitAdjoint(checkpoint=True),
    "implicit_twice": ImplicitAdjoint(twice_differentiable=True),
    "phantom": PhantomAdjoint(),
    "neumann": NeumannAdjoint(),
    "backprop": BackpropAdjoint(),
}
adjoints = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=list(ADJOINTS))
SOLVERS = [
    FixedPointIteration(max_steps=100),
    Anderson(max_steps=100),
    Broyden(max_steps=100),
    GMRES(max_steps=100, rtol=1e-3),
]
solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
TIGHT = Broyden(rtol=1e-10, max_steps=100)
COARSE = GMRES(rtol=1e-2)  # what 16-bit products can reach
COARSE_ADJOINTS = {
    "implicit": ImplicitAdjoint(solver=COARSE),
    "implicit_checkpoint": ImplicitAdjoint(solver=COARSE, checkpoint=True),
    "implicit_twice": ImplicitAdjoint(solver=COARSE, twice_differentiable=True, callback=lambda report: None),
    "phantom": PhantomAdjoint(steps=8),
    "neumann": NeumannAdjoint(terms=8),
    "backprop": BackpropAdjoint(),
}


# --- structures ------------------------------------------------------------------------------------------------------


def coupled(a, b):
    """Two states that need each other, `(B, 2)` and `(B, 3, 1)`."""
    mean_a, mean_b = a.mean(dim=1, keepdim=True), b.mean(dim=(1, 2)).unsqueeze(1)
    return torch.tanh(0.5 * a + mean_b + 0.2), torch.cos(0.3 * b + mean_a.unsqueeze(2))


def zeros(dtype=torch.float64):
    return torch.zeros(4, 2, dtype=dtype), torch.zeros(4, 3, 1, dtype=dtype)


def coupled_solution():
    a, b = zeros()
    for _ in range(2000):
        fa, fb = coupled(a, b)
        a, b = 0.5 * (a + fa), 0.5 * (b + fb)
    return a, b


@pytest.mark.parametrize("solver", [TIGHT, Anderson(rtol=1e-10, max_steps=100)], ids=["broyden", "anderson"])
def test_tuple_list_dict_and_nested_states_give_one_answer(solver):
    a0, b0 = zeros()
    expected = coupled_solution()

    def as_dict(state):
        a, b = coupled(state["a"], state["b"])
        return {"a": a, "b": b}

    def as_nested(state):
        a, b = coupled(state["outer"][0], state["outer"][1]["b"])
        return {"outer": (a, {"b": b})}

    def value_of(f, z0):
        return fixed_point(f, z0, solver=solver).value

    values = {
        tuple: value_of(lambda s: coupled(*s), (a0, b0)),
        list: value_of(lambda s: list(coupled(*s)), [a0, b0]),
    }
    for kind, value in values.items():
        assert type(value) is kind
    mapping, nested = value_of(as_dict, {"a": a0, "b": b0}), value_of(as_nested, {"outer": (a0, {"b": b0})})
    assert set(mapping) == {"a", "b"}
    found = [*values.values(), (mapping["a"], mapping["b"]), (nested["outer"][0], nested["outer"][1]["b"])]
    for a, b in found:
        torch.testing.assert_close(a, expected[0], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(b, expected[1], rtol=1e-8, atol=1e-9)


def test_norms_and_inner_products_run_over_all_parts_of_a_state():
    """A solver that took them part by part would break the secant equation: the steps would differ."""
    a0, b0 = zeros()

    def flat(z):
        a, b = coupled(z[:, :2], z[:, 2:].unsqueeze(2))
        return torch.cat([a, b.squeeze(2)], dim=1)

    together = fixed_point(flat, torch.cat([a0, b0.squeeze(2)], dim=1), solver=TIGHT)
    parts = fixed_point(lambda s: coupled(*s), (a0, b0), solver=TIGHT, norm="whole")
    assert torch.equal(parts.relative_residual, together.relative_residual)
    assert torch.equal(parts.num_steps, together.num_steps)
    assert torch.equal(parts.value[0], together.value[:, :2])
    assert parts.relative_residual.shape == parts.converged.shape == (4,)


def test_dict_returned_in_another_order_is_matched_by_key():
    value = fixed_point(
        lambda s: {"b": 0.5 * s["b"] + 1.0, "a": 0.5 * s["a"]}, {"a": torch.ones(2, 1), "b": torch.zeros(2, 1)}
    ).value
    torch.testing.assert_close(value["b"], torch.full((2, 1), 2.0), rtol=1e-3, atol=1e-3)


@adjoints
def test_gradients_reach_every_part_of_a_structured_state(adjoint):
    p = torch.tensor([0.1, 0.2], requires_grad=True, dtype=torch.float64)

    def f(s):
        return {"a": torch.tanh(0.5 * s["b"] + p[0]), "b": torch.tanh(0.4 * s["a"] + p[1])}

    z0 = {"a": torch.zeros(2, 1, dtype=torch.float64), "b": torch.zeros(2, 1, dtype=torch.float64)}
    for key in ("a", "b"):
        value = fixed_point(f, z0, adjoint=adjoint).value[key]
        (gradient,) = torch.autograd.grad(value.sum(), p)
        assert gradient.isfinite().all()
        assert gradient["ab".index(key)] > 1.0  # two samples, slopes near one
    value = fixed_point(f, z0, adjoint=ImplicitAdjoint(solver=GMRES(rtol=1e-12)), solver=TIGHT).value
    a, b = value["a"][0, 0].item(), value["b"][0, 0].item()
    sa, sb = 1 - a * a, 1 - b * b
    (gradient,) = torch.autograd.grad(value["a"][0, 0], p)
    determinant = 1 - 0.5 * sa * 0.4 * sb
    assert gradient.tolist() == pytest.approx([sa / determinant, 0.5 * sa * sb / determinant], rel=1e-8)


@solvers
@pytest.mark.parametrize(
    ("shape", "residual_shape"), [((), (1,)), ((1,), (1,)), ((5,), (5,)), ((1, 3), (1,)), ((2, 1, 3, 2), (2,))]
)
def test_state_of_any_shape(shape, residual_shape, solver):
    solution = fixed_point(lambda z: 0.5 * z + 1.0, torch.zeros(shape), solver=solver)
    torch.testing.assert_close(solution.value, torch.full(shape, 2.0), rtol=5e-3, atol=0.0)
    assert solution.relative_residual.shape == residual_shape


@solvers
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_state_is_converged_at_once(shape, solver):
    shift = torch.ones(shape, requires_grad=True)
    solution = fixed_point(
        lambda z: 0.5 * z + shift, torch.zeros(shape), solver=solver, adjoint=ImplicitAdjoint(solver=solver)
    )
    assert solution.value.shape == shape
    assert solution.result is Result.CONVERGED
    assert solution.relative_residual.shape == (shape[0],)
    assert (solution.num_steps <= 1).all()
    solution.value.sum().backward()
    assert shift.grad.shape == shape


def test_non_contiguous_and_expanded_states():
    problem = PROBLEMS["tanh"](torch.float64)
    expected = fixed_point(problem.f, problem.z0, solver=TIGHT).value
    transposed = torch.zeros(5, 3, dtype=torch.float64).T
    strided = torch.zeros(3, 10, dtype=torch.float64)[:, ::2]
    expanded = torch.zeros(1, 1, dtype=torch.float64).expand(3, 5)
    for z0 in (transposed, strided, expanded):
        before = z0.clone()
        assert torch.equal(fixed_point(problem.f, z0, solver=TIGHT).value, expected)
        assert torch.equal(z0, before)
    non_contiguous_result = fixed_point(lambda z: problem.f(z).T.contiguous().T, problem.z0, solver=TIGHT)
    assert torch.equal(non_contiguous_result.value, expected)


def test_map_that_returns_its_argument_or_a_view_of_it():
    z0 = torch.randn(2, 3)
    for f in (lambda z: z, lambda z: z.view(2, 3), lambda z: z.T.T):
        solution = fixed_point(f, z0)
        assert solution.num_steps.tolist() == [1, 1]
        assert torch.equal(solution.value, z0)


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@solvers
def test_16_bit_state_is_solved_in_float32(solver, dtype):
    slopes = torch.linspace(-0.5, 0.5, 6).to(dtype).requires_grad_()
    seen = []

    def f(z):
        seen.append(z.dtype)
        return slopes * z + 1.0

    solution = solve(f, torch.zeros(2, 6, dtype=dtype), solver=solver, adjoint=ImplicitAdjoint(solver=COARSE))
    assert set(seen) == {dtype}
    assert solution.value.dtype == dtype
    assert solution.relative_residual.dtype == solution.residual_history.dtype == torch.float32
    exact = 1 / (1 - slopes.detach().double())
    torch.testing.assert_close(solution.value[0].double(), exact, rtol=2e-2, atol=0.0)
    (gradient,) = torch.autograd.grad(solution.value.sum(), slopes)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), 2 * exact.square(), rtol=5e-2, atol=0.0)


def test_16_bit_state_converges_to_the_rounding_of_its_own_precision():
    """The residual is measured where `f` was evaluated, not where the unrounded iterate is."""
    slopes = torch.linspace(-0.9, 0.9, 32).bfloat16()
    z0 = torch.zeros(4, 32, dtype=torch.bfloat16)
    solution = fixed_point(lambda z: slopes * z + 1.0, z0, solver=Broyden(rtol=1e-2, max_steps=100))
    assert solution.converged.all()
    actual = relative_residual(lambda z: slopes.float() * z + 1.0, solution.value.float())
    assert (actual < 2e-2).all()


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("second", [torch.float64, torch.float16])
def test_mixed_dtype_state_keeps_each_dtype(first, second):
    z0 = (torch.zeros(2, 3, dtype=first), torch.zeros(2, 1, dtype=second))

    def f(state):
        a, b = state
        return (0.5 * a + b.to(a.dtype), 0.2 * b + 1.0)

    solution = fixed_point(f, z0)
    assert [part.dtype for part in solution.value] == [first, second]
    assert solution.relative_residual.dtype == torch.promote_types(torch.float32, torch.promote_types(first, second))
    torch.testing.assert_close(solution.value[1].double(), torch.full((2, 1), 1.25).double(), rtol=1e-2, atol=0.0)
    torch.testing.assert_close(solution.value[0].double(), torch.full((2, 3), 2.5).double(), rtol=2e-2, atol=0.0)


def test_result_of_another_float_dtype_is_converted():
    solution = fixed_point(lambda z: (0.5 * z + 1.0).double(), torch.zeros(2, 3))
    assert solution.value.dtype == torch.float32
    torch.testing.assert_close(solution.value, torch.full((2, 3), 2.0), rtol=2e-3, atol=0.0)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [fixed_point, root_find])
def test_wrong_shape_or_structure_of_the_result_is_named(entry):
    z0, pair = torch.zeros(2, 3), (torch.zeros(2, 3), torch.zeros(2, 1))
    name = "f" if entry is fixed_point else "g"
    with pytest.raises(ValueError, match=rf"{name} returned shape \(2, 4\) for a state of shape \(2, 3\)"):
        entry(lambda z: torch.zeros(2, 4), z0)
    with pytest.raises(ValueError, match=rf"{name} returned shape \(2, 1\)"):
        entry(lambda z: z[:, :1], z0)  # would broadcast
    for f, start in [
        (lambda z: (z, z), z0),
        (lambda z: None, z0),
        (lambda z: 1.0, z0),
        (lambda s: s[0], pair),
        (lambda s: (s[0],), pair),
        (lambda s: {"a": s["a"], "c": s["a"]}, {"a": z0, "b": z0}),
    ]:
        with pytest.raises(ValueError, match="structure"):
            entry(f, start)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        entry(lambda z: z.long(), z0)
    with pytest.raises(TypeError, match=r"torch\.complex64"):
        entry(lambda z: z.to(torch.complex64), z0)


@pytest.mark.parametrize(
    ("z0", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, r"z0 must hold .* torch\.int64"),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, r"z0 must hold .* torch\.bool"),
        (1.0, TypeError, "float"),
        (None, TypeError, "NoneType"),
        ((), ValueError, "no tensor"),
        ({}, ValueError, "no tensor"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), ValueError, r"\(2, 3\), \(3, 3\)"),
        ((torch.zeros(2, 3), torch.zeros(())), ValueError, "batch"),
        ((torch.zeros(2, 3), 1), TypeError, "int"),
    ],
    ids=[
        "int64",
        "bool",
        "number",
        "none",
        "empty_tuple",
        "empty_dict",
        "two_batch_sizes",
        "no_dimension",
        "tensor_and_int",
    ],
)
def test_wrong_z0_is_named(z0, error, message):
    with pytest.raises(error, match=message):
        fixed_point(lambda z: z, z0)


def test_states_on_two_devices_are_named():
    with pytest.raises(ValueError, match="meta"):
        Packing((torch.zeros(2, 3), torch.zeros(2, 3, device="meta")))


def test_wrong_solver_or_adjoint_is_named():
    with pytest.raises(TypeError, match="solver='broyden'"):
        fixed_point(torch.cos, torch.zeros(1, 1), solver="broyden")
    with pytest.raises(TypeError, match=r"adjoint=GMRES\("):
        fixed_point(torch.cos, torch.zeros(1, 1), adjoint=GMRES())
    for entry in (fixed_point, root_find):
        with pytest.raises(TypeError, match="tol"):
            entry(torch.cos, torch.zeros(1, 1), tol=1e-3)
        with pytest.raises(TypeError, match="positional"):
            entry(torch.cos, torch.zeros(1, 1), Broyden())


def test_packing_round_trip_is_exact():
    state = {"a": torch.randn(3, 2, 2), "b": (torch.randn(3), torch.randn(3, 1).half())}
    packing = Packing(state)
    flat = packing.pack(state)
    assert flat.shape == (3, 6)
    assert flat.dtype == torch.float32
    back = packing.unpack(flat)
    assert torch.equal(back["a"], state["a"])
    assert torch.equal(back["b"][0], state["b"][0])
    assert torch.equal(back["b"][1], state["b"][1])
    assert back["b"][1].dtype == torch.float16


# --- failures --------------------------------------------------------------------------------------------------------


@solvers
@adjoints
def test_nan_input_raises_at_the_first_evaluation(solver, adjoint):
    x = torch.ones(2, 3)
    x[1, 1] = torch.nan
    with pytest.raises(ConvergenceError, match=r"step 1 \(the first evaluation, at z0\)") as error:
        fixed_point(lambda z: 0.5 * z + x, torch.zeros(2, 3), solver=solver, adjoint=adjoint)
    solution = error.value.solution
    assert solution.result is Result.NONFINITE
    assert solution.converged.tolist()[1] is False
    assert solution.value.isfinite().all()


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("entry", [fixed_point, root_find])
@solvers
def test_nan_at_a_step_is_reported_with_the_step(solver, entry, step):
    count = 0
    matrix = torch.tensor([[0.0, -0.9], [0.9, 0.0]])

    def f(z):
        nonlocal count
        count += 1
        return (z @ matrix + 1.0 - (z if entry is root_find else 0.0)) * (torch.nan if count == call else 1.0)

    # A root's second call, near z0, finds the scale; a value there that is not finite is no failure.
    call = step + 1 if entry is root_find and step > 1 else step
    name = "f" if entry is fixed_point else "g"
    tight = type(solver)(rtol=1e-7)
    with pytest.raises(ConvergenceError, match=f"{name} returned a non-finite value at step {step}") as error:
        entry(f, torch.zeros(1, 2), solver=tight)
    assert error.value.solution.num_steps.tolist() == [step]
    assert "look for NaN in the inputs and parameters" in str(error.value)


def test_nan_after_a_step_with_f_zero_is_reported_with_its_own_step():
    count = 0

    def f(z):
        nonlocal count
        count += 1
        return (0.0 * z, z + 1.0)[count - 1] if count < 3 else z * torch.nan

    with pytest.raises(ConvergenceError, match="at step 3"):
        fixed_point(f, torch.ones(1, 3), solver=FixedPointIteration(), verify=False)


def test_throw_raises_only_where_it_should():
    slow = FixedPointIteration(max_steps=3)
    problem = PROBLEMS["rotation_slow"](torch.float64)
    for entry, function in [(fixed_point, problem.f), (root_find, lambda z: problem.f(z) - z)]:
        solution = entry(function, problem.z0, solver=slow, on_failure="ignore")
        assert solution.result is Result.MAX_STEPS
        with pytest.raises(ConvergenceError, match="rtol") as error:
            entry(function, problem.z0, solver=slow, throw=True)
        torch.testing.assert_close(error.value.solution.relative_residual, solution.relative_residual)
        assert f"{solution.relative_residual.max():.1e}" in str(error.value)
        assert str(error.value) == solution.message
        entry(function, problem.z0, solver=Broyden(), throw=True)


def test_every_result_has_a_sentence():
    for result in Result:
        assert len(result.value.split()) >= 5


def test_every_field_of_a_solution_is_documented():
    tree = ast.parse(textwrap.dedent(inspect.getsource(Solution))).body[0]
    documented = [
        statement.target.id
        for statement, following in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(statement, ast.AnnAssign) and isinstance(getattr(following, "value", None), ast.Constant)
    ]
    assert tuple(documented) == Solution._fields
    assert Solution._fields == (
        "value",
        "relative_residual",
        "converged",
        "num_steps",
        "num_evals",
        "result",
        "residual_history",
        "absolute_residual",
        "kept",
        "message",
    )


# --- roots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("g", "z0", "root"),
    [
        (lambda z: torch.cos(z) - z, 0.0, 0.7390851332151607),
        (lambda z: -(z**3 + z - 2.0) / 4, 0.0, 1.0),
        (lambda z: torch.exp(-z) - z, 1.0, 0.5671432904097838),
        (lambda z: (2.0 - z * z) / 3, 1.0, math.sqrt(2.0)),
    ],
)
def test_root_find_finds_known_roots(g, z0, root):
    start = torch.full((2, 1), z0, dtype=torch.float64)
    recorder = Recorder(g)
    solution = root_find(recorder, start, solver=Broyden(rtol=1e-12, max_steps=50))
    torch.testing.assert_close(solution.value, torch.full_like(start, root), rtol=1e-10, atol=0.0)
    assert solution.converged.all()
    assert solution.num_evals == recorder.count


def test_root_find_is_the_fixed_point_of_z_plus_g():
    problem = PROBLEMS["affine"](torch.float64)
    direct = fixed_point(problem.f, problem.z0, solver=TIGHT)
    root = root_find(lambda z: problem.f(z) - z, problem.z0, solver=TIGHT)
    torch.testing.assert_close(root.value, direct.value, rtol=1e-9, atol=1e-12)


def test_root_find_atol_bounds_g_itself():
    problem = PROBLEMS["affine"](torch.float64)
    root = root_find(lambda z: problem.f(z) - z, problem.z0, solver=Broyden(rtol=0.0, atol=1e-6, max_steps=100))
    assert ((problem.f(root.value) - root.value).norm(dim=1) <= 1e-6).all()
    assert root.converged.all()


def test_root_find_of_a_structured_state():
    solution = root_find(
        lambda s: {"a": s["b"] - s["a"], "b": 1.0 - s["b"]},
        {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)},
        solver=Broyden(rtol=1e-6),
    )
    torch.testing.assert_close(solution.value["a"], torch.ones(2, 3), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(solution.value["b"], torch.ones(2, 3), rtol=1e-4, atol=0.0)


# --- autocast --------------------------------------------------------------------------------------------------------


def test_default_backward_converges_under_autocast():
    """Else every training step in 16 bits makes all 49 products, and warns."""
    module, x = nn.Linear(32, 32), torch.randn(4, 32)
    with torch.no_grad():
        module.weight.copy_(0.8 * torch.linalg.qr(torch.randn(32, 32))[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solver = Anderson(rtol=1e-2)
        value = fixed_point(lambda z: torch.tanh(module(z) + x), torch.zeros(4, 32), solver=solver).value
    with warnings.catch_warnings(record=True) as caught:
        value.sum().backward()
    assert not caught
    assert module.weight.grad.isfinite().all()


@pytest.mark.parametrize("adjoint", COARSE_ADJOINTS.values(), ids=list(COARSE_ADJOINTS))
@pytest.mark.parametrize("used", ["before", "after", "both"])
def test_weight_used_inside_and_outside_under_autocast_gets_both_gradients(adjoint, used):
    """Autocast caches the cast of a weight; one cached without a graph would drop a gradient in silence."""
    module = nn.Linear(6, 6)
    with torch.no_grad():
        module.weight.copy_(0.5 * torch.linalg.qr(torch.randn(6, 6))[0])
    x = torch.randn(4, 6)

    def loss(enabled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            h = torch.tanh(module(x)) if used != "after" else x
            z = fixed_point(lambda z: torch.tanh(module(z) + h), torch.zeros(4, 6), adjoint=adjoint).value
            out = module(z) if used != "before" else z
            return out.float().square().sum() + out.float().sum()

    parameters = list(module.parameters())
    mixed = torch.autograd.grad(loss(True), parameters)
    full = torch.autograd.grad(loss(False), parameters)
    for a, b in zip(mixed, full, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.05 * b.norm()


def test_tolerance_of_the_autocast_gradient_test_would_see_a_lost_gradient():
    """The control: without the inner or the outer use the gradient differs by far more than 5 percent."""
    weight = (0.5 * torch.linalg.qr(torch.randn(6, 6))[0]).requires_grad_()
    x = torch.randn(4, 6)

    def gradient(inside, outside):
        h = torch.tanh(linear(x, outside))
        z = fixed_point(lambda z: torch.tanh(linear(z, inside) + h), torch.zeros(4, 6)).value
        return torch.autograd.grad(linear(z, outside).square().sum(), weight)[0]

    both = gradient(weight, weight)
    for lost in (gradient(weight, weight.detach()), gradient(weight.detach(), weight)):
        assert (lost - both).norm() > 0.15 * both.norm()


@solvers
def test_autocast_solves_and_differentiates_close_to_float32(solver):
    module = nn.Linear(6, 6)
    with torch.no_grad():
        module.weight.copy_(0.5 * torch.linalg.qr(torch.randn(6, 6))[0])
    coarse = type(solver)(rtol=2e-2, max_steps=50)
    inside, gradients = [], []
    for enabled in (True, False):

        def f(z, enabled=enabled):
            product = module(z)
            inside.append((enabled, product.dtype))
            return product + 1.0 if type(solver) is GMRES else torch.tanh(product + 1.0)

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            solution = fixed_point(f, torch.zeros(2, 6), solver=coarse, adjoint=ImplicitAdjoint(solver=COARSE))
        assert solution.value.dtype == solution.relative_residual.dtype == torch.float32
        assert solution.converged.all()
        gradients.append(torch.autograd.grad(solution.value.square().sum(), module.weight)[0])
    assert set(inside) == {(True, torch.bfloat16), (False, torch.float32)}
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[1].norm()


@pytest.mark.parametrize(
    "checkpoint",
    [
        False,
        pytest.param(True),
    ],
)
def test_every_evaluation_of_f_sees_the_autocast_setting_of_the_forward_pass(checkpoint):
    module, dtypes = nn.Linear(3, 3), []
    x = torch.randn(2, 3)

    def f(z):
        product = module(z)
        dtypes.append(product.dtype)
        return 0.5 * torch.tanh(product + x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        adjoint = ImplicitAdjoint(solver=COARSE, checkpoint=checkpoint)
        value = fixed_point(f, torch.zeros(2, 3), adjoint=adjoint).value
    value.sum().backward()
    assert set(dtypes) == {torch.bfloat16}


def test_backward_inside_an_autocast_region_is_the_same():
    module = nn.Linear(3, 3)
    x = torch.randn(2, 3)

    def value():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            f = lambda z: 0.5 * torch.tanh(module(z) + x)  # noqa: E731
            return fixed_point(f, torch.zeros(2, 3), adjoint=ImplicitAdjoint(solver=COARSE)).value

    (outside,) = torch.autograd.grad(value().sum(), module.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = torch.autograd.grad(value().sum(), module.weight)
    assert (inside - outside).norm() < 0.05 * outside.norm()


@pytest.mark.parametrize("grad", [True, False])
def test_map_that_changes_its_argument_in_place_is_an_error(grad):
    """Else the iterate would follow the map, and its residual would be zero."""
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError), match=r"in.place"):
        fixed_point(lambda z: z.mul_(0.5).add_(1.0), torch.zeros(2, 3))
