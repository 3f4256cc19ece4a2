"""Norms of packed states: what the search measures, and the inner products that the solvers need."""

import torch
from torch import Tensor

LONGEST = 8192
"""Terms of a sum that are added up at once; longer sums of float32 numbers lose digits, 1e-3 at two million."""


def two_norm(z: Tensor) -> Tensor:
    """Return the Euclidean norm of each problem, `(B, N) -> (B,)`, in the dtype of `z`."""
    if z.shape[-1] <= LONGEST:
        return torch.linalg.vector_norm(z, dim=-1)
    parts = [torch.linalg.vector_norm(part, dim=-1) for part in z.split(LONGEST, dim=-1)]
    return torch.linalg.vector_norm(torch.stack(parts, dim=-1), dim=-1)


def safe_two_norm(z: Tensor) -> Tensor:
    """Return Euclidean norms over the last dimension that neither overflow nor underflow, float64 where there is one.

    Squares of float32 numbers always fit into float64. Wider numbers are divided by the largest of them first.
    """
    if z.dtype == torch.float32 and z.device.type == "cpu":
        norm = two_norm(z).double()  # several times faster than in float64
        inside = (norm > 1e-12) & (norm < 1e15)
        if inside.all():
            return norm
        return torch.where(inside, norm, torch.linalg.vector_norm(z, dim=-1, dtype=torch.float64))
    if z.dtype == torch.float32 and z.device.type != "mps":  # that device has no float64
        return torch.linalg.vector_norm(z, dim=-1, dtype=torch.float64)
    if z.shape[-1] == 0:
        return z.new_zeros(z.shape[:-1])
    largest = z.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    return torch.linalg.vector_norm(z / largest, dim=-1) * largest.squeeze(-1)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each pair of problems, `(B, N), (B, N) -> (B,)`."""
    return (a * b).sum(dim=-1)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the elementwise quotient of non-negative numbers, with `0 / 0 = 0` and `a / 0 = inf`."""
    return torch.where(numerator == 0, torch.zeros_like(numerator), numerator / denominator)
