"""Penalty, spectral radius, smallest singular value and error bound against dense Jacobians."""

import pytest
import torch
from torch import Tensor

from deepeq import Broyden, error_bound, fixed_point, jacobian_penalty, smallest_singular_value, spectral_radius
from tests.problems import Recorder, solve

# What torch says the first time that it differentiates in forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

FORMS = ["hutchinson", "first_order"]
forms = pytest.mark.parametrize("form", FORMS)


def small_map(dtype=torch.float64) -> tuple:
    w = (0.7 * torch.randn(5, 5, dtype=torch.float64)).to(dtype).requires_grad_()
    b = torch.randn(3, 5, dtype=torch.float64).to(dtype)
    return (lambda z: torch.tanh(z @ w.T + b)), w, torch.randn(3, 5, dtype=torch.float64).to(dtype)


def exact_penalty(f, z: Tensor) -> Tensor:
    """`||J||_F^2 / N`, averaged over the batch."""
    jacobian = torch.autograd.functional.jacobian(f, z, create_graph=True)  # (B, N, B, N)
    blocks = torch.stack([jacobian[i, :, i] for i in range(len(z))])
    return blocks.square().sum(dim=(1, 2)).mean() / z.shape[1]


@forms
def test_penalty_matches_the_frobenius_norm(form, generator):
    f, _, z = small_map()
    estimate = jacobian_penalty(f, z, form=form, num_probes=3000, step=1e-4, generator=generator)
    assert estimate.shape == ()
    torch.testing.assert_close(estimate, exact_penalty(f, z), rtol=0.05, atol=0.0)


@forms
def test_penalty_gradient_matches_that_of_the_frobenius_norm(form, generator):
    f, w, z = small_map()
    estimate = jacobian_penalty(f, z, form=form, num_probes=3000, step=1e-4, generator=generator)
    (gradient,) = torch.autograd.grad(estimate, w)
    (expected,) = torch.autograd.grad(exact_penalty(f, z), w)
    assert (gradient - expected).norm() < 0.1 * expected.norm()


def test_both_forms_agree_where_they_must(generator):
    """For a symmetric linear map `J v = J^T v`, so that equal probes give equal values and equal gradients."""
    base = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 4, dtype=torch.float64)

    def f(z):
        return z @ (base + base.T)

    values, gradients = [], []
    for form in FORMS:
        value = jacobian_penalty(f, z, form=form, num_probes=3, generator=generator.manual_seed(1))
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, base)[0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-12)


def test_default_step_is_small_enough_for_a_curved_map(generator):
    f, _, z = small_map()
    estimate = jacobian_penalty(f, z, num_probes=3000, generator=generator)
    torch.testing.assert_close(estimate, exact_penalty(f, z), rtol=0.1, atol=0.0)


@forms
def test_penalty_is_an_average_over_batch_components_and_probes(form, generator):
    """`f(z) = c z` has `J = c I` and every probe gives `c^2 ||v||^2 / N`, in mean `c^2`."""
    for shape in [(2, 3), (400, 3), (2, 5, 7)]:
        c = torch.tensor(0.6, dtype=torch.float64)
        z = torch.randn(shape, dtype=torch.float64)
        value = jacobian_penalty(lambda z, c=c: c * z, z, form=form, num_probes=500, generator=generator)
        torch.testing.assert_close(value, c.square(), rtol=0.15, atol=0.0)


@forms
def test_penalty_of_a_structured_state(form, generator):
    z = {"a": torch.randn(3, 2, dtype=torch.float64), "b": torch.randn(3, 1, 2, dtype=torch.float64)}
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    value = jacobian_penalty(
        lambda s: {"a": w * s["b"].squeeze(1), "b": 0.0 * s["b"]},
        z,
        form=form,
        num_probes=3000,
        generator=generator,
    )
    torch.testing.assert_close(value.detach(), torch.tensor(0.125, dtype=torch.float64), rtol=0.1, atol=0.0)
    (gradient,) = torch.autograd.grad(value, w)
    torch.testing.assert_close(gradient, torch.tensor(0.5, dtype=torch.float64), rtol=0.1, atol=0.0)


