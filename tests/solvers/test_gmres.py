"""`GMRES` against dense least squares over the Krylov space, its cost, and singular systems."""

import pytest
import torch
from torch import Tensor

from deepeq import (
    GMRES,
    Result,
)
from tests.problems import PROBLEMS, Recorder, points_of, sample_of, solve


def krylov_minimizer(f, z0: Tensor, dimension: int) -> Tensor:
    """The point of least residual in `z0 + span(r0, A r0, ...)`, with `A = I - M` written out; one sample."""
    b = f(torch.zeros_like(z0))
    a = torch.stack([e - (f(e) - b) for e in torch.eye(len(b), dtype=torch.float64)], dim=1)
    r0 = b - a @ z0
    krylov = torch.stack([torch.linalg.matrix_power(a, k) @ r0 for k in range(dimension)], dim=1)
    krylov, _ = torch.linalg.qr(krylov)
    return z0 + krylov @ torch.linalg.lstsq(a @ krylov, r0.unsqueeze(1)).solution.squeeze(1)


@pytest.mark.parametrize("steps", [3, 4, 5, 6])
@pytest.mark.parametrize("problem_name", ["affine", "rotation_slow", "diverging", "stiff"])
def test_gmres_equals_dense_least_squares_over_the_krylov_space(problem_name, steps):
    problem = PROBLEMS[problem_name](torch.float64)
    z0 = torch.randn_like(problem.z0)
    last = points_of(problem.f, z0, GMRES(rtol=1e-14, max_steps=steps))[-1]
    for i in range(len(z0)):
        expected = krylov_minimizer(sample_of(problem, i), z0[i], steps - 2)
        torch.testing.assert_close(last[i], expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("rtol", [0.2, 0.05, 1e-2, 1e-3])
def test_gmres_stops_at_the_first_space_that_is_large_enough(rtol):
    """It predicts `||f(u)||` too, for the relative tolerance, wherever it started."""
    problem = PROBLEMS["affine"](torch.float64)
    z0 = 3.0 * torch.randn_like(problem.z0)
    solution = solve(problem.f, z0, solver=GMRES(rtol=rtol))
    for i in range(len(z0)):
        f = sample_of(problem, i)
        minimizers = [krylov_minimizer(f, z0[i], k) for k in range(1, 7)]
        enough = next(k for k, u in enumerate(minimizers, 1) if (f(u) - u).norm() <= rtol * f(u).norm())
        assert solution.num_steps[i] == enough + 2  # the first point, the products, the minimizer
        torch.testing.assert_close(solution.value[i], minimizers[enough - 1], rtol=1e-6, atol=1e-9)


def test_gmres_basis_is_orthonormal_to_rounding(generator):
    """One pass of Gram-Schmidt would lose this on a matrix of condition 1e6."""
    q, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))
    matrix = torch.eye(24, dtype=torch.float64) - q @ torch.diag(torch.logspace(0, -6, 24, dtype=torch.float64)) @ q.T
    b = torch.randn(1, 24, generator=generator, dtype=torch.float64)
    solver, z = GMRES(rtol=1e-15, max_steps=50), torch.zeros(1, 24, dtype=torch.float64)
    state = solver.init(z)
    for _ in range(12):
        fz = z @ matrix.T + b
        z, state = solver.step(z, fz, fz - z, state)
    basis = torch.cat(state.basis.blocks, dim=1)[0, : state.basis.size]
    torch.testing.assert_close(basis @ basis.T, torch.eye(12, dtype=torch.float64), rtol=0.0, atol=1e-13)


def test_gmres_needs_no_more_products_than_the_dimension():
    problem = PROBLEMS["diverging"](torch.float64)  # 4 unknowns: first point, 4 products, the minimizer
    solution = solve(problem.f, problem.z0, solver=GMRES(rtol=1e-10))
    assert (solution.num_steps <= 6).all()
    assert solution.converged.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gmres_evaluates_the_minimizer_as_soon_as_the_space_is_complete(dtype):
    """Two eigenvalues: first point, two products, minimizer. A tolerance out of reach must not hide it."""
    slopes = torch.tensor([[0.5, 0.5, 0.5, -2.0, -2.0]], dtype=dtype)
    out_of_reach = GMRES(rtol=0.0, atol=1e-30, max_steps=25)
    solution = solve(lambda z: slopes * z + slopes.cos(), torch.zeros(1, 5, dtype=dtype), solver=out_of_reach)
    assert (solution.residual_history[:3] > 1e-2).all()
    assert (solution.residual_history[3] < 100 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gmres_on_a_singular_system_stays_finite_and_says_so(dtype):
    f = Recorder(lambda z: z + torch.tensor([1.0, 0.0], dtype=dtype))  # no fixed point at all
    solution = solve(f, torch.zeros(2, 2, dtype=dtype), solver=GMRES(max_steps=30))
    assert solution.result is Result.MAX_STEPS
    assert not solution.converged.any()
    assert all(point.isfinite().all() for point in f.points)
