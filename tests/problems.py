"""Fixed points with known answers, and small helpers to look inside a solve.

A new problem joins by one line in `PROBLEMS`; every solver of `solvers/test_contract.py` meets it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepeq import Solution, fixed_point

Map = Callable[[Tensor], Tensor]


def solve(f, z0, **options) -> Solution:
    """`fixed_point`, where the test itself looks at what was reached."""
    return fixed_point(f, z0, **{"on_failure": "ignore", **options})


@dataclass
class Recorder:
    """A map that remembers where it was evaluated."""

    f: Map
    points: list[Tensor] = field(default_factory=list)

    def __call__(self, z: Tensor) -> Tensor:
        self.points.append(z.detach().clone())
        return self.f(z)

    @property
    def count(self) -> int:
        return len(self.points)


@dataclass(frozen=True)
class Problem:
    """`z_star = f(z_star)`, exact to rounding."""

    f: Map
    z0: Tensor
    z_star: Tensor
    contraction: float
    """Spectral radius of the Jacobian at `z_star`: plain iteration converges below one."""
    affine: bool
    definite: bool = False
    """`I - J` is symmetric and positive definite."""
    f_of_sample: Callable[[int], Map] | None = None
    """The map of one sample alone, where components do not mix and the arithmetic is the same in any batch."""


def relative_residual(f: Map, z: Tensor) -> Tensor:
    """`||f(z) - z|| / ||f(z)||` of each sample, written once more without the library."""
    with torch.no_grad():
        fz = f(z)
    batch_size = z.shape[0]
    distance = (fz - z).reshape(batch_size, -1).square().sum(dim=1).sqrt()
    return distance / fz.reshape(batch_size, -1).square().sum(dim=1).sqrt()


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _matrix_with_eigenvalues(eigenvalues: list[float], seed: int) -> Tensor:
    """A symmetric matrix, so that its spectral radius is its norm."""
    q, _ = torch.linalg.qr(_normal(seed, len(eigenvalues), len(eigenvalues)))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def _affine(matrix: Tensor, b: Tensor, contraction: float, dtype: torch.dtype) -> Problem:
    """`f(z) = M z + b`."""
    definite = bool(torch.allclose(matrix, matrix.T)) and contraction < 1
    identity = torch.eye(len(matrix), dtype=torch.float64)
    z_star = torch.linalg.solve(identity - matrix, b.T).T
    m, b = matrix.to(dtype), b.to(dtype)
    z0, z_star = torch.zeros_like(b), z_star.to(dtype)
    return Problem(lambda z: z @ m.T + b, z0, z_star, contraction=contraction, affine=True, definite=definite)


def _rotation(scale: float, dtype: torch.dtype, batch_size: int = 2) -> Problem:
    """Two planes turned by different angles: every eigenvalue has modulus `scale`, none is real."""
    blocks = []
    for angle in (1.0, 2.0):
        c, s = torch.cos(torch.tensor(angle)).item(), torch.sin(torch.tensor(angle)).item()
        blocks.append(torch.tensor([[c, -s], [s, c]], dtype=torch.float64))
    matrix = scale * torch.block_diag(*blocks)
    return _affine(matrix, _normal(3, batch_size, 4), scale, dtype)


def _elementwise(slopes: Tensor, dtype: torch.dtype) -> Problem:
    """`f(z) = slope z + 1`, one slope for each sample and component."""
    m = slopes.to(dtype)
    return Problem(
        lambda z: m * z + 1.0,
        torch.zeros_like(m),
        (1.0 / (1.0 - slopes)).to(dtype),
        contraction=slopes.abs().max().item(),
        affine=True,
        definite=bool((slopes < 1).all()),
        f_of_sample=lambda i: lambda z: m[i : i + 1] * z + 1.0,
    )


def _tanh(dtype: torch.dtype, batch_size: int = 3, gain: float = 0.7) -> Problem:
    w = gain * torch.linalg.qr(_normal(4, 5, 5))[0]
    b = _normal(5, batch_size, 5)
    z = torch.zeros_like(b)
    for _ in range(200):  # a contraction: exact to rounding
        z = torch.tanh(z @ w.T + b)
    w_, b_ = w.to(dtype), b.to(dtype)
    return Problem(
        lambda z: torch.tanh(z @ w_.T + b_), torch.zeros_like(b_), z.to(dtype), contraction=gain, affine=False
    )


def _cosine(dtype: torch.dtype) -> Problem:
    z0 = torch.tensor([[0.0], [1.0], [-2.0]], dtype=dtype)
    z_star = torch.full_like(z0, 0.7390851332151607)
    return Problem(torch.cos, z0, z_star, contraction=0.674, affine=False, f_of_sample=lambda i: torch.cos)


def _one_hard_sample(dtype: torch.dtype) -> Problem:
    """Two samples that any solver finds at once, around one that plain iteration never finds."""
    slopes = torch.tensor(
        [[0.1] * 8, [-1.6, -1.2, -0.7, 0.0, 0.3, 0.6, 0.9, 0.97], [0.3] * 4 + [-0.2] * 4], dtype=torch.float64
    )
    return _elementwise(slopes, dtype)


PROBLEMS: dict[str, Callable[[torch.dtype], Problem]] = {
    "affine": lambda dtype: _affine(
        _matrix_with_eigenvalues([0.6, -0.5, 0.3, 0.1, -0.1, 0.0], 1), _normal(2, 3, 6), 0.6, dtype
    ),
    "tanh": _tanh,
    "tanh_batch_of_one": lambda dtype: _tanh(dtype, batch_size=1),
    "cosine": _cosine,
    "rotation_slow": lambda dtype: _rotation(0.95, dtype),
    "rotation_diverging": lambda dtype: _rotation(1.2, dtype),
    "stiff": lambda dtype: _elementwise(
        torch.tensor([[0.99, 0.9, 0.5, -0.9, -5.0], [0.98, 0.9, 0.1, -2.0, -4.0]], dtype=torch.float64), dtype
    ),
    "diverging": lambda dtype: _affine(
        _matrix_with_eigenvalues([1.5, 0.5, -0.5, 0.2], 6), _normal(7, 2, 4), 1.5, dtype
    ),
    "one_hard_sample": _one_hard_sample,
}


def points_of(f, z0, solver) -> list[Tensor]:
    recorder = Recorder(f)
    with torch.no_grad():
        solve(recorder, z0, solver=solver, verify=False)
    return recorder.points


def sample_of(problem: Problem, i: int) -> Callable[[Tensor], Tensor]:
    """The map of one sample, with the others at zero."""

    def f(z):
        batch = torch.zeros_like(problem.z0)
        batch[i] = z
        return problem.f(batch)[i]

    return f
