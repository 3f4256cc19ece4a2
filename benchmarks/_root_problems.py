"""Systems of equations for testing root finders, most with a root and some without.

Each function is written for any array module `xp` with the names that torch, NumPy and jax.numpy share, so that every
library solves the very same equations. It takes the components of `x` along the last dimension. The formulas are those
of the named sources; the systems of More, Garbow and Hillstrom are known there by their numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

MGH = "More, Garbow, Hillstrom (1981), ACM TOMS 7, problem {}"
SCIPY = "SciPy, scipy/optimize/tests/test_nonlin.py, {}"
JAXOPT = "jaxopt, tests/broyden_test.py, {}"
OPTIMISTIX = "optimistix, tests/helpers.py and tests/test_root_find.py, {}"
XITORCH = "xitorch, xitorch/_tests/test_optimize.py, {}"

Function = Callable[[Any, Any], Any]
"""`(array module, x) -> g(x)`, for `x` of shape `(..., N)`."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Equations `g(z) = 0` and where to start."""

    name: str
    function: Function
    start: tuple[float, ...]
    source: str
    root: tuple[float, ...] | None = None
    """A root where it has a closed form; there may be others."""

    @property
    def z0(self) -> Tensor:
        """Return the start as a batch of one, `(1, N)`, float64."""
        return torch.tensor([self.start], dtype=torch.float64)

    def g(self, z: Tensor) -> Tensor:
        """Return the residual of each row, `(B, N) -> (B, N)`."""
        return self.function(torch, z)


def _like(xp: Any, values: Any, x: Any) -> Any:
    return xp.asarray(values, dtype=x.dtype)


def _count(xp: Any, x: Any) -> Any:
    return _like(xp, list(range(1, x.shape[-1] + 1)), x)


def _sum(xp: Any, x: Any) -> Any:
    return xp.sum(x, -1)[..., None]


def _stack(xp: Any, *components: Any) -> Any:
    return xp.stack(components, -1)


def _shifted(xp: Any, x: Any) -> tuple[Any, Any]:
    """Return left and right neighbors, with zeros beyond the ends."""
    zero = xp.zeros_like(x[..., :1])
    return xp.concatenate([zero, x[..., :-1]], -1), xp.concatenate([x[..., 1:], zero], -1)


def _nodes(n: int) -> list[float]:
    return [k / (n + 1) for k in range(1, n + 1)]


def _normal(seed: int, *shape: int, scale: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, dtype=torch.float64, generator=generator)).tolist()


# More, Garbow and Hillstrom; Watson, Wood and the variably dimensioned system are gradients, as in MINPACK's tests.


def rosenbrock(xp: Any, x: Any) -> Any:
    a, b = x[..., 0], x[..., 1]
    return _stack(xp, 1 - a, 10 * (b - a**2))


def powell_singular(xp: Any, x: Any) -> Any:
    a, b, c, d = (x[..., i] for i in range(4))
    return _stack(xp, a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2)


def powell_badly_scaled(xp: Any, x: Any) -> Any:
    a, b = x[..., 0], x[..., 1]
    return _stack(xp, 1e4 * a * b - 1, xp.exp(-a) + xp.exp(-b) - 1.0001)


def wood(xp: Any, x: Any) -> Any:
    a, b, c, d = (x[..., i] for i in range(4))
    first, second = b - a**2, d - c**2
    return _stack(
        xp,
        -200 * a * first - (1 - a),
        200 * first + 20.2 * (b - 1) + 19.8 * (d - 1),
        -180 * c * second - (1 - c),
        180 * second + 20.2 * (d - 1) + 19.8 * (b - 1),
    )


def helical_valley(xp: Any, x: Any) -> Any:
    a, b, c = (x[..., i] for i in range(3))
    # The angle in turns, cut along the negative second axis: turned by a quarter, arctan2 has its cut there.
    turns = 0.25 + xp.arctan2(-a, b) / (2 * torch.pi)
    return _stack(xp, 10 * (c - 10 * turns), 10 * (xp.sqrt(a**2 + b**2) - 1), c)


def watson(xp: Any, x: Any) -> Any:
    n, times = x.shape[-1], [i / 29 for i in range(1, 30)]
    powers = _like(xp, [[t**j for j in range(n)] for t in times], x)  # (29, n)
    slopes = _like(xp, [[j * t ** (j - 1) if j else 0.0 for j in range(n)] for t in times], x)
    value = x @ powers.T
    residual = x @ slopes.T - value**2 - 1
    last = x[..., 1] - x[..., 0] ** 2 - 1
    ends = _stack(xp, x[..., 0] * (1 - 2 * last), last)
    rest = xp.zeros_like(x[..., 2:])
    return residual @ slopes - 2 * (residual * value) @ powers + xp.concatenate([ends, rest], -1)


