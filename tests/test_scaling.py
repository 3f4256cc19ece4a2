"""The scale and sign that make `z + a g(z)` a sensible map, and the units of states."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepeq.scaling import automatic_scale, power_of_two
from tests.problems import Recorder

Map = Callable[[Tensor], Tensor]

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
UNITS = {torch.float32: (1e-20, 1e-10, 1e10, 1e20), torch.float64: (1e-30, 1e-15, 1e15, 1e30)}
MOST_EVALUATIONS = 6


def scale_of(g: Map, z0: Tensor) -> tuple[Tensor, Recorder]:
    """The scale, and where `g` was evaluated for it; what holds for every scale is checked here."""
    probes = Recorder(g)
    scale = automatic_scale(probes, z0, g(z0))
    assert scale.shape == (len(z0), 1)
    assert scale.dtype == z0.dtype
    assert (scale.isfinite() & (scale != 0)).all()
    assert 1 <= probes.count <= MOST_EVALUATIONS
    return scale, probes


def exactness(dtype: torch.dtype) -> float:
    """What rounding leaves of a difference of values, over a step of `eps^(1/3)`."""
    return 100 * torch.finfo(dtype).eps ** (2 / 3)


def curve(z: Tensor) -> Tensor:
    return torch.stack([z[:, 0].sin() + z[:, 1], z[:, 1].exp() - 3 * z[:, 0], z[:, 2] ** 3 + z[:, 0]], dim=1)


def points(dtype: torch.dtype) -> Tensor:
    return torch.tensor([[0.3, -0.8, 0.5], [1.5, 0.2, -2.0]], dtype=dtype)


@dtypes
def test_scale_of_a_multiple_of_the_identity_is_that_of_newton(dtype):
    slopes = torch.tensor([[2.0], [-0.5], [-3e3], [1e-4]], dtype=dtype)
    z0 = torch.tensor([[1.0, -2.0, 0.5], [0.1, 0.0, 3.0], [-40.0, 7.0, 1.0], [0.0, 0.0, 0.0]], dtype=dtype)
    root = torch.tensor([0.5, 3.0, -2.0], dtype=dtype)
    scale, probes = scale_of(lambda z: slopes * (z - root), z0)
    torch.testing.assert_close(scale, -1 / slopes, rtol=exactness(dtype), atol=0.0)
    torch.testing.assert_close(
        z0 + scale * slopes * (z0 - root), root.expand(4, 3), rtol=0.0, atol=100 * exactness(dtype)
    )
    assert probes.count == 1


@dtypes
@pytest.mark.parametrize("sign", [1, -1])
def test_scale_has_the_units_of_the_inverse_of_g(dtype, sign):
    z0 = points(dtype)
    expected, _ = scale_of(curve, z0)
    assert (expected[0] != expected[1]).all()
    for unit in UNITS[dtype]:
        scale, probes = scale_of(lambda z, c=sign * unit: c * curve(z), z0)
        # The step goes along g, hence for the other sign to the other side: the truncation differs.
        rtol = exactness(dtype) if sign > 0 else 0.05
        torch.testing.assert_close(scale * (sign * unit), expected, rtol=rtol, atol=0.0)
        assert probes.count == 1


@dtypes
def test_scale_has_the_units_of_z(dtype):
    z0 = points(dtype)
    expected, _ = scale_of(curve, z0)
    for unit in UNITS[dtype]:
        scale, _ = scale_of(lambda z, c=unit: curve(z / c), z0 * unit)
        torch.testing.assert_close(scale / unit, expected, rtol=10 * exactness(dtype), atol=0.0)


@dtypes
def test_scale_is_the_length_of_a_step_over_the_change_of_g_with_the_sign_of_descent(dtype):
    """From the dense Jacobian: `|a| = 1 / ||J d||` with `d` along `g`, against the sign of `<d, J d>`."""
    z0 = points(torch.float64)
    scale, _ = scale_of(curve, z0.to(dtype))
    for i in range(len(z0)):
        jacobian = torch.autograd.functional.jacobian(lambda z: curve(z.unsqueeze(0)).squeeze(0), z0[i])
        direction = curve(z0)[i] / curve(z0)[i].norm()
        change = jacobian @ direction
        expected = -torch.sign(direction @ change) / change.norm()
        torch.testing.assert_close(scale[i, 0].double(), expected, rtol=0.05, atol=0.0)  # truncation at eps^(1/3)


@dtypes
def test_step_is_relative_to_z0_and_to_one_at_zero(dtype):
    for size in (0.0, 1e-3, 1.0, 1e6):
        z0 = torch.full((1, 4), size / 2, dtype=dtype)
        _, probes = scale_of(lambda z: 2.0 * z + 1.0, z0)
        length = (probes.points[0] - z0).norm().item()
        expected = torch.finfo(dtype).eps ** (1 / 3) * (size or 1.0)
        assert length == pytest.approx(expected, rel=1e-3)


@dtypes
def test_shorter_step_to_the_other_side_where_a_probe_is_not_finite(dtype):
    """The edge of the domain is next to `z0`, on the side of `g`."""
    z0 = torch.ones(2, 1, dtype=dtype)
    edge = torch.tensor([[1e-6], [1e3]], dtype=dtype)  # the second problem has no edge near
    g = Recorder(lambda z: torch.where(z <= 1.0 + edge, 5.0 * z - 1.0, torch.nan))
    scale, probes = scale_of(g, z0)
    torch.testing.assert_close(scale, torch.full_like(z0, -0.2), rtol=10 * exactness(dtype), atol=0.0)
    assert probes.points[0][0] > 1.0
    assert probes.points[1][0] < 1.0
    assert (probes.points[1][0] - 1.0).abs() < (probes.points[0][0] - 1.0).abs()
    assert probes.count == 2


@dtypes
def test_longer_step_where_g_is_flat_near_z0(dtype):
    z0 = torch.zeros(1, 2, dtype=dtype)
    scale, probes = scale_of(lambda z: 1.0 - 0.1 * (z - 1.0).clamp_min(0.0), z0)
    lengths = [float((point - z0).norm()) for point in probes.points]
    assert len(lengths) > 1
    assert lengths == sorted(set(lengths))
    assert 10.0 <= float(scale) <= 20.0  # g falls by 0.1, but not from the start


@dtypes
def test_change_at_rounding_level_does_not_tell_the_scale(dtype):
    slope = 1.3 * torch.finfo(dtype).eps ** (2 / 3)  # over the first step, g changes by 1.3 of its last digit
    scale, probes = scale_of(lambda z: 1.0 - slope * z, torch.zeros(1, 1, dtype=dtype))
    assert float(scale) * slope == pytest.approx(1.0, rel=0.01)
    assert probes.count == 2


@dtypes
@pytest.mark.parametrize("value", [1e-8, 2.0, -1e8])
def test_constant_g_gives_a_first_step_as_long_as_z0(value, dtype):
    z0 = torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=dtype)
    scale, probes = scale_of(lambda z: torch.full_like(z, value), z0)
    step = (scale * value).abs() * 2**0.5
    torch.testing.assert_close(step, torch.tensor([[5.0], [1.0]], dtype=dtype))
    assert probes.count == MOST_EVALUATIONS


@dtypes
def test_g_that_is_finite_at_z0_only_gives_a_finite_scale(dtype):
    z0 = torch.tensor([[3.0, -4.0]], dtype=dtype)
    scale, probes = scale_of(lambda z: torch.where((z == z0).all(), 2.0 + 0 * z, torch.inf), z0)
    torch.testing.assert_close((scale * 2.0).abs() * 2**0.5, torch.full((1, 1), 5.0, dtype=dtype))
    assert probes.count == MOST_EVALUATIONS


@dtypes
def test_problem_at_its_root_does_not_keep_the_others_from_their_scale(dtype):
    slopes = torch.tensor([[4.0], [-7.0], [0.5]], dtype=dtype)
    z0 = torch.tensor([[1.0, 1.0], [2.0, -1.0], [1.0, 1.0]], dtype=dtype)
    scale, probes = scale_of(lambda z: slopes * (z - 1.0), z0)
    torch.testing.assert_close(scale[1], -1 / slopes[1], rtol=exactness(dtype), atol=0.0)
    assert probes.count == 1


@dtypes
def test_every_problem_has_the_scale_that_it_has_alone(dtype):
    """One is smooth, one flat near its start, one next to an edge, one at its root, one in other units."""
    z0 = torch.tensor([[0.5], [0.0], [1.0], [2.0], [1e-6]], dtype=dtype)

    def g(z: Tensor, rows: slice) -> Tensor:
        kinds = [
            lambda z: z.sin() + 2.0,
            lambda z: 1.0 - (z - 1.0).clamp_min(0.0),
            lambda z: torch.where(z <= 1.0, 5.0 * z - 1.0, torch.inf),
            lambda z: z - 2.0,
            lambda z: 1e8 * z + 1.0,
        ][rows]
        return torch.cat([kind(row) for kind, row in zip(kinds, z.split(1), strict=True)])

    together = automatic_scale(lambda z: g(z, slice(None)), z0, g(z0, slice(None)))
    for i in range(len(z0)):
        rows = slice(i, i + 1)
        alone = automatic_scale(lambda z, rows=rows: g(z, rows), z0[rows], g(z0[rows], rows))
        # The lengths that are tried are those of the problem, and so are the answers.
        torch.testing.assert_close(together[rows], alone)


@dtypes
def test_power_of_two_is_near_the_size_and_near_one_where_there_is_none(dtype):
    size = torch.tensor([3.0, 1e-20, 1e20, 1.0, 0.0, torch.inf, torch.nan], dtype=dtype)
    unit = power_of_two(size)
    assert unit.dtype == dtype
    assert torch.equal(torch.frexp(unit)[0], torch.full_like(unit, 0.5))
    assert ((size[:4] / unit[:4] >= 0.5) & (size[:4] / unit[:4] < 1.0)).all()
    assert ((unit[4:] >= 1.0) & (unit[4:] <= 2.0)).all()