@forms
def test_penalty_does_not_push_the_state(form):
    f, w, z = small_map()
    upstream = z.clone().requires_grad_()
    value = jacobian_penalty(f, 2.0 * upstream, form=form)
    gradients = torch.autograd.grad(value, [w, upstream], allow_unused=True)
    assert gradients[0].abs().sum() > 0
    assert gradients[1] is None


@forms
def test_penalty_follows_grad_mode(form):
    f, _, z = small_map()
    with torch.no_grad():
        value = jacobian_penalty(f, z, form=form)
    assert not value.requires_grad
    assert value > 0
    assert jacobian_penalty(f, z, form=form).requires_grad


@pytest.mark.parametrize(("form", "evaluations"), [("hutchinson", 1), ("first_order", 4)])
def test_penalty_cost_in_evaluations(form, evaluations):
    f, _, z = small_map()
    recorder = Recorder(f)
    jacobian_penalty(recorder, z, form=form, num_probes=3)
    assert recorder.count == evaluations


@forms
def test_penalty_generator_and_probes_change_the_estimate(form):
    f, _, z = small_map()

    def value(seed, **options):
        return jacobian_penalty(f, z, form=form, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(value(1), value(1))
    assert not torch.equal(value(1), value(2))
    assert not torch.equal(value(1), value(1, num_probes=2))
    if form == "first_order":
        assert not torch.equal(value(1), value(1, step=0.5))


@forms
def test_penalty_in_float32_and_bfloat16(form, generator):
    f, _, z = small_map(torch.float32)
    value = jacobian_penalty(f, z, form=form, num_probes=500, generator=generator)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact_penalty(f, z), rtol=0.2, atol=0.0)
    slope = torch.tensor(0.5, dtype=torch.bfloat16)
    half = jacobian_penalty(
        lambda z: slope * z,
        torch.randn(50, 8).bfloat16(),
        form=form,
        num_probes=50,
        step=0.1,
        generator=generator,
    )
    torch.testing.assert_close(half, torch.tensor(0.25), rtol=0.15, atol=0.0)


@pytest.mark.parametrize(
    "form",
    [
        "hutchinson",
        pytest.param("first_order"),
    ],
)
def test_penalty_at_the_zero_state(form, generator):
    f, _, z = small_map(torch.float32)
    zero = torch.zeros_like(z)
    value = jacobian_penalty(f, zero, form=form, num_probes=1000, generator=generator)
    torch.testing.assert_close(value, exact_penalty(f, zero), rtol=0.2, atol=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "exact"}, "form='exact'"),
        ({"num_probes": 0}, "num_probes=0"),
        ({"step": 0.0}, r"step=0\.0"),
        ({"step": 1.0}, r"step=1\.0"),
    ],
)
def test_bad_penalty_argument_is_named(options, message):
    f, _, z = small_map()
    with pytest.raises(ValueError, match=message):
        jacobian_penalty(f, z, **options)


# --- spectral radius -------------------------------------------------------------------------------------------------


def linear(matrix: Tensor):
    return lambda z: z @ matrix.T


@pytest.mark.parametrize("scale", [0.3, 0.9, 1.2])
@pytest.mark.parametrize("angle", [0.4, 1.5707963, 3.0])
def test_spectral_radius_of_a_rotation_is_its_scale(scale, angle):
    """A Rayleigh quotient would give `scale cos(angle)`."""
    c, s = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
    matrix = scale * torch.tensor([[c, -s], [s, c]])
    radius = spectral_radius(linear(matrix), torch.zeros(2, 2))
    torch.testing.assert_close(radius, torch.full((2,), scale), rtol=1e-4, atol=0.0)