def chebyquad(xp: Any, x: Any) -> Any:
    """Quadrature nodes: the means of the shifted Chebyshev polynomials equal their integrals."""
    y = 2 * x - 1
    before, now, means = xp.ones_like(y), y, []
    for i in range(1, x.shape[-1] + 1):
        means.append(xp.sum(now, -1) / x.shape[-1] + (1 / (i**2 - 1) if i % 2 == 0 else 0.0))
        before, now = now, 2 * y * now - before
    return _stack(xp, *means)


def brown_almost_linear(xp: Any, x: Any) -> Any:
    linear = x + _sum(xp, x) - (x.shape[-1] + 1)
    return xp.concatenate([linear[..., :-1], xp.prod(x, -1)[..., None] - 1], -1)


def discrete_boundary_value(xp: Any, x: Any) -> Any:
    left, right = _shifted(xp, x)
    n = x.shape[-1]
    return 2 * x - left - right + (x + _like(xp, _nodes(n), x) + 1) ** 3 / (2 * (n + 1) ** 2)


def discrete_integral_equation(xp: Any, x: Any) -> Any:
    n = x.shape[-1]
    kernel = [[min(s, t) * (1 - max(s, t)) / (2 * (n + 1)) for s in _nodes(n)] for t in _nodes(n)]
    return x + (x + _like(xp, _nodes(n), x) + 1) ** 3 @ _like(xp, kernel, x).T


def trigonometric(xp: Any, x: Any) -> Any:
    cosine = xp.cos(x)
    return x.shape[-1] - _sum(xp, cosine) + _count(xp, x) * (1 - cosine) - xp.sin(x)


def variably_dimensioned(xp: Any, x: Any) -> Any:
    count = _count(xp, x)
    total = _sum(xp, count * (x - 1))
    return x - 1 + count * total * (1 + 2 * total**2)


def broyden_tridiagonal(xp: Any, x: Any) -> Any:
    left, right = _shifted(xp, x)
    return (3 - 2 * x) * x - left - 2 * right + 1


def broyden_banded(xp: Any, x: Any) -> Any:
    n = x.shape[-1]
    band = [[float(k - 5 <= j <= k + 1 and j != k) for j in range(n)] for k in range(n)]
    return x * (2 + 5 * x**2) + 1 - (x * (1 + x)) @ _like(xp, band, x).T


# SciPy, jaxopt, optimistix, xitorch.


def cubic_damping(xp: Any, x: Any) -> Any:
    return -_like(xp, [3, 2, 1.5, 1, 0.5], x) * x - 0.01 * _sum(xp, x**2) * x


def identity(xp: Any, x: Any) -> Any:
    return x


def second_difference(xp: Any, x: Any) -> Any:
    left, right = _shifted(xp, x)
    return left + right - 2 * x - _count(xp, x)


def pressure_network(xp: Any, x: Any) -> Any:
    """Flows in parallel pipes: equal pressures `x^2 / 2`, and a total of 4."""
    pressure = 0.5 * x**2
    return xp.concatenate([pressure[..., 1:] - pressure[..., :1], _sum(xp, x) - 4], -1)


def preconditioned_pair(xp: Any, x: Any) -> Any:
    a, b = x[..., 0], x[..., 1]
    pair = _stack(xp, (a + 3) * (b**5 - 7) + 18, xp.sin(b * xp.exp(a) - 1))
    p, q, r, s = -4.256, 14.7, 0.8394989, 0.59964207
    inverse = [[s, -q], [-r, p]]
    return -(pair @ _like(xp, inverse, x).T) / (p * s - q * r)


def geometric_decay(xp: Any, x: Any) -> Any:
    return _like(xp, [0.9, 0.99, 0.999], x) * x - x


def sine_and_cubes(xp: Any, x: Any) -> Any:
    first = x[..., :3]
    return xp.concatenate([xp.sin(first) * first**2, x[..., 3:] ** 3], -1) - x


def shifted_cosine(xp: Any, x: Any) -> Any:
    return xp.cos(x) + _like(xp, [0.0, torch.pi / 2], x) - x


def affine(matrix: Any, shift: Any, xp: Any, x: Any) -> Any:
    return x @ _like(xp, matrix, x).T + _like(xp, shift, x) - x


def sine(xp: Any, x: Any) -> Any:
    return xp.sin(x) - x


def cosine(xp: Any, x: Any) -> Any:
    return xp.cos(x) - x


