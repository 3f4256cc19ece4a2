"""Measures of how contractive a map is at a point, and a penalty that makes it more so."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from deepeq.norms import inner, two_norm
from deepeq.packing import Packing

Generators = torch.Generator | Sequence[torch.Generator]
"""Sources of random numbers: one for a batch, or one for each sample, which is then independent of its batch mates."""


def jacobian_penalty(
    f: Callable[[Any], Any],
    z: Any,
    *,
    form: Literal["hutchinson", "first_order"] = "first_order",
    num_probes: int = 1,
    step: float = 0.05,
    generator: Generators | None = None,
) -> Tensor:
    """Estimate of `||J||_F^2 / N` at `z`, averaged over the batch; a differentiable scalar. `J` is `df/dz`, `(N, N)`.

    `hutchinson` averages `||J^T v||^2` over normal vectors `v`, which needs second derivatives of `f`. `first_order`
    uses that `||J v||^2` has the same mean, and takes `J v` as `(f(z + h v) - f(z)) / h` with `h = step ||z|| /
    ||v||`: ordinary backpropagation, about half the time, and any attention kernel will do.

    Args:
        f: The map, as in `fixed_point`.
        z: A state, usually the equilibrium; it is detached, so that the penalty shapes `f` alone.
        form: The estimator.
        num_probes: Number of random vectors.
        step: Length of the finite difference relative to `z`; 0.05 to 0.1 when `f` works in bfloat16.
        generator: Source of the random vectors, or one for each sample.

    Raises:
        ValueError: an argument is out of range.

    References:
        Bai, Koltun, Kolter (2021), Stabilizing equilibrium models by Jacobian regularization, ICML, eq. 8.
    """
    if form not in ("hutchinson", "first_order"):
        raise ValueError(f"form={form!r} must be 'hutchinson' or 'first_order'")
    if not isinstance(num_probes, int) or num_probes < 1 or not 0.0 < step < 1.0:
        raise ValueError(f"num_probes={num_probes!r} must be a whole number >= 1 and step={step!r} lie in (0, 1)")
    packing = Packing(z)
    point = packing.pack(z, "z").detach()
    mapped = _packed(f, packing)
    product = _transposed_product(mapped, point) if form == "hutchinson" else _difference(mapped, point, step)
    total = point.new_zeros(())
    for _ in range(num_probes):
        v = _normal(point, generator)
        column = product(v, torch.is_grad_enabled())
        total = total + inner(column, column).sum()
    return total / max(1, num_probes * point.numel())


def spectral_radius(
    f: Callable[[Any], Any], z: Any, *, num_steps: int = 50, generator: torch.Generator | None = None
) -> Tensor:
    """Estimate of the spectral radius of `df/dz` at `z` for each sample, `(B,)`.

    Power iteration on `J^T`; the estimate is the geometric mean growth `||J^T v|| / ||v||` over the second half of
    the steps. A Rayleigh quotient would give 0 for a rotation; the growth of the norm gives its modulus. Above one,
    plain iteration diverges from the equilibrium.

    Raises:
        ValueError: `num_steps` is below 2.
    """
    if not isinstance(num_steps, int) or num_steps < 2:
        raise ValueError(f"num_steps={num_steps!r} must be a whole number >= 2")
    packing = Packing(z)
    point = packing.pack(z, "z").detach()
    product = _transposed_product(_packed(f, packing), point)
    v = torch.randn(point.shape, dtype=point.dtype, device=point.device, generator=generator)
    v = v / two_norm(v).unsqueeze(1)
    log_growth = point.new_zeros(point.shape[0])
    counted = num_steps - num_steps // 2
    for step in range(num_steps):
        v = product(v, False)
        growth = two_norm(v)
        v = v / growth.clamp_min(torch.finfo(v.dtype).tiny).unsqueeze(1)
        if step >= num_steps - counted:
            log_growth = log_growth + growth.log() / counted
    return log_growth.exp()


def _normal(point: Tensor, generator: Generators | None) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(point.shape, dtype=point.dtype, device=point.device, generator=generator)
    if len(generator) != len(point):
        raise ValueError(f"generator has {len(generator)} entries for a batch of {len(point)}; give one a sample")
    rows = [torch.randn(point.shape[1:], dtype=point.dtype, device=point.device, generator=g) for g in generator]
    return torch.stack(rows) if rows else torch.zeros_like(point)


def _packed(f: Callable[[Any], Any], packing: Packing) -> Callable[[Tensor], Tensor]:
    return lambda flat: packing.pack(f(packing.unpack(flat)))


def _difference(f: Callable[[Tensor], Tensor], point: Tensor, step: float) -> Callable[[Tensor, bool], Tensor]:
    """`v, _ -> J v` at a point, as a difference of two evaluations; differentiable where gradients are enabled."""
    fz, size = f(point), two_norm(point)
    size = torch.where(size > 0, size, point.shape[1] ** 0.5)  # at the origin: one a component

    def product(v: Tensor, create_graph: bool) -> Tensor:
        h = (step * size / two_norm(v)).unsqueeze(1)
        return (f(point + h * v) - fz) / h

    return product


def _transposed_product(f: Callable[[Tensor], Tensor], point: Tensor) -> Callable[[Tensor, bool], Tensor]:
    """`v, create_graph -> J^T v` at a point, from one graph of `f`."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("Jacobian products need gradients; call this outside torch.inference_mode()")
    with torch.enable_grad():
        point = point.requires_grad_()
        fz = f(point)

    def product(v: Tensor, create_graph: bool) -> Tensor:
        if not fz.requires_grad:  # f is constant
            return torch.zeros_like(v)
        (value,) = torch.autograd.grad(
            fz, point, v, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )
        return value

    return product
