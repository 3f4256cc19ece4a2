"""Products with the Jacobian, in forward mode and by differences, against the dense matrix."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from deepeq.jacobian import JacobianProduct, jacobian_product
from tests.problems import Recorder

Map = Callable[[Tensor], Tensor]


class SineWithoutForwardMode(torch.autograd.Function):
    """A function with a backward and no `jvp`, as users write them."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return gradient * z.cos()


def weight(n: int = 5) -> Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / n**0.5


def smooth(z: Tensor) -> Tensor:
    return torch.tanh(z @ weight().to(z.dtype).T) + z.sin()


def through_numpy(z: Tensor) -> Tensor:
    return torch.tanh(z @ weight().to(z.dtype).T) + torch.sin(torch.from_numpy(z.detach().numpy().copy()))


def all_through_numpy(z: Tensor) -> Tensor:
    return smooth(torch.from_numpy(z.detach().numpy().copy()))


def detached_part(z: Tensor) -> Tensor:
    return torch.tanh(z @ weight().to(z.dtype).T) + z.detach().sin()


def own_function(z: Tensor) -> Tensor:
    return torch.tanh(z @ weight().to(z.dtype).T) + SineWithoutForwardMode.apply(z)


def transform_inside(z: Tensor) -> Tensor:
    """The gradient of an energy: its derivative in forward mode needs forward over reverse."""
    return torch.func.grad(lambda y: ((y @ weight().to(z.dtype).T).cosh().log() @ torch.ones(5, dtype=z.dtype)).sum())(
        z
    )


FORWARD: dict[str, Map] = {"smooth": smooth}
DIFFERENCES: dict[str, Map] = {
    "a part through numpy": through_numpy,
    "all through numpy": all_through_numpy,
    "a detached part": detached_part,
    "own function without jvp": own_function,
}
EITHER: dict[str, Map] = {"a transform inside": transform_inside}
MAPS = FORWARD | DIFFERENCES | EITHER

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def batch(dtype: torch.dtype = torch.float64, rows: int = 3, n: int = 5) -> tuple[Tensor, Tensor]:
    """A point and a direction."""
    generator = torch.Generator().manual_seed(8)
    z, v = torch.randn(2, rows, n, generator=generator, dtype=torch.float64).to(dtype)
    return z, v


def dense_product(g: Map, z: Tensor, v: Tensor, h: float = 1e-3) -> Tensor:
    """The Jacobian by fourth-order differences in float64, column by column, times `v`."""
    z, v, rows = z.double(), v.double(), []
    for i in range(len(z)):
        columns = []
        for e in torch.eye(z.shape[1], dtype=torch.float64):

            def at(t: float, i: int = i, e: Tensor = e) -> Tensor:
                return g(z[i : i + 1] + t * e)[0]

            columns.append((8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h))
        rows.append(torch.stack(columns, dim=1) @ v[i])
    return torch.stack(rows)


def bound(name: str, dtype: torch.dtype) -> float:
    eps = torch.finfo(dtype).eps
    return 100 * eps if name in FORWARD and dtype == torch.float32 else max(20 * eps**0.5, 1e-10)