def exponential(xp: Any, x: Any) -> Any:
    return xp.exp(-x) - x


def network(inner: Any, outer: Any, xp: Any, x: Any) -> Any:
    """A multilayer perceptron with one softplus layer, as a fixed point."""
    return xp.log1p(xp.exp(x @ _like(xp, inner, x).T)) @ _like(xp, outer, x).T - x


def heat_step(xp: Any, x: Any) -> Any:
    """The Crank-Nicolson step of the test, whose Laplacian returns its argument."""
    n = x.shape[-1]
    old = _like(xp, [(-1 + 2 * i / (n - 1)) ** 2 for i in range(n)], x)
    return old + 0.5 * ((1 - x) * x + (1 - old) * old) - x


def robertson(xp: Any, x: Any) -> Any:
    a, b, c = (x[..., i] for i in range(3))
    slow, fast, middle = 0.04 * a, 3e7 * b**2, 1e4 * b * c
    return _stack(xp, middle - slow, slow - middle - fast, fast)


def robertson_midpoint(step: float, xp: Any, x: Any) -> Any:
    return step * robertson(xp, 0.5 * x) - x


def robertson_slopes(step: float, xp: Any, x: Any) -> Any:
    return robertson(xp, 0.5 * step * x) - x


def product_of_sums(xp: Any, x: Any) -> Any:
    a, b, c, d, e = (x[..., i] for i in range(5))
    return _stack(xp, (a + b + c + d + e) * (a - b + c - d + e), a, c**2, xp.tanh(d), e + 1)


def sigmoid_layer(matrix: Any, shift: float, skip: float, xp: Any, x: Any) -> Any:
    return 1 / (1 + xp.exp(-2 * (x @ _like(xp, matrix, x).T))) + shift + skip * x


# Differential and integral equations, and single equations.


def bratu(size: int, dimensions: int, strength: float, xp: Any, x: Any) -> Any:
    """`-laplace(u) = strength exp(u)` on an interval or a square, five-point differences, times the mesh width^2."""
    line = [[2.0 * (i == j) - (abs(i - j) == 1) for j in range(size)] for i in range(size)]
    laplacian = torch.tensor(line, dtype=torch.float64)
    if dimensions == 2:
        eye = torch.eye(size, dtype=torch.float64)
        laplacian = torch.kron(laplacian, eye) + torch.kron(eye, laplacian)
    return x @ _like(xp, laplacian.tolist(), x).T - strength / (size + 1) ** 2 * xp.exp(x)


def chandrasekhar(c: float, xp: Any, x: Any) -> Any:
    n = x.shape[-1]
    nodes = [(i + 0.5) / n for i in range(n)]
    kernel = [[0.5 * c / n * s / (s + t) for t in nodes] for s in nodes]
    return x - 1 / (1 - x @ _like(xp, kernel, x).T)


def logarithm(xp: Any, x: Any) -> Any:
    return xp.log(x)


def arctangent(xp: Any, x: Any) -> Any:
    return xp.arctan(x)


def square_root_of_two(xp: Any, x: Any) -> Any:
    return x**2 - 2


def kepler(xp: Any, x: Any) -> Any:
    """An eccentricity of 0.9, a mean anomaly of 0.5."""
    return x - 0.9 * xp.sin(x) - 0.5


def lambert(xp: Any, x: Any) -> Any:
    return x * xp.exp(x) - 10


