"""Cells and small helpers for the tests of normalized and of held weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import deepeq
from deepeq.nn import (
    infinity_norm,
    spectral_norm,
    weight_norm,
)

EXACT = {
    "solver": deepeq.FixedPointIteration(rtol=1e-14, max_steps=400),
    "adjoint": deepeq.ImplicitAdjoint(solver=deepeq.GMRES(rtol=1e-14, max_steps=60)),
}

# Each normalizes all layers of a module.
NORMALIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight": weight_norm,
    "spectral": lambda module: spectral_norm(module, bound=0.6, clip=False),
    "spectral_clipped": lambda module: spectral_norm(module, bound=0.6),
    "infinity": lambda module: infinity_norm(module, bound=0.6, clip=False),
    "infinity_clipped": lambda module: infinity_norm(module, bound=0.6),
}


class Cell(nn.Module):
    """`tanh(W2 tanh(W1 z) + x)`."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, dtype=torch.float64)
        self.second = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(z))) + x)


class FullCell(nn.Module):
    """A cell with every optional method; its weight is used in `inject` and in `forward`."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=torch.float64)

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 0.25)

    def output(self, z: Tensor) -> Tensor:
        return z[..., :2]

    def extend_memory(self, memory: Tensor | None, x: Tensor, z: Tensor, *, length: int | None = None) -> Tensor:
        return z[:, -1:]

    def inject(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x if memory is None else x + memory
        return x @ self.linear.weight.T

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.linear(z) + injection)


class Counting(nn.Module):
    """A parametrization that counts its evaluations, and those that recorded a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[bool] = []

    def forward(self, weight: Tensor) -> Tensor:
        self.calls.append(torch.is_grad_enabled())
        return 0.5 * torch.tanh(weight)


def x_of(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 6)), dtype=torch.float64)


def gradients(loss: Tensor, module: nn.Module, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), **options))


def assert_all_close(first: list[Tensor], second: list[Tensor], rtol: float = 1e-9) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


def spectral(weight: Tensor) -> float:
    return torch.linalg.matrix_norm(weight.detach().flatten(1), ord=2).item()
