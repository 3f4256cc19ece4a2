"""How gradients pass through an equilibrium. This file holds the only `autograd.Function`."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint as recompute

from deepeq.iterate import Map, in_current_autocast, iterate
from deepeq.solution import ConvergenceError, ConvergenceWarning, Result, Solution
from deepeq.solvers import GMRES, Solver

LinearSolve = Callable[[Map, Tensor], Tensor]
"""From `u -> J^T u` and `v` to (an approximation of) the `u` with `u = J^T u + v`."""


class Adjoint(ABC):
    """A way to find an equilibrium and to make it differentiable.

    All of them return the same value, the solver's; they differ in its gradient. Gradients follow
    `torch.is_grad_enabled()`, and reach every tensor that `f` touches.
    """

    @abstractmethod
    def solve(self, f: Map, z0: Tensor, solver: Solver) -> Solution:
        """The Solution of `z = f(z)` for a packed state `(B, N)`, differentiable if gradients are enabled."""


@dataclass(frozen=True, kw_only=True)
class ImplicitAdjoint(Adjoint):
    """Exact gradients by the implicit function theorem: `dl/d(.) = u^T df/d(.)` at `z*`, with `u = J^T u + dl/dz*`.

    Between forward and backward lives one graph of `f` (at `z*`), whatever the number of steps. The backward solves the
    linear fixed point for `u` with products `J^T u` of that graph, then sends `u` through it once for the gradients of
    everything that `f` touches. The gradient is as exact as that solve, and as `z*` itself. The value does not depend
    on `z0`, which gets no gradient.

    Raises in the backward pass:
        ConvergenceError: a gradient or a product is not finite.
        RuntimeError: second derivatives are asked for without `twice_differentiable`.

    References:
        Bai, Kolter, Koltun (2019), theorem 1 and eq. 11.
    """

    solver: Solver = field(default_factory=GMRES)
    """Solver of the backward fixed point. Its `atol` is in units of the largest component of a sample's `dl/dz*`; under
    autocast its `rtol` is taken as at least twice the rounding of the 16-bit type, which products cannot go below."""
    callback: Callable[[Solution], None] | None = None
    """Receives the backward Solution (its value `u` packed as `(B, N)`); without it, a solve that stops short warns."""
    checkpoint: bool = False
    """Drop even the one graph, and evaluate `f` twice more in the backward pass."""
    twice_differentiable: bool = False
    """Allow second derivatives (`create_graph=True`), at the price of a second graph of `f`."""

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver={self.solver!r} of ImplicitAdjoint must be a Solver, such as GMRES()")
        if self.checkpoint and self.twice_differentiable:
            raise ValueError("checkpoint=True keeps no graph to differentiate twice; set twice_differentiable=False")

    def solve(self, f: Map, z0: Tensor, solver: Solver) -> Solution:
        backward, device_type = self.solver, z0.device.type
        if torch.is_autocast_enabled(device_type):
            floor = 2.0 * torch.finfo(torch.get_autocast_dtype(device_type)).eps
            backward = replace(backward, rtol=max(backward.rtol, floor))
        adjoint_solve = partial(self._adjoint_solve, backward)
        return _attach(f, _search(f, z0, solver), adjoint_solve, self.checkpoint, self.twice_differentiable)

    def _adjoint_solve(self, solver: Solver, product: Map, v: Tensor) -> Tensor:
        # The equation is linear: solved for v of size one, it does not lose small or large gradients to the range of
        # float32, and its tolerances do not depend on the scale of the loss.
        scale = v.abs().amax(dim=1, keepdim=True) if v.numel() else v.new_ones(v.shape[0], 1)
        scale = torch.where(scale > 0, scale, 1.0)
        v = v / scale
        solution = iterate(lambda u: product(u) + v, solver, torch.zeros_like(v), f_z0=v)
        solution = solution._replace(value=solution.value * scale)
        if solution.result is Result.NONFINITE:
            raise ConvergenceError(
                f"backward pass, product {first_nonfinite(solution)}: {solution.result.value}", solution
            )
        if self.callback is not None:
            self.callback(solution)
        elif solution.result is Result.MAX_STEPS:
            warnings.warn(
                "the backward solve of ImplicitAdjoint stopped at its step limit, so gradients are less exact than its "
                "rtol says; raise max_steps, loosen rtol (to 1e-2 where f works in 16 bits), or give a callback that "
                "looks at the residual",
                ConvergenceWarning,
                stacklevel=2,
            )
        return solution.value


@dataclass(frozen=True, kw_only=True)
class NeumannAdjoint(Adjoint):
    """Gradients from a Neumann series cut after `terms` terms, `u = v + J^T v + ...`, one product less than terms.

    Biased, and divergent in `terms` where the spectral radius of `J` exceeds one. One term is Jacobian-free
    backpropagation.

    References:
        Fung et al. (2022), JFB, AAAI 36. Geng et al. (2021), On training implicit models, NeurIPS, eq. 12.
    """

    terms: int = 1
    """Terms of the series, `v` included."""

    def __post_init__(self) -> None:
        _check_positive("terms", self.terms, self)

    def solve(self, f: Map, z0: Tensor, solver: Solver) -> Solution:
        return _attach(f, _search(f, z0, solver), self._adjoint_solve)

    def _adjoint_solve(self, product: Map, v: Tensor) -> Tensor:
        u = v
        for _ in range(self.terms - 1):
            u = product(u) + v
        return u


@dataclass(frozen=True, kw_only=True)
class PhantomAdjoint(Adjoint):
    """Gradients of a few damped steps taken at the equilibrium: `z <- damping z + (1 - damping) f(z)`, `steps` times.

    Biased and cheap: no backward solve, `steps` graphs of `f`. One undamped step is Jacobian-free backpropagation. The
    value stays the solver's.

    References:
        Geng et al. (2021), On training implicit models, NeurIPS, eq. 9 (unrolling-based phantom gradient).
    """

    steps: int = 1
    """Applications of `f` that are differentiated."""
    damping: float = 0.0
    """Share of the old iterate that a step keeps; 0 means none."""

    def __post_init__(self) -> None:
        _check_positive("steps", self.steps, self)
        if not 0.0 <= self.damping < 1.0:
            raise ValueError(f"damping={self.damping!r} of PhantomAdjoint must lie in [0, 1); 0 means none")

    def solve(self, f: Map, z0: Tensor, solver: Solver) -> Solution:
        solution = _search(f, z0, solver)
        if solution.result is Result.NONFINITE or not torch.is_grad_enabled():
            return solution
        z = solution.value
        for _ in range(self.steps):
            z = f(z).lerp(z, self.damping) if self.damping else f(z)
        # The phantom steps give the gradient alone: the value, and with it the residual, is the solver's.
        value = solution.value + (z - z.detach())
        return solution._replace(value=value, num_evals=solution.num_evals + self.steps)


@dataclass(frozen=True, kw_only=True)
class BackpropAdjoint(Adjoint):
    """Gradients by backpropagation through every step of the solver: memory grows with the steps.

    The oracle of tests, and an option where few steps are taken. `z0` gets a gradient too.
    """

    def solve(self, f: Map, z0: Tensor, solver: Solver) -> Solution:
        return iterate(f, solver, z0)


def _search(f: Map, z0: Tensor, solver: Solver) -> Solution:
    with torch.no_grad():
        solution = iterate(f, solver, z0.detach())
    if forward_ad.unpack_dual(solution.value).tangent is not None:
        raise NotImplementedError(
            "forward-mode derivatives of an equilibrium are supported by BackpropAdjoint only; use reverse mode"
        )
    if torch.is_autocast_enabled(z0.device.type):
        # Casts of parameters that autocast cached just now carry no graph; reused outside, they would lose gradients.
        torch.clear_autocast_cache()
    return solution._replace(value=solution.value.detach())


def _attach(
    f: Map,
    solution: Solution,
    adjoint_solve: LinearSolve,
    checkpoint: bool = False,
    twice: bool = False,
) -> Solution:
    """The solution with a differentiable value: one evaluation of `f` with a graph (two if `twice`)."""
    if solution.result is Result.NONFINITE or not torch.is_grad_enabled():
        return solution
    z = solution.value.requires_grad_()
    fz = recompute(f, z, use_reentrant=False) if checkpoint else f(z)
    solution = solution._replace(value=z.detach(), num_evals=solution.num_evals + 1)
    if not _needs_gradient(fz, z):
        return solution
    rule = _Rule(adjoint_solve, in_current_autocast(f, z.device.type) if checkpoint else None)
    if not twice:
        return solution._replace(value=_Equilibrium.apply(fz, z, rule))
    # The first value has right first derivatives only. Evaluating f there connects z* to its own dependence on the
    # parameters, and the second node's gradient, (u, v - u), then has right derivatives itself.
    first = _Equilibrium.apply(fz, z, _Rule(adjoint_solve, inner=True))
    value = _Equilibrium.apply(f(first), first, _Rule(adjoint_solve, connected=True))
    return solution._replace(value=value, num_evals=solution.num_evals + 1)


@dataclass(frozen=True)
class _Rule:
    solve: LinearSolve
    evaluate: Map | None = None  # f, where the graph was not kept
    connected: bool = False  # z has a history: the node answers for second derivatives
    inner: bool = False  # below a connected node, whose second derivatives do not pass here


class _Equilibrium(torch.autograd.Function):
    """`z*` as a function of `f(z*)`: forward returns `z*`; backward turns `v = dl/dz*` into `u = (I - J^T)^{-1} v`.

    Autograd then sends `u` through the graph of `f(z*)` to all that it touches.
    """

    @staticmethod
    def forward(ctx: Any, fz: Tensor, z: Tensor, rule: _Rule) -> Tensor:
        ctx.save_for_backward(fz, z)
        ctx.rule = rule
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (v,) = grad_outputs
        (fz, z), rule = ctx.saved_tensors, ctx.rule
        twice = torch.is_grad_enabled() and not rule.inner
        if twice and not rule.connected:
            raise RuntimeError(
                "second derivatives of an equilibrium (create_graph=True) need "
                "ImplicitAdjoint(twice_differentiable=True); derivatives of third order are not supported"
            )
        if rule.evaluate is not None:
            with torch.enable_grad():
                z, before = z.detach().requires_grad_(), fz.detach()
                fz = rule.evaluate(z)
            size = float(before.abs().max()) if before.numel() else 0.0
            if not torch.allclose(fz, before, rtol=1e-4, atol=1e-5 * size):
                raise RuntimeError(
                    "f changed between the forward and the backward pass (a parameter updated, a mask drawn anew), so "
                    "ImplicitAdjoint(checkpoint=True) cannot evaluate it again; run backward before changing anything"
                )
        with torch.no_grad():
            u = rule.solve(lambda u: _product(fz, z, u), v.detach())
        if twice:
            # u solves u = J^T u + v, again an equilibrium: it depends on v, and on the parameters and z* through J.
            u = u.requires_grad_()
            u = _Equilibrium.apply(_product(fz, z, u) + v, u, _Rule(rule.solve))
        # Autograd adds J^T u to the gradient of a connected z; only the part that u does not cover may go on.
        return u, (v - u if rule.connected else None), None


def _product(fz: Tensor, z: Tensor, u: Tensor) -> Tensor:
    """`J^T u` with `J = df/dz`, from the graph of `f(z)`; itself differentiable where gradients are enabled."""
    create = torch.is_grad_enabled()
    try:
        (gradient,) = torch.autograd.grad(fz, z, u, retain_graph=True, create_graph=create, materialize_grads=True)
    except RuntimeError as error:
        if "donated" not in str(error):
            raise
        raise RuntimeError(
            "f was compiled for a single backward pass, but a backward solve makes many; set "
            "torch._functorch.config.donated_buffer = False before the compiled f runs for the first time"
        ) from error
    return gradient


def _needs_gradient(fz: Tensor, z: Tensor) -> bool:
    """Whether anything besides `z` wants a gradient through `fz`."""
    pending, seen = [fz.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # only the nodes of leaves have one
        if leaf is not None and leaf is not z:
            return True
        pending += [parent for parent, _ in node.next_functions]
    return False


def first_nonfinite(solution: Solution) -> int:
    """The step, counted from one, at which the first sample broke."""
    return 1 + int(torch.isnan(solution.trace).any(dim=1).int().argmax())


def _check_positive(name: str, value: int, owner: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} of {type(owner).__name__} must be a whole number >= 1")