def test_spectral_radius_of_a_non_normal_matrix_is_not_its_norm():
    matrix = torch.tensor([[0.5, 10.0, 0.0], [0.0, 0.4, 10.0], [0.0, 0.0, 0.3]], dtype=torch.float64)
    radius = spectral_radius(linear(matrix), torch.zeros(4, 3, dtype=torch.float64), num_steps=400)
    torch.testing.assert_close(radius, torch.full((4,), 0.5, dtype=torch.float64), rtol=0.01, atol=0.0)
    assert torch.linalg.matrix_norm(matrix, 2) > 10


def test_spectral_radius_of_a_random_matrix_with_complex_eigenvalues():
    g = torch.Generator().manual_seed(11)
    matrix = torch.randn(20, 20, generator=g, dtype=torch.float64) / 20**0.5
    expected = torch.linalg.eigvals(matrix).abs().max()
    radius = spectral_radius(linear(matrix), torch.zeros(8, 20, dtype=torch.float64), num_steps=300)
    torch.testing.assert_close(radius, expected.expand(8), rtol=0.03, atol=0.0)


def test_spectral_radius_of_each_sample_is_its_own():
    slopes = torch.tensor([[0.2, -0.9], [1.5, 0.1], [0.0, 0.0], [-3.0, 2.0]])
    radius = spectral_radius(lambda z: slopes * z, torch.zeros(4, 2), num_steps=100)
    torch.testing.assert_close(radius, torch.tensor([0.9, 1.5, 0.0, 3.0]), rtol=1e-3, atol=0.0)


def test_spectral_radius_is_that_of_the_jacobian_at_z():
    z = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    radius = spectral_radius(lambda z: torch.sin(2.0 * z), z)
    torch.testing.assert_close(radius, (2.0 * torch.cos(2.0 * z)).abs().squeeze(1), rtol=1e-9, atol=0.0)


def test_spectral_radius_evaluates_f_once_and_needs_no_grad_mode():
    matrix = torch.eye(3) * 0.5
    f = Recorder(linear(matrix.requires_grad_()))
    with torch.no_grad():
        radius = spectral_radius(f, torch.ones(2, 3))
    assert f.count == 1
    assert not radius.requires_grad
    assert not spectral_radius(f, torch.ones(2, 3, requires_grad=True)).requires_grad


def test_spectral_radius_of_a_structured_state():
    radius = spectral_radius(lambda s: (0.9 * s[1], -0.9 * s[0]), (torch.zeros(2, 3), torch.zeros(2, 3)), num_steps=40)
    torch.testing.assert_close(radius, torch.full((2,), 0.9), rtol=1e-4, atol=0.0)


def test_spectral_radius_options():
    g = torch.Generator()
    matrix = torch.tensor([[0.9, 0.5], [0.0, 0.8]])
    few, again, many = (
        spectral_radius(linear(matrix), torch.zeros(1, 2), num_steps=n, generator=g.manual_seed(3)) for n in (2, 2, 400)
    )
    assert torch.equal(few, again)
    assert not torch.equal(few, many)
    torch.testing.assert_close(many, torch.tensor([0.9]), rtol=1e-2, atol=0.0)
    with pytest.raises(ValueError, match="num_steps=1"):
        spectral_radius(linear(matrix), torch.zeros(1, 2), num_steps=1)


@pytest.mark.parametrize(
    "measure",
    [spectral_radius, lambda f, z: jacobian_penalty(f, z, form="hutchinson")],
    ids=["spectral_radius", "hutchinson"],
)
def test_constant_map_has_a_zero_jacobian(measure):
    assert (measure(lambda z: torch.ones(2, 3), torch.zeros(2, 3)) == 0).all()


