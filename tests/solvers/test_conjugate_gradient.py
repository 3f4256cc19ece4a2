"""ConjugateGradient against its definition, and what it does where its assumption fails."""

import pytest
import torch
from torch import Tensor

from deepeq import GMRES, BackpropAdjoint, ConjugateGradient, ImplicitAdjoint, Result
from tests.problems import Recorder, solve

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64))
    return q @ torch.diag(eigenvalues.double()) @ q.T


def affine(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float64):
    """`f(u) = u - A u + b`, whose fixed point solves `A u = b`."""
    m, b = (torch.eye(len(a), dtype=a.dtype) - a).to(dtype), b.to(dtype)
    return lambda u: u @ m.T + b


def points_of(f, z0: Tensor, solver) -> list[Tensor]:
    recorder = Recorder(f)
    with torch.no_grad():
        solve(recorder, z0, solver=solver, verify=False)
    return recorder.points


def dense_conjugate_gradient(a: Tensor, b: Tensor, u: Tensor, steps: int) -> Tensor:
    """The method as it is printed, with the matrix written out; one sample."""
    r = b - a @ u
    p = r
    for _ in range(steps):
        product = a @ p
        length = (r @ r) / (p @ product)
        u, r_next = u + length * p, r - length * product
        p = r_next + (r_next @ r_next) / (r @ r) * p
        r = r_next
    return u