def _problems() -> list[Problem]:
    mgh = [
        # name, function, start, number in the source, root, usual multiples of the start
        ("Rosenbrock", rosenbrock, (-1.2, 1.0), 1, (1.0, 1.0), (1, 10, 100)),
        ("Powell singular", powell_singular, (3.0, -1.0, 0.0, 1.0), 13, (0.0,) * 4, (1, 10)),
        ("Powell badly scaled", powell_badly_scaled, (0.0, 1.0), 3, None, (1, 10)),
        ("Wood gradient", wood, (-3.0, -1.0, -3.0, -1.0), 14, (1.0,) * 4, (1, 10)),
        ("helical valley", helical_valley, (-1.0, 0.0, 0.0), 7, (1.0, 0.0, 0.0), (1, 10)),
        ("Watson gradient 6", watson, (0.0,) * 6, 20, None, (1,)),
        ("Watson gradient 9", watson, (0.0,) * 9, 20, None, (1,)),
        ("Chebyquad 5", chebyquad, tuple(_nodes(5)), 35, None, (1,)),
        ("Chebyquad 6", chebyquad, tuple(_nodes(6)), 35, None, (1,)),
        ("Chebyquad 7", chebyquad, tuple(_nodes(7)), 35, None, (1,)),
        ("Chebyquad 9", chebyquad, tuple(_nodes(9)), 35, None, (1,)),
        ("Brown almost linear 10", brown_almost_linear, (0.5,) * 10, 27, (1.0,) * 10, (1, 10)),
        ("Brown almost linear 30", brown_almost_linear, (0.5,) * 30, 27, (1.0,) * 30, (1,)),
        ("Brown almost linear 40", brown_almost_linear, (0.5,) * 40, 27, (1.0,) * 40, (1,)),
        ("discrete boundary value", discrete_boundary_value, _arch(10), 28, None, (1, 10)),
        ("discrete integral equation", discrete_integral_equation, _arch(10), 29, None, (1, 10)),
        ("trigonometric", trigonometric, (0.1,) * 10, 26, (0.0,) * 10, (1,)),
        ("variably dimensioned", variably_dimensioned, _falling(10), 25, (1.0,) * 10, (1, 10)),
        ("Broyden tridiagonal", broyden_tridiagonal, (-1.0,) * 10, 30, None, (1, 10)),
        ("Broyden banded", broyden_banded, (-1.0,) * 10, 31, None, (1, 10)),
    ]
    made = [
        Problem(
            name=name if factor == 1 else f"{name}, start x {factor}",
            function=function,
            start=tuple(factor * value for value in start),
            source=MGH.format(number),
            root=root,
        )
        for name, function, start, number, root, factors in mgh
        for factor in factors
    ]
    half, matrix = (0.5,) * 28, torch.tensor(_normal(0, 200, 200), dtype=torch.float64)
    symmetric = matrix + matrix.T
    contraction = 0.5 * symmetric / torch.linalg.matrix_norm(symmetric, ord=2)
    midpoint = torch.tensor(_normal(1, 28, 28), dtype=torch.float64) / 32
    small = _normal(2, 3, 3, scale=0.5)
    others: list[tuple[str, Function, Sequence[float], str, Sequence[float] | None]] = [
        ("cubic damping", cubic_damping, (1.0,) * 5, SCIPY.format("F"), (0.0,) * 5),
        ("identity", identity, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), SCIPY.format("F2"), (0.0,) * 6),
        ("identity at the root", identity, (0.0,) * 6, SCIPY.format("F2_lucky"), (0.0,) * 6),
        ("second difference", second_difference, (1.0, 2.0, 3.0), SCIPY.format("F3"), (-2.5, -4.0, -3.5)),
        ("Powell badly scaled, negative", powell_badly_scaled, (-1.0, -2.0), SCIPY.format("F4_powell"), None),
        ("pressure network", pressure_network, (2.0, 0.0, 2.0, 0.0), SCIPY.format("F5"), (1.0,) * 4),
        ("preconditioned pair", preconditioned_pair, (-0.5, 1.4), SCIPY.format("F6"), (0.0, 1.0)),
        ("geometric decay", geometric_decay, (1.0, 0.4, -0.2), JAXOPT.format("geometric decay"), (0.0,) * 3),
        ("sine and cubes", sine_and_cubes, (0.6, 0.0, -0.1, 0.7, 0.5), JAXOPT.format("sin"), (0.0,) * 5),
        ("shifted cosine", shifted_cosine, (0.3, torch.pi / 4), JAXOPT.format("cos"), None),
        (
            "affine contraction 200",
            partial(affine, contraction.tolist(), _normal(3, 200)),
            (0.0,) * 200,
            JAXOPT.format("affine contraction"),
            None,
        ),
        ("sine", sine, half, OPTIMISTIX.format("sin"), (0.0,) * 28),
        ("cosine", cosine, half, OPTIMISTIX.format("cos"), None),
        ("exponential", exponential, half, OPTIMISTIX.format("exponential"), None),
        (
            "network",
            partial(network, _normal(4, 8, 28, scale=0.1), _normal(5, 28, 8, scale=0.02)),
            half,
            OPTIMISTIX.format("MLP, other weights"),
            None,
        ),
        ("heat step", heat_step, (1.0,) * 100, OPTIMISTIX.format("nonlinear heat"), None),
        (
            "midpoint rule, linear",
            partial(affine, midpoint.tolist(), (0.0,) * 28),
            half,
            OPTIMISTIX.format("midpoint y linear, another matrix"),
            (0.0,) * 28,
        ),
        (
            "midpoint rule, Robertson",
            partial(robertson_midpoint, 1e-8),
            (1.0,) * 3,
            OPTIMISTIX.format("midpoint y nonlinear"),
            (0.0,) * 3,
        ),
        (
            "midpoint slopes, Robertson",
            partial(robertson_slopes, 1e-8),
            (1.0,) * 3,
            OPTIMISTIX.format("midpoint f nonlinear"),
            (0.0,) * 3,
        ),
        ("product of sums", product_of_sums, (0.1, 1.1, 0.1, 0.1, -1.1), OPTIMISTIX.format("bounded, no bound"), None),
        ("sigmoid layer", partial(sigmoid_layer, small, 0.0, 1.0), _normal(6, 3), XITORCH.format("rootfinder"), None),
        ("sigmoid cell", partial(sigmoid_layer, small, 0.0, -1.0), _normal(6, 3), XITORCH.format("equilibrium"), None),
        ("Bratu 1-D", partial(bratu, 50, 1, 3.0), (0.0,) * 50, "Bratu's equation, lambda 3 of 3.51", None),
        ("Bratu 2-D", partial(bratu, 10, 2, 6.0), (0.0,) * 100, "Bratu's equation, lambda 6 of 6.81", None),
        *(
            (f"H-equation c={c}", partial(chandrasekhar, c), (1.0,) * 100, "Kelley (1995), sec. 5.6", None)
            for c in (0.5, 0.9, 0.9999)
        ),
        ("logarithm", logarithm, (3.0,), "Newton's first step leaves the domain", (1.0,)),
        ("arctangent", arctangent, (3.0,), "Newton's full steps diverge", (0.0,)),
        ("square root of two", square_root_of_two, (1.0,), "a single equation", (2**0.5,)),
        ("Kepler", kepler, (0.5,), "Kepler's equation", None),
        ("Lambert", lambert, (-0.5,), "x exp(x) = 10", None),
    ]
    made += [
        Problem(
            name=name,
            function=function,
            start=tuple(start),
            source=source,
            root=None if root is None else tuple(root),
        )
        for name, function, start, source, root in others
    ]
    return made