@dtypes
@pytest.mark.parametrize("name", MAPS)
def test_product_equals_the_dense_jacobian_times_v(name, dtype):
    g, (z, v) = MAPS[name], batch(dtype)
    product = jacobian_product(g, z, g(z))
    for direction in (v, v.flip(0), 10.0 * v):  # the first product decides how the others are made
        result = product(direction)
        assert result.dtype == dtype
        expected = dense_product(g, z, direction)
        tolerance = bound(name, dtype) * float(expected.norm(dim=1).max())
        torch.testing.assert_close(result.double(), expected, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_is_exact_to_rounding(name):
    g, (z, v) = FORWARD[name], batch()
    expected = torch.func.jvp(g, (z,), (v,))[1]
    torch.testing.assert_close(jacobian_product(g, z, g(z))(v), expected, rtol=1e-13, atol=1e-14)


@dataclass
class Count:
    """A map that counts its calls and leaves tangents alone."""

    g: Map
    calls: int = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self.g(z)


@pytest.mark.parametrize("name", MAPS)
def test_product_costs_one_evaluation_after_the_first(name):
    g, (z, v) = Count(MAPS[name]), batch()
    products = JacobianProduct(g)
    gz = g(z)
    g.calls = 0
    products.at(z, gz)(v)
    assert 2 <= g.calls <= 4
    for point in (z, z + 1.0):  # what was found at one point holds at others
        product, g.calls = products.at(point, g(point)), 0
        for count in (1, 2, 3):
            product(v)
            assert g.calls == count


@pytest.mark.parametrize("name", MAPS)
def test_product_leaves_its_arguments_alone_and_carries_no_tangent_or_graph(name):
    g, (z, v) = MAPS[name], batch()
    gz = g(z)
    before = [x.clone() for x in (z, v, gz)]
    with torch.no_grad():
        result = jacobian_product(g, z, gz)(v)
    assert all(torch.equal(a, b) for a, b in zip((z, v, gz), before, strict=True))
    assert torch.autograd.forward_ad.unpack_dual(result).tangent is None
    assert not result.requires_grad


# --- steps of differences ----------------------------------------------------------------------------------------


def sines_through_numpy(size: Tensor) -> Map:
    """`size sin(z / size)`, a Jacobian that depends on `z / size` alone."""
    return lambda z: size * torch.sin(torch.from_numpy((z / size).numpy().copy()))


@dtypes
def test_every_problem_has_a_step_of_its_own(dtype):
    """Points and directions of all sizes side by side: one step for all would be lost in rounding, or too long."""
    size = torch.tensor([[1.0], [1e6], [1e12], [1.0], [1e6], [1.0]], dtype=dtype)
    length = torch.tensor([[1.0], [1e-3], [1e9], [1e12], [1e-12], [1e-12]], dtype=dtype)
    y, u = batch(dtype, rows=6)
    z, v = size * y, length * u
    g = sines_through_numpy(size)
    result = jacobian_product(g, z, g(z))(v)
    expected = v * y.cos()
    error = (result - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error <= 20 * torch.finfo(dtype).eps ** 0.5).all()


def test_difference_of_a_problem_does_not_depend_on_its_batch_mates():
    size, (z, v) = torch.tensor([[1.0], [1e6], [1e-3]], dtype=torch.float64), batch()
    z, v = size * z, v * torch.tensor([[1e-9], [1.0], [1e9]], dtype=torch.float64)
    g = sines_through_numpy(size)
    together = jacobian_product(g, z, g(z))(v)
    for i in range(3):
        own = sines_through_numpy(size[i : i + 1])
        alone = jacobian_product(own, z[i : i + 1], own(z[i : i + 1]))(v[i : i + 1])
        assert torch.equal(alone, together[i : i + 1])


@pytest.mark.parametrize("name", MAPS)
def test_zero_direction_has_a_product_of_zero_beside_others(name):
    g, (z, v) = MAPS[name], batch()
    v[1] = 0.0
    product = jacobian_product(g, z, g(z))
    for _ in range(2):
        result = product(v)
        assert (result[1] == 0).all()
        assert (result[::2].norm(dim=1) > 1e-3).all()


# --- what the first product decides ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_map_of_16_bits_keeps_forward_mode_although_its_differences_are_noise(dtype):
    w, (z, v) = weight().float(), batch(torch.float32)

    def g(z: Tensor) -> Tensor:
        return torch.tanh(z.to(dtype) @ w.to(dtype).T).float()

    expected = dense_product(lambda z: torch.tanh(z @ w.double().T), z, v)
    product = jacobian_product(g, z, g(z))
    for _ in range(2):
        error = (product(v).double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert (error <= 8 * torch.finfo(dtype).eps).all()


def test_detached_part_of_one_problem_is_enough_for_differences():
    z, v = batch()
    flag = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)

    def g(z: Tensor) -> Tensor:
        return z.sin() + flag * (3 * z.detach()).cos()

    expected = v * (z.cos() - 3 * flag * (3 * z).sin())
    torch.testing.assert_close(jacobian_product(g, z, g(z))(v), expected, rtol=1e-5, atol=1e-6)


def test_products_at_other_points_are_those_of_these_points():
    z, v = batch()
    for g in (smooth, detached_part):
        products = JacobianProduct(g)
        for point in (z, z + 0.5, -z):
            expected = dense_product(g, point, v)
            torch.testing.assert_close(products.at(point, g(point))(v), expected, rtol=1e-6, atol=1e-6)


def test_differences_are_taken_near_the_point():
    z, v = batch()
    g = Recorder(through_numpy)
    jacobian_product(g, z, g(z))(1e6 * v)
    assert all((point - z).norm() < 1e-4 for point in g.points)


# --- errors of the map -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError, ValueError, ZeroDivisionError])
@pytest.mark.parametrize("good_products", [0, 1, 3])
@pytest.mark.parametrize("name", ["smooth", "own function without jvp", "a detached part"])
def test_error_of_the_map_itself_is_raised(name, good_products, kind):
    broken = False

    def g(z: Tensor) -> Tensor:
        if broken:
            raise kind("no such pressure")
        return MAPS[name](z)

    z, v = batch()
    product = jacobian_product(g, z, g(z))
    for _ in range(good_products):
        product(v)
    broken = True
    with pytest.raises(kind, match="no such pressure"):
        product(v)
    broken = False
    torch.testing.assert_close(product(v), dense_product(g, z, v), rtol=1e-6, atol=1e-6)  # no level was left open
