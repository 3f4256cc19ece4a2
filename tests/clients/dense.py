"""Equilibria and their derivatives by dense linear algebra in float64, without the library."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

State = Tensor | tuple[Tensor, ...]
Map = Callable[[Any], Any]


def flatten(state: State) -> Tensor:
    """All numbers of a state in one row."""
    parts = (state,) if isinstance(state, Tensor) else state
    return torch.cat([part.reshape(-1) for part in parts])


def unflatten(row: Tensor, like: State) -> State:
    """The numbers of `flatten` in the shapes of another state."""
    if isinstance(like, Tensor):
        return row.reshape(like.shape)
    parts = row.split([part.numel() for part in like])
    return tuple(part.reshape(model.shape) for part, model in zip(parts, like, strict=True))


def jacobian(f: Map, z: State) -> Tensor:
    """The whole matrix of `df/dz`, with every problem of a batch in it."""
    row = flatten(z).detach()
    return torch.autograd.functional.jacobian(lambda flat: flatten(f(unflatten(flat, z))), row).detach()


def equilibrium(f: Map, z0: State, num_steps: int = 30) -> State:
    """The fixed point of `f` near `z0`, by Newton's method with the whole matrix, to rounding."""
    row = flatten(z0).detach()
    identity = torch.eye(len(row), dtype=row.dtype)
    for _ in range(num_steps):
        z = unflatten(row, z0)
        with torch.no_grad():
            g = flatten(f(z)) - row
        if float(g.norm()) <= 1e-14 * float(row.norm()):
            break
        row = row + torch.linalg.solve(identity - jacobian(f, z), g)
    return unflatten(row, z0)


def gradients(f: Map, z: State, loss: Callable[[Any], Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of `loss(z)` by the implicit function theorem, `u^T df/d(.)` with `(I - J)^T u = dl/dz`."""
    row = flatten(z).detach().requires_grad_()
    (v,) = torch.autograd.grad(loss(unflatten(row, z)), row)
    identity = torch.eye(len(row), dtype=row.dtype)
    u = torch.linalg.solve((identity - jacobian(f, z)).T, v)
    return list(torch.autograd.grad(flatten(f(unflatten(row.detach(), z))), parameters, u))


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The cosine of the angle between two lists of tensors."""
    first, second = flatten(tuple(a)), flatten(tuple(b))
    return float(torch.dot(first, second) / (first.norm() * second.norm()))