def _arch(n: int) -> tuple[float, ...]:
    return tuple(t * (t - 1) for t in _nodes(n))


def _falling(n: int) -> tuple[float, ...]:
    return tuple(1 - j / n for j in range(1, n + 1))


def scaled_line(units: float, root: float, xp: Any, x: Any) -> Any:
    return units * (x - root)


def scaled_curve(units: float, root: float, width: float, xp: Any, x: Any) -> Any:
    """Strictly increasing in `x` for positive units, steep at the root and flat far away."""
    y = (x - root) / width
    return units * (y + xp.sin(y) / 2 + xp.arctan(y))


def _shifted_problems() -> list[Problem]:
    made = []
    for sign in (1, -1):
        for units in (1e-6, 1e-3, 1.0, 1e3, 1e6):
            for root in (0.5, 1e4):
                made.append(
                    Problem(
                        name=f"line, units {sign * units:g}, root {root:g}",
                        function=partial(scaled_line, sign * units, root),
                        start=(0.0, 1.0, -1.0),
                        source="affine",
                        root=(root,) * 3,
                    )
                )
            made.append(
                Problem(
                    name=f"curve, units {sign * units:g}",
                    function=partial(scaled_curve, sign * units, 30.0, 10.0),
                    start=(0.0, 1.0, -1.0),
                    source="increasing or decreasing",
                    root=(30.0,) * 3,
                )
            )
    return made


def sine_above_zero(xp: Any, x: Any) -> Any:
    return xp.sin(x) + 1.5


def square_plus_one(xp: Any, x: Any) -> Any:
    return x**2 + 1


def falling_exponential(xp: Any, x: Any) -> Any:
    """A function that tends to zero and never reaches it."""
    return 1e-2 + xp.exp(-x)


def parallel_lines(xp: Any, x: Any) -> Any:
    total = xp.sum(x, -1)
    return _stack(xp, total - 1, total + 1)


PROBLEMS = _problems()
SHIFTED = _shifted_problems()
"""Simple roots in many units, near and far, with both signs of the derivative."""
ROOTLESS = [
    Problem(name="sine plus 1.5", function=sine_above_zero, start=(0.0,), source="a single equation"),
    Problem(name="square plus one", function=square_plus_one, start=(0.7,), source="a single equation"),
    Problem(name="exponential plus 0.01", function=falling_exponential, start=(0.0,), source="a single equation"),
    Problem(name="parallel lines", function=parallel_lines, start=(0.3, 0.2), source="two equations"),
    Problem(name="Chebyquad 8", function=chebyquad, start=tuple(_nodes(8)), source=MGH.format(35)),
]