@pytest.mark.parametrize("steps", [3, 4, 6, 9])
def test_conjugate_gradient_equals_the_dense_method(steps, generator):
    """The last point is the iterate: after the first point, and one product each."""
    a = symmetric(torch.logspace(0, -2, 12))
    b, z0 = (torch.randn(3, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    last = points_of(affine(a, b), z0, ConjugateGradient(rtol=1e-14, max_steps=steps))[-1]
    for i in range(3):
        expected = dense_conjugate_gradient(a, b[i], z0[i], steps - 2)
        torch.testing.assert_close(last[i], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-8])
def test_conjugate_gradient_evaluates_the_first_iterate_that_is_good_enough(rtol, generator):
    a = symmetric(torch.linspace(0.2, 1.6, 10))
    b, z0 = (torch.randn(3, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    f = affine(a, b)
    solution = solve(f, z0, solver=ConjugateGradient(rtol=rtol))
    for i in range(3):
        iterates = [dense_conjugate_gradient(a, b[i], z0[i], k) for k in range(11)]
        enough = next(k for k, u in enumerate(iterates) if (b[i] - a @ u).norm() <= rtol * (u + b[i] - a @ u).norm())
        assert solution.num_steps[i] == (enough + 2 if enough else 1)  # the first point, the products, the iterate
        torch.testing.assert_close(solution.value[i], iterates[enough], rtol=1e-6, atol=1e-9)


@dtypes
def test_conjugate_gradient_needs_no_more_products_than_distinct_eigenvalues(dtype, generator):
    a = symmetric(torch.tensor([0.25, 0.25, 0.25, 1.0, 1.0, 2.0]))
    b = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    solution = solve(affine(a, b, dtype), torch.zeros(4, 6, dtype=dtype), solver=ConjugateGradient(rtol=rtol))
    assert solution.converged.all()
    assert (solution.num_steps <= 3 + 2).all()


@dtypes
@pytest.mark.parametrize("condition", [10.0, 1e3])
def test_conjugate_gradient_reaches_the_tolerance_with_about_the_evaluations_of_gmres(dtype, condition, generator):
    a = symmetric(torch.logspace(0, -torch.tensor(condition).log10().item(), 40))
    b = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    f, z0 = affine(a, b, dtype), torch.zeros(5, 40, dtype=dtype)
    rtol = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    ours, gmres = (solve(f, z0, solver=cls(rtol=rtol, max_steps=400)) for cls in (ConjugateGradient, GMRES))
    assert ours.converged.all()
    assert ours.num_steps.max() <= 2 * gmres.num_steps.max() + 10


def test_conjugate_gradient_starts_again_where_the_recursive_residual_was_too_good(generator):
    """A tolerance at the edge of float32: what it reports is measured, and it goes on from there."""
    a = symmetric(torch.logspace(0, -4, 30))
    b = torch.randn(3, 30, generator=generator, dtype=torch.float64)
    f = affine(a, b, torch.float32)
    z0 = torch.zeros(3, 30)
    solution = solve(f, z0, solver=ConjugateGradient(rtol=1e-7, max_steps=300))
    fz = f(solution.value)
    measured = (fz - solution.value).norm(dim=1) / fz.norm(dim=1)
    torch.testing.assert_close(solution.relative_residual, measured, rtol=1e-3, atol=1e-7)
    assert (measured < 1e-5).all()


def test_conjugate_gradient_problems_do_not_mix(generator):
    """Bitwise, where the map does not mix them either, whatever the batch mates do."""
    slopes = torch.tensor(
        [[0.1] * 8, [-1.6, -1.2, -0.7, 0.0, 0.3, 0.6, 0.9, 0.97], [0.3] * 4 + [3.0] * 4, [1.0] * 8]
    )  # easy, hard, indefinite, singular
    solver = ConjugateGradient(rtol=1e-5, max_steps=40)
    together = solve(lambda z: slopes * z + 1.0, torch.zeros(4, 8), solver=solver)
    assert together.converged.tolist()[:2] == [True, True]
    for i in range(4):
        row = slopes[i : i + 1]
        alone = solve(lambda z, row=row: row * z + 1.0, torch.zeros(1, 8), solver=solver)
        for name in ("value", "relative_residual", "num_steps", "converged"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[i : i + 1]), name


@dtypes
@pytest.mark.parametrize(
    "a",
    [
        symmetric(torch.tensor([1.0, 0.5, -0.5, -1.0])),
        -torch.eye(4, dtype=torch.float64),
        torch.zeros(4, 4, dtype=torch.float64),
        torch.tensor([[0.0, 1.0, 0, 0], [-1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 2.0]], dtype=torch.float64),
        torch.eye(4, dtype=torch.float64) + 100.0 * torch.triu(torch.ones(4, 4, dtype=torch.float64), 1),
    ],
    ids=["indefinite", "negative", "zero", "skew", "far_from_symmetric"],
)
def test_conjugate_gradient_does_not_diverge_where_its_assumption_fails(a, dtype, generator):
    b = torch.randn(2, 4, generator=generator, dtype=torch.float64).to(dtype)
    f = Recorder(affine(a, b, dtype))
    solver = ConjugateGradient(max_steps=100)
    solution = solve(f, torch.zeros_like(b), solver=solver)
    assert all(point.isfinite().all() for point in f.points)
    residuals = torch.stack([(f.f(point) - point).norm(dim=1) for point in f.points])
    assert (residuals <= 1e4 / torch.finfo(dtype).eps ** 0.5 * b.norm(dim=1)).all()
    assert solution.result in (Result.CONVERGED, Result.MAX_STEPS)
    assert "GMRES" in solver.advice(100)


def test_conjugate_gradient_takes_the_step_of_least_residual_where_the_curvature_is_not_positive(generator):
    a = symmetric(torch.tensor([-1.0, -0.5, -0.25]))
    b = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    last = points_of(affine(a, b), torch.zeros(1, 3, dtype=torch.float64), ConjugateGradient(max_steps=3))[-1]
    product = a @ b[0]
    torch.testing.assert_close(last[0], (b[0] @ product) / (product @ product) * b[0])


def test_conjugate_gradient_keeps_three_vectors(generator):
    a, b = symmetric(torch.logspace(0, -2, 12)), torch.randn(2, 12, generator=generator, dtype=torch.float64)
    f, solver = affine(a, b), ConjugateGradient(rtol=1e-12)
    z = torch.zeros_like(b)
    state = solver.init(z)
    for _ in range(10):
        fz = f(z)
        z, state = solver.step(z, fz, fz - z, state)
        assert len({leaf.data_ptr() for leaf in state if isinstance(leaf, Tensor) and leaf.shape == z.shape}) <= 3
    assert solver.num_stored == 3


@pytest.mark.parametrize("adjoint", [BackpropAdjoint(), ImplicitAdjoint(solver=ConjugateGradient(rtol=1e-12))])
def test_conjugate_gradient_gives_the_gradient_of_a_symmetric_problem(adjoint, generator):
    """Also beside a sample that starts at its solution."""
    a = symmetric(torch.logspace(0, -1, 6))
    b = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    b[1] = 0.0
    b.requires_grad_()
    m = torch.eye(6, dtype=torch.float64) - a
    solution = solve(
        lambda z: z @ m + b,
        torch.zeros(3, 6, dtype=torch.float64),
        solver=ConjugateGradient(rtol=1e-12),
        adjoint=adjoint,
    )
    (gradient,) = torch.autograd.grad(solution.value.sum(), b)
    expected = torch.linalg.solve(a, torch.ones(6, dtype=torch.float64)).expand(3, 6).clone()
    assert gradient.isfinite().all()
    rows = [0, 2] if isinstance(adjoint, BackpropAdjoint) else [0, 1, 2]
    torch.testing.assert_close(gradient[rows], expected[rows], rtol=1e-8, atol=1e-9)
