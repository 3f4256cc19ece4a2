"""`FixedPointIteration` against its formula."""

import pytest
import torch

from deepeq import (
    FixedPointIteration,
)
from tests.problems import PROBLEMS, points_of


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("problem_name", ["tanh", "rotation_diverging", "stiff"])
def test_fixed_point_iteration_equals_its_formula(problem_name, damping):
    problem = PROBLEMS[problem_name](torch.float64)
    z = problem.z0
    for point in points_of(problem.f, z, FixedPointIteration(rtol=1e-14, max_steps=10, damping=damping)):
        torch.testing.assert_close(point, z, rtol=1e-12, atol=1e-14)
        z = damping * z + (1 - damping) * problem.f(z)