@pytest.mark.parametrize("form", ["first_order", "hutchinson"])
def test_penalty_with_a_generator_a_sample_is_the_mean_over_the_batch_however_it_is_cut(form):
    weight = torch.randn(5, 5, dtype=torch.float64)
    z = torch.randn(4, 5, dtype=torch.float64)

    def penalty(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return jacobian_penalty(lambda z: torch.tanh(z @ weight), z[list(rows)], form=form, generator=generators)

    torch.testing.assert_close(penalty(range(4)), (penalty(range(2)) + penalty(range(2, 4))) / 2)
    with pytest.raises(ValueError, match="generator has 1 entries for 4 problems"):
        jacobian_penalty(torch.tanh, z, generator=[torch.Generator()])


# --- coupled and ragged states ---------------------------------------------------------------------------------------

SEGMENTS = torch.tensor([1, 0, 1, 3, 0, 1])  # problem 2 has no rows


def ragged_linear(seed: int = 21) -> tuple:
    """A linear map of rows `(6, 2)` that couples the rows of each problem, and its matrix for each problem."""
    g = torch.Generator().manual_seed(seed)
    full = torch.zeros(12, 12, dtype=torch.float64)
    blocks = {}
    for problem in (0, 1, 3):
        rows = torch.eq(SEGMENTS, problem).nonzero().squeeze(1)
        entries = torch.stack([2 * rows, 2 * rows + 1], dim=1).reshape(-1)
        blocks[problem] = (
            torch.randn(len(entries), len(entries), generator=g, dtype=torch.float64) / len(entries) ** 0.5
        )
        full[entries.unsqueeze(1), entries] = blocks[problem]
    return (lambda z: (full @ z.reshape(12)).reshape(6, 2)), full, blocks


def test_spectral_radius_of_a_coupled_state_is_that_of_the_whole_matrix():
    """The rows alone have no Jacobian of their own."""
    f, full, _ = ragged_linear()
    radius = spectral_radius(f, torch.zeros(6, 2, dtype=torch.float64), num_steps=2000, batch_dims=0)
    expected = torch.linalg.eigvals(full).abs().max()
    torch.testing.assert_close(radius, expected.reshape(1), rtol=0.02, atol=0.0)


def test_spectral_radius_of_segments_is_that_of_each_block():
    f, _, blocks = ragged_linear()
    radius = spectral_radius(f, torch.zeros(6, 2, dtype=torch.float64), num_steps=2000, segments=SEGMENTS)
    assert radius.shape == (4,)
    for problem, block in blocks.items():
        expected = torch.linalg.eigvals(block).abs().max()
        torch.testing.assert_close(radius[problem], expected, rtol=0.02, atol=0.0)


@forms
def test_penalty_of_a_coupled_state_is_that_of_the_whole_matrix(form, generator):
    f, full, _ = ragged_linear()
    z = torch.randn(6, 2, dtype=torch.float64)
    value = jacobian_penalty(f, z, form=form, num_probes=4000, generator=generator, batch_dims=0)
    torch.testing.assert_close(value, full.square().sum() / 12, rtol=0.05, atol=0.0)
    ragged = jacobian_penalty(f, z, form=form, num_probes=4000, generator=generator, segments=SEGMENTS)
    torch.testing.assert_close(ragged, full.square().sum() / 12, rtol=0.05, atol=0.0)


# --- smallest singular value -----------------------------------------------------------------------------------------


def matrix_of_condition(size: int, condition: float, seed: int) -> Tensor:
    """`J` such that the singular values of `I - J` reach from one down to one over the condition."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0] for _ in range(2))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    return torch.eye(size, dtype=torch.float64) - left @ torch.diag(values) @ right.T


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e5])
@pytest.mark.parametrize("size", [1, 5, 20])
def test_smallest_singular_value_is_that_of_the_dense_matrix(size, condition):
    matrix = matrix_of_condition(size, condition if size > 1 else 1.0, seed=size)
    expected = torch.linalg.svdvals(torch.eye(size, dtype=torch.float64) - matrix)[-1]
    value = smallest_singular_value(linear(matrix), torch.zeros(3, size, dtype=torch.float64), num_steps=size)
    torch.testing.assert_close(value, expected.expand(3), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("num_steps", [1, 5, 10])
def test_smallest_singular_value_is_never_taken_too_small(num_steps):
    """Few steps see part of the space; `||z - z*|| <= ||g|| / sigma` then only claims less accuracy falsely."""
    matrix = matrix_of_condition(30, 1e2, seed=3)
    value = smallest_singular_value(linear(matrix), torch.zeros(4, 30, dtype=torch.float64), num_steps=num_steps)
    assert (value >= 1e-2 * (1 - 1e-9)).all()


def test_smallest_singular_value_is_that_of_the_jacobian_at_z():
    f, _, z = small_map()
    jacobian = torch.autograd.functional.jacobian(f, z)
    expected = [torch.linalg.svdvals(torch.eye(5, dtype=z.dtype) - jacobian[i, :, i])[-1] for i in range(3)]
    torch.testing.assert_close(smallest_singular_value(f, z), torch.stack(expected).detach(), rtol=1e-6, atol=0.0)


def test_smallest_singular_value_of_coupled_and_ragged_states():
    f, full, blocks = ragged_linear()
    z = torch.zeros(6, 2, dtype=torch.float64)

    def dense(matrix: Tensor) -> Tensor:
        return torch.linalg.svdvals(torch.eye(len(matrix), dtype=matrix.dtype) - matrix)[-1]

    torch.testing.assert_close(smallest_singular_value(f, z, batch_dims=0), dense(full).reshape(1), rtol=1e-6, atol=0.0)
    ragged = smallest_singular_value(f, z, segments=SEGMENTS)
    for problem, block in blocks.items():
        torch.testing.assert_close(ragged[problem], dense(block), rtol=1e-6, atol=0.0)


def test_smallest_singular_value_of_a_constant_map_is_one():
    value = smallest_singular_value(lambda z: torch.ones(2, 3), torch.zeros(2, 3))
    torch.testing.assert_close(value, torch.ones(2))


def test_number_of_steps_below_one_is_named():
    with pytest.raises(ValueError, match="num_steps=0"):
        smallest_singular_value(torch.cos, torch.zeros(1, 2), num_steps=0)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5])
def test_error_bound_is_residual_over_the_dense_singular_value_and_holds(condition):
    matrix = matrix_of_condition(12, condition, seed=9)
    b = torch.randn(4, 12, dtype=torch.float64)
    f = lambda z: z @ matrix.T + b  # noqa: E731
    z_star = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - matrix, b.T).T
    solution = solve(f, torch.zeros_like(b), solver=Broyden(rtol=1e-4, max_steps=10))
    z = solution.value.detach()
    bound = error_bound(f, z)
    residual = (f(z) - z).norm(dim=1)
    torch.testing.assert_close(bound, residual * condition, rtol=1e-4, atol=0.0)
    assert ((z - z_star).norm(dim=1) <= bound * (1 + 1e-6)).all()
    known = torch.full((4,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(error_bound(f, z, smallest=known), residual / 2.0)


def test_error_bound_of_coupled_and_ragged_states_holds():
    f_linear, full, _ = ragged_linear()
    b = torch.randn(6, 2, dtype=torch.float64)
    f = lambda z: 0.5 * f_linear(z) + b  # noqa: E731
    z_star = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - 0.5 * full, b.reshape(12)).reshape(6, 2)
    z = fixed_point(f, torch.zeros_like(b), batch_dims=0, solver=Broyden(rtol=1e-2)).value.detach()
    assert error_bound(f, z, batch_dims=0).shape == (1,)
    assert ((z - z_star).norm() <= error_bound(f, z, batch_dims=0)).all()
    ragged = error_bound(f, z, segments=SEGMENTS)
    for problem in (0, 1, 3):
        own = torch.eq(SEGMENTS, problem)
        assert (z - z_star)[own].norm() <= ragged[problem] * (1 + 1e-9)
