"""`Broyden` against the method with dense matrices, and its window."""

import pytest
import torch
from torch import Tensor

from deepeq import (
    Broyden,
)
from tests.problems import PROBLEMS, Recorder, points_of, sample_of, solve


def dense_broyden(f, z: Tensor, steps: int, damping: float = 0.0, history_size: int = 10**9) -> list[Tensor]:
    """The paper's eq. 6 and 10 with the inverse written out: `(N, N)` for one sample."""

    def g(z):
        return f(z) - z

    b, points = -torch.eye(z.numel(), dtype=z.dtype), [z]
    for n in range(steps - 1):
        delta_z = -(1 - damping) * b @ g(z)
        z_next = z + delta_z
        delta_g = g(z_next) - g(z)
        if (n + 1) % history_size == 0:
            b = -torch.eye(z.numel(), dtype=z.dtype)
        else:
            b = b + torch.outer(delta_z - b @ delta_g, delta_z @ b) / (delta_z @ b @ delta_g)
        z = z_next
        points.append(z)
    return points


@pytest.mark.parametrize("history_size", [100, 4, 1])
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("problem_name", ["tanh_batch_of_one", "tanh", "affine", "rotation_diverging"])
def test_broyden_equals_the_dense_matrix_method(problem_name, damping, history_size):
    problem = PROBLEMS[problem_name](torch.float64)
    solver = Broyden(rtol=1e-5, max_steps=12, damping=damping, history_size=history_size)
    points = points_of(problem.f, problem.z0, solver)
    with torch.no_grad():
        steps = solve(problem.f, problem.z0, solver=solver).num_steps.tolist()
    for i, steps_of_sample in enumerate(steps):
        expected = dense_broyden(sample_of(problem, i), problem.z0[i], steps_of_sample, damping, history_size)
        for point, reference in zip(points, expected, strict=False):
            torch.testing.assert_close(point[i], reference, rtol=1e-6, atol=1e-9)


def dense_broyden_with_line_search(f, z: Tensor, evaluations: int, most_halvings: int) -> list[Tensor]:
    """The dense method, where a step that raises the residual is halved before the inverse learns from it."""

    def g(z):
        return f(z) - z

    b, points = -torch.eye(z.numel(), dtype=z.dtype), [z]
    while len(points) < evaluations:
        delta_z = -b @ g(z)
        points.append(z + delta_z)
        halvings = 0
        while g(z + delta_z).norm() > g(z).norm() and halvings < most_halvings:
            delta_z, halvings = 0.5 * delta_z, halvings + 1
            points.append(z + delta_z)
        delta_g = g(z + delta_z) - g(z)
        b = b + torch.outer(delta_z - b @ delta_g, delta_z @ b) / (delta_z @ b @ delta_g)
        z = z + delta_z
    return points[:evaluations]


@pytest.mark.parametrize("most_halvings", [1, 3])
@pytest.mark.parametrize("problem_name", ["stiff", "one_hard_sample"])
def test_broyden_line_search_equals_the_dense_matrix_method(problem_name, most_halvings):
    problem = PROBLEMS[problem_name](torch.float64)
    solver = Broyden(rtol=1e-4, max_steps=15, line_search_steps=most_halvings)
    points = points_of(problem.f, problem.z0, solver)
    steps = solve(problem.f, problem.z0, solver=solver).num_steps.tolist()
    differs = False
    for i, steps_of_sample in enumerate(steps):
        f = sample_of(problem, i)
        expected = dense_broyden_with_line_search(f, problem.z0[i], steps_of_sample, most_halvings)
        for point, reference in zip(points, expected, strict=False):
            torch.testing.assert_close(point[i], reference, rtol=1e-6, atol=1e-8)
        plain = dense_broyden(f, problem.z0[i], steps_of_sample)
        differs |= not torch.allclose(plain[-1], expected[-1])
    assert differs  # some step was halved


def test_broyden_line_search_lowers_the_residual_where_full_steps_raise_it():
    problem = PROBLEMS["stiff"](torch.float64)
    plain = solve(problem.f, problem.z0, solver=Broyden(max_steps=6))
    searched = solve(problem.f, problem.z0, solver=Broyden(max_steps=6, line_search_steps=5))
    assert (searched.absolute_residual < plain.absolute_residual).all()


@pytest.mark.parametrize("history_size", [5, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gain", [0.8, 1.2, 1.6])
def test_broyden_window_converges_where_the_full_history_does(gain, dtype, history_size, generator):
    w = gain * torch.randn(40, 40, generator=generator, dtype=torch.float64).to(dtype) / 40**0.5
    b = torch.randn(4, 40, generator=generator, dtype=torch.float64).to(dtype)
    solutions = {}
    for size in (history_size, 400):
        f = Recorder(lambda z: torch.tanh(z @ w.T + b))
        solutions[size] = solve(f, torch.zeros_like(b), solver=Broyden(rtol=1e-3, max_steps=400, history_size=size))
        assert all(point.isfinite().all() for point in f.points)
    assert solutions[400].converged.all()
    assert solutions[history_size].converged.all()
