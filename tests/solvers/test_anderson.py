"""`Anderson` against naive least squares."""

import pytest
import torch

from deepeq import (
    Anderson,
)
from tests.problems import PROBLEMS, points_of, solve


@pytest.mark.parametrize(("ridge", "damping", "history_size"), [(1e-10, 0.0, 8), (1e-10, 0.3, 3), (0.3, 0.0, 8)])
@pytest.mark.parametrize("problem_name", ["tanh", "affine", "rotation_diverging"])
def test_anderson_equals_naive_least_squares(problem_name, ridge, damping, history_size):
    """Against a QR solve of `min ||g - dG gamma||^2 + ridge sum (||dG_j|| gamma_j)^2`, one sample at a time."""
    problem = PROBLEMS[problem_name](torch.float64)
    solver = Anderson(rtol=1e-4, max_steps=9, ridge=ridge, damping=damping, history_size=history_size)
    points = points_of(problem.f, problem.z0, solver)
    values = [problem.f(z) for z in points]
    steps = solve(problem.f, problem.z0, solver=solver).num_steps.tolist()
    for i, steps_of_sample in enumerate(steps):
        assert steps_of_sample > 3
        for n in range(1, steps_of_sample):
            z = torch.stack([p[i] for p in points[max(0, n - 1 - history_size) : n]], dim=1)  # (N, k + 1)
            fz = torch.stack([p[i] for p in values[max(0, n - 1 - history_size) : n]], dim=1)
            g, expected = (fz - z)[:, -1], fz[:, -1] - damping * (fz - z)[:, -1]
            if n > 1:
                delta_f, delta_g = fz.diff(dim=1), (fz - z).diff(dim=1)
                penalty = ridge**0.5 * torch.diag(delta_g.norm(dim=0))
                lhs = torch.cat([delta_g, penalty])
                rhs = torch.cat([g, g.new_zeros(len(penalty))]).unsqueeze(1)
                gamma = torch.linalg.lstsq(lhs, rhs, driver="gelsy").solution.squeeze(1)
                expected = expected - delta_f @ gamma + damping * delta_g @ gamma
            torch.testing.assert_close(points[n][i], expected, rtol=1e-5, atol=1e-7)


def test_anderson_solves_the_scaled_normal_equations_in_float64():
    """A float32 problem whose differences span many orders of magnitude still converges to float32 accuracy."""
    slopes = torch.linspace(-0.9, 0.99, 12).repeat(2, 1)
    solution = solve(lambda z: slopes * z + 1.0, torch.zeros(2, 12), solver=Anderson(rtol=1e-5, max_steps=150))
    assert solution.converged.all()
