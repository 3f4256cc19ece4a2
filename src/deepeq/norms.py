"""Per-sample norms: `(B, N) -> (B,)`."""

import torch
from torch import Tensor


def two_norm(z: Tensor) -> Tensor:
    """Euclidean norm of each sample, `(B, N) -> (B,)`."""
    return torch.linalg.vector_norm(z, dim=-1)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each pair of samples, `(B, N), (B, N) -> (B,)`."""
    return (a * b).sum(dim=-1)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Elementwise quotient of non-negative numbers, with `0 / 0 = 0` and `a / 0 = inf`."""
    return torch.where(numerator == 0, torch.zeros_like(numerator), numerator / denominator)
