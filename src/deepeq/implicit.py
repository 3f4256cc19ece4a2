"""The equilibrium as a node of the graph. This file holds the only `autograd.Function`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepeq.packing import Map

LinearSolve = Callable[[Map, Tensor], Tensor]
"""From `u -> J^T u` and `v` to (an approximation of) the `u` with `u = J^T u + v`."""


@dataclass(frozen=True)
class Rule:
    """What the backward pass of a node does."""

    solve: LinearSolve | None
    """Solves `u = J^T u + v`; None passes the gradient on as it is."""
    evaluate: Map | None = None
    """`f`, where its graph was not kept."""
    connected: bool = False
    """Whether `z` depends on the parameters through its own graph, which second derivatives need."""
    linear: bool = False
    """Whether this is the linear solve inside of a second derivative."""
    barrier: bool = False
    """Whether to refuse third derivatives."""
    products: Map | None = None
    """Products `J^T u` that replace those of the graph."""
    transposed: Map | None = None
    """The transposed products `J u` of `products`."""


class ImplicitFunction(torch.autograd.Function):
    """`z*` as a function of `f(z*)`: forward returns `z*`; backward turns `v = dl/dz*` into `u = (I - J^T)^{-1} v`.

    Autograd then sends `u` through the graph of `f(z*)` to all that it touches.
    """

    @staticmethod
    def forward(ctx: Any, fz: Tensor, z: Tensor, rule: Rule) -> Tensor:
        ctx.save_for_backward(fz, z)
        ctx.rule = rule
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (v,) = grad_outputs
        (fz, z), rule = ctx.saved_tensors, ctx.rule
        if rule.solve is None:
            return v, None, None
        twice = torch.is_grad_enabled()
        if twice and not (rule.connected or rule.linear):
            raise RuntimeError(
                "second derivatives of an equilibrium (create_graph=True) need "
                "ImplicitAdjoint(twice_differentiable=True); derivatives of third order are not supported"
            )
        if rule.evaluate is not None:
            with torch.enable_grad():
                z, before = z.detach().requires_grad_(), fz.detach()
                fz = rule.evaluate(z)
            if not _same(fz, before):
                raise RuntimeError(
                    "f changed between the forward and the backward pass (a parameter updated, another mask drawn), so "
                    "ImplicitAdjoint(checkpoint=True) cannot evaluate it again; run backward before changing anything"
                )
        with torch.no_grad():
            products = rule.products or _Products(fz, z)
            u = _solved(rule.solve, products, v)
        if twice and rule.linear:
            if rule.barrier:
                barrier = fz.clone()
                barrier.register_hook(_refuse_third_order)
                v = v + (barrier - barrier.detach())
            transposed = rule.transposed or _transposed_products(fz, z)
            linear = Rule(rule.solve, linear=True, products=transposed, transposed=products)
            return ImplicitFunction.apply(v, u, linear), None, None
        if twice:
            # u solves u = J^T u + v, again an equilibrium: it depends on v, and on the parameters and z* through J.
            u = u.requires_grad_()
            u = ImplicitFunction.apply(_product(fz, z, u) + v, u, Rule(rule.solve, linear=True, barrier=True))
        # Autograd adds J^T u to the gradient of a connected z; only the part that u does not cover may go on.
        return u, (v - u if rule.connected else None), None


def _same(fz: Tensor, before: Tensor) -> bool:
    """Whether two evaluations of `f` agree, problem by problem, as far as rounding allows."""
    if not before.numel():
        return True
    fz, before = fz.detach().nan_to_num(), before.nan_to_num()
    size = before.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(before.dtype).tiny)
    return torch.allclose(fz / size, before / size, rtol=1e-4, atol=1e-5)


def _solved(solve: LinearSolve, products: Map, v: Tensor) -> Tensor:
    try:
        return solve(products, v.detach())
    except RuntimeError as error:
        if "atching rule" not in str(error):
            raise
        raise NotImplementedError(
            "gradients in batches (is_grads_batched, or vectorize=True of torch.autograd.functional) cannot pass "
            "through an equilibrium; take them one by one (vectorize=False)"
        ) from error


def _refuse_third_order(gradient: Tensor) -> Tensor:
    raise RuntimeError("derivatives of an equilibrium of third order are not supported")


def _transposed_products(fz: Tensor, z: Tensor) -> Map:
    """Return `w -> J w`: the derivative of the linear map `u -> J^T u`."""
    u = torch.zeros_like(fz).requires_grad_()
    product = _product(fz, z, u)
    return lambda w: torch.autograd.grad(product, u, w, retain_graph=True, materialize_grads=True)[0]


class _Products:
    """`u -> J^T u` with `J = df/dz`, from the graph of `f(z)`."""

    def __init__(self, fz: Tensor, z: Tensor) -> None:
        self._fz, self._z, self._first = fz, z, True

    def __call__(self, u: Tensor) -> Tensor:
        if not self._first:
            return _product(self._fz, self._z, u)
        self._first = False
        watch = _LeafWatch()
        with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda tensor: tensor):
            value = _product(self._fz, self._z, u)
        watch.check()
        return value


class _LeafWatch:
    """Notices a nested backward pass, which would add each product of a solve to the gradients of parameters.

    A function that differentiates a graph of its own inside its backward saves tensors while it does so.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Tensor | None, int]] = []

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.is_leaf and tensor.requires_grad:
            gradient = tensor.grad
            self._seen.append((tensor, gradient, 0 if gradient is None else gradient._version))
        return tensor

    def check(self) -> None:
        for leaf, gradient, version in self._seen:
            now = leaf.grad
            if now is not gradient or (now is not None and now._version != version):
                raise RuntimeError(
                    "f runs a backward pass of its own inside its backward (an autograd.Function that calls "
                    "torch.autograd.backward), which a solve of many products would add up; let it use "
                    "torch.autograd.grad and return the gradients, or torch.utils.checkpoint with use_reentrant=False"
                )


def _product(fz: Tensor, z: Tensor, u: Tensor) -> Tensor:
    """Return `J^T u`, itself differentiable where gradients are enabled."""
    create = torch.is_grad_enabled()
    try:
        (gradient,) = torch.autograd.grad(fz, z, u, retain_graph=True, create_graph=create, materialize_grads=True)
    except RuntimeError as error:
        if "donated" in str(error):
            raise RuntimeError(
                "f was compiled for a single backward pass, but a backward solve makes many; set "
                "torch._functorch.config.donated_buffer = False before the compiled f runs for the first time"
            ) from error
        if "use_reentrant" in str(error):
            raise RuntimeError(
                "f uses reentrant checkpointing, which cannot give the products that a backward solve needs; call "
                "torch.utils.checkpoint.checkpoint with use_reentrant=False"
            ) from error
        raise
    return gradient
