"""`Anderson` against a naive version that keeps two vectors per step."""

import pytest
import torch

from deepeq import DEQ, Anderson, fixed_point
from deepeq.models import TransformerConfig
from tests.problems import PROBLEMS, points_of, solve


@pytest.mark.parametrize("projection", ["mixed", "type_i", "type_ii"])
@pytest.mark.parametrize(("ridge", "damping", "history_size"), [(0.0, 0.0, 8), (0.0, 0.3, 3), (0.3, 0.0, 8)])
@pytest.mark.parametrize("problem_name", ["one_hard_sample", "rotation_diverging"])
def test_anderson_equals_naive_projection(problem_name, ridge, damping, history_size, projection):
    """Against a dense solve of `W^T (g - dG gamma) = ridge ||dG_j||^2 gamma_j`, one sample at a time."""
    problem = PROBLEMS[problem_name](torch.float64)
    solver = Anderson(
        rtol=1e-4, max_steps=9, ridge=ridge, damping=damping, history_size=history_size, projection=projection
    )
    points = points_of(problem.f, problem.z0, solver)
    values = [problem.f(z) for z in points]
    steps, compared = solve(problem.f, problem.z0, solver=solver).num_steps.tolist(), 0
    for i, steps_of_sample in enumerate(steps):
        for n in range(1, steps_of_sample):
            first = n - 1 - (n - 1) % (history_size + 1)  # where the method started last
            z = torch.stack([p[i] for p in points[first:n]], dim=1)  # (N, k + 1)
            fz = torch.stack([p[i] for p in values[first:n]], dim=1)
            g, expected = (fz - z)[:, -1], fz[:, -1] - damping * (fz - z)[:, -1]
            if n - 1 > first:
                delta_f, delta_g = fz.diff(dim=1), (fz - z).diff(dim=1)
                delta_z = delta_f - delta_g
                sign = torch.where((delta_z * delta_g).sum(dim=0) > 0, -1.0, 1.0)
                w = {"mixed": delta_g - sign * delta_z, "type_i": -delta_z, "type_ii": delta_g}[projection]
                penalty = ridge * torch.diag(delta_g.square().sum(dim=0))
                gamma = torch.linalg.solve(w.T @ delta_g + penalty, w.T @ g)
                expected = expected - delta_f @ gamma + damping * delta_g @ gamma
            torch.testing.assert_close(points[n][i], expected, rtol=1e-5, atol=1e-6)
            compared += 1
    assert compared >= 8


def test_anderson_solves_the_scaled_normal_equations_in_float64():
    """A float32 problem whose differences span many orders of magnitude still converges to float32 accuracy."""
    slopes = torch.linspace(-0.9, 0.99, 12).repeat(2, 1)
    solution = solve(lambda z: slopes * z + 1.0, torch.zeros(2, 12), solver=Anderson(rtol=1e-5, max_steps=150))
    assert solution.converged.all()


def test_a_dependent_difference_replaces_the_older_ones():
    """With one number per problem every second difference depends on the first, and the rule is the secant method."""
    solver = Anderson(rtol=1e-12, max_steps=9)
    points = points_of(torch.cos, torch.ones(1, 1, dtype=torch.float64), solver)
    z = [point.item() for point in points]
    g = [torch.cos(point).item() - point.item() for point in points]
    assert len(z) >= 6
    for n in range(2, len(z)):
        secant = z[n - 1] - g[n - 1] * (z[n - 1] - z[n - 2]) / (g[n - 1] - g[n - 2])
        assert z[n] == pytest.approx(secant, rel=1e-9)


def test_as_many_evaluations_as_gmres_on_an_affine_map():
    """A normal map of 60 eigenvalues around the unit circle: no step is lost while the history lasts."""
    angles = torch.linspace(0, 2 * torch.pi, 31, dtype=torch.float64)[:-1]
    c, s = 1.1 * angles.cos(), 1.1 * angles.sin()
    blocks = torch.stack([torch.stack([c, -s], dim=1), torch.stack([s, c], dim=1)], dim=1)
    matrix = torch.block_diag(*blocks)
    b = torch.randn(1, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = solve(
        lambda z: z @ matrix.T + b, torch.zeros_like(b), solver=Anderson(rtol=1e-6, max_steps=70, projection="type_ii")
    )
    basis = [torch.linalg.matrix_power(matrix, k) @ b[0] for k in range(60)]
    bare = [torch.linalg.lstsq(torch.stack([v - matrix @ v for v in basis[:k]], dim=1), b[0]) for k in range(1, 60)]
    needed = next(
        k
        for k, fit in enumerate(bare, start=1)
        if (torch.stack([v - matrix @ v for v in basis[:k]], dim=1) @ fit.solution - b[0]).norm() <= 1e-6 * b.norm()
    )
    assert solution.converged.all()
    assert solution.num_steps.item() <= needed + 2


def test_a_state_of_a_bounded_map_stays_of_its_size():
    """Untrained attention has no equilibrium within reach; solvers that extrapolate freely reach 1e17 there."""
    torch.manual_seed(1)
    cell = TransformerConfig(d_model=16, num_heads=2, d_inner=32, memory_len=8).build().eval()
    f, z0 = DEQ(cell).prepare(0.3 * torch.randn(16, 16, 16))
    largest = []
    with torch.no_grad():
        fixed_point(
            f,
            z0,
            solver=Anderson(rtol=1e-3, max_steps=40),
            on_failure="ignore",
            callback=lambda step, z, residual: largest.append(z.flatten(1).norm(dim=1).max().item()),
        )
    assert len(largest) == 40
    assert max(largest) < 1e4


@pytest.mark.parametrize("slope", [-5.0, 0.999, 2.0, 3.0])
def test_any_slope_but_one_is_found(slope):
    """At a slope of two, `dg = dz`: a fixed sign in `dg - dz` would leave nothing."""
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    solution = solve(lambda z: slope * z + 1.0, z0, solver=Anderson(rtol=1e-8))
    torch.testing.assert_close(solution.value, torch.full_like(z0, 1.0 / (1.0 - slope)))


@pytest.mark.parametrize("projection", ["mixed", "type_ii"])
@pytest.mark.parametrize("width", [10, 30_000, 1_000_000, 2_000_000])
def test_sums_over_large_states_keep_their_digits(width, projection):
    """All numbers of a state are equal here, so that every difference depends on the first one, as far as sums tell."""
    z0, solver = torch.zeros(2, width), Anderson(rtol=1e-4, projection=projection)
    with torch.no_grad():
        solution = solve(lambda z: 0.9 * torch.tanh(z) + 1.0, z0, solver=solver)
    assert solution.converged.all()
    assert solution.num_steps.max() <= 12
