"""Maps that hide something from autograd: a gradient is right, or an error says why there is none."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepeq import (
    GMRES,
    BackpropAdjoint,
    Broyden,
    FixedPointIteration,
    ImplicitAdjoint,
    NeumannAdjoint,
    PhantomAdjoint,
    Unrolled,
    fixed_point,
)

# What reentrant checkpointing says without gradients, in the search for the equilibrium.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")

TIGHT = Broyden(rtol=1e-10, max_steps=100)
ADJOINTS = {
    "implicit": ImplicitAdjoint(solver=GMRES(rtol=1e-10)),
    "implicit_iteration": ImplicitAdjoint(solver=FixedPointIteration(rtol=1e-10, max_steps=500)),
    "implicit_checkpoint": ImplicitAdjoint(solver=GMRES(rtol=1e-10), checkpoint=True),
    "implicit_twice": ImplicitAdjoint(solver=GMRES(rtol=1e-10), twice_differentiable=True),
    "phantom": PhantomAdjoint(),
    "phantom_steps": PhantomAdjoint(steps=3),
    "phantom_last": PhantomAdjoint(steps=3, returns="last"),
    "neumann": NeumannAdjoint(),
    "neumann_terms": NeumannAdjoint(terms=4),
    "backprop": BackpropAdjoint(),
}
adjoints = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=list(ADJOINTS))


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.w = nn.Parameter(0.7 * torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))[0])
        self.x = nn.Parameter(torch.randn(2, 4, generator=g, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.w.T + self.x)


class _NestedBackward(torch.autograd.Function):
    """What older reversible layers and reentrant checkpointing do: `autograd.backward` on a graph of their own."""

    @staticmethod
    def forward(ctx, z, module):
        ctx.module = module
        ctx.save_for_backward(z)
        with torch.no_grad():
            return module(z)

    @staticmethod
    def backward(ctx, gradient):
        (z,) = ctx.saved_tensors
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = ctx.module(z)
        torch.autograd.backward(value, gradient)
        return z.grad, None


MAPS = {
    "reentrant_checkpoint": lambda cell: lambda z: checkpoint(cell, z, use_reentrant=True),
    "reentrant_part": lambda cell: lambda z: 0.5 * cell(z) + 0.5 * checkpoint(cell, z, use_reentrant=True),
    "nested_backward": lambda cell: lambda z: _NestedBackward.apply(z, cell),
    "nested_part": lambda cell: lambda z: 0.5 * cell(z) + 0.5 * _NestedBackward.apply(z, cell),
    "checkpoint": lambda cell: lambda z: checkpoint(cell, z, use_reentrant=False),
}
maps = pytest.mark.parametrize("hide", MAPS.values(), ids=list(MAPS))


def gradients(f, cell: Cell, adjoint) -> list[Tensor | None]:
    cell.zero_grad()
    value = fixed_point(f, torch.zeros(2, 4, dtype=torch.float64), solver=TIGHT, adjoint=adjoint).value
    value.square().sum().backward()
    return [cell.w.grad, cell.x.grad]


@maps
@adjoints
@pytest.mark.parametrize("accumulated", [False, True])
def test_gradient_is_right_or_an_error_and_never_none_or_a_sum_of_products(hide, adjoint, accumulated):
    cell = Cell()
    expected = [g.clone() for g in gradients(cell, cell, adjoint)]
    cell.zero_grad()
    if accumulated:  # as in a training step of several batches
        cell.w.grad, cell.x.grad = torch.zeros_like(cell.w), torch.zeros_like(cell.x)
    value = fixed_point(hide(cell), torch.zeros(2, 4, dtype=torch.float64), solver=TIGHT, adjoint=adjoint).value
    message = ""
    try:
        value.square().sum().backward()
    except RuntimeError as error:
        message = str(error)
    if message:
        assert "use_reentrant" in message or "backward pass of its own" in message
        assert hide is not MAPS["checkpoint"]
        return
    for gradient, e in zip((cell.w.grad, cell.x.grad), expected, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, e, rtol=1e-6, atol=1e-8)


@maps
def test_layers_of_a_hiding_map_have_the_gradient_of_the_plain_stack(hide):
    cell, found = Cell(), []
    x = torch.zeros(2, 4, dtype=torch.float64)
    for f in (cell, hide(cell)):

        class Layer(nn.Module):
            def forward(self, z, x, f=f):
                return f(z)

        cell.zero_grad()
        Unrolled(Layer(), 5)(x).value.square().sum().backward()
        found.append([cell.w.grad.clone(), cell.x.grad.clone()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["reentrant_checkpoint", "nested_backward"])
def test_backward_solve_says_what_to_use_instead(name):
    cell = Cell()
    with pytest.raises(RuntimeError, match=r"use_reentrant=False"):
        gradients(MAPS[name](cell), cell, ADJOINTS["implicit"])
