"""Measures of how contractive a map is at a point, how wrong an equilibrium may be, and a penalty on the Jacobian."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from deepeq.checks import check_count
from deepeq.jacobian import jacobian_product
from deepeq.norms import inner, safe_two_norm, two_norm
from deepeq.packing import Packing

Generators = torch.Generator | Sequence[torch.Generator]
"""Sources of random numbers: one for a batch, or one for each problem, which is then independent of its batch mates."""


def jacobian_penalty(
    f: Callable[[Any], Any],
    z: Any,
    *,
    form: Literal["hutchinson", "first_order"] = "first_order",
    num_probes: int = 1,
    step: float = 0.05,
    generator: Generators | None = None,
    batch_dims: int = 1,
    segments: Tensor | None = None,
) -> Tensor:
    """Return an estimate of `||J||_F^2 / N` at `z`, averaged over the problems; a differentiable scalar.

    `J` is `df/dz` of one problem, `(N, N)`. `hutchinson` averages `||J^T v||^2` over normal vectors `v`, which needs
    second derivatives of `f`. `first_order` uses that `||J v||^2` has the same mean, and takes `J v` as
    `(f(z + h v) - f(z)) / h` with `h = step ||z|| / ||v||`: ordinary backpropagation, about half the time, and any
    attention kernel will do.

    Args:
        f: The map, as in `fixed_point`.
        z: A state, usually the equilibrium; it is detached, so that the penalty shapes `f` alone.
        form: The estimator.
        num_probes: Number of random vectors.
        step: Length of the finite difference relative to `z`; 0.05 to 0.1 when `f` works in bfloat16.
        generator: Source of the random vectors, or one for each problem.
        batch_dims: Number of leading dimensions that index independent problems, as in `fixed_point`.
        segments: Problem of each row, as in `fixed_point`.

    Raises:
        ValueError: An argument is out of range.

    References:
        Bai, Koltun, Kolter (2021), Stabilizing equilibrium models by Jacobian regularization, ICML, eq. 8.
    """
    if form not in ("hutchinson", "first_order"):
        raise ValueError(f"form={form!r} must be 'hutchinson' or 'first_order'")
    check_count("num_probes", num_probes, least=1)
    if not 0.0 < step < 1.0:
        raise ValueError(f"step={step!r} must lie in (0, 1)")
    packing = Packing(z, batch_dims, segments)
    point, mask = packing.pack(z, "z").detach(), packing.mask()
    mapped = _packed(f, packing)
    product = _transposed_product(mapped, point) if form == "hutchinson" else _difference(mapped, point, step)
    total = point.new_zeros(())
    for _ in range(num_probes):
        column = product(_normal(point, mask, generator), torch.is_grad_enabled())
        total = total + inner(column, column).sum()
    entries = point.numel() if mask is None else int(mask.sum())
    return total / max(1, num_probes * entries)


def spectral_radius(
    f: Callable[[Any], Any],
    z: Any,
    *,
    num_steps: int = 50,
    generator: torch.Generator | None = None,
    batch_dims: int = 1,
    segments: Tensor | None = None,
) -> Tensor:
    """Return an estimate of the spectral radius of `df/dz` at `z` for each problem, `(B,)`.

    Power iteration on `J^T`; the estimate is the geometric mean growth `||J^T v|| / ||v||` over the second half of
    the steps. A Rayleigh quotient would give 0 for a rotation; the growth of the norm gives its modulus. Above one,
    plain iteration diverges from the equilibrium.

    Args:
        f: The map, as in `fixed_point`.
        z: A state, usually the equilibrium.
        num_steps: Number of products with `J^T`.
        generator: Source of the first vector.
        batch_dims: Number of leading dimensions that index independent problems, as in `fixed_point`. Give 0 for a
            coupled state, such as that of a graph: its rows have no spectral radius of their own.
        segments: Problem of each row, as in `fixed_point`.

    Raises:
        ValueError: `num_steps` is below 2.
    """
    check_count("num_steps", num_steps, least=2)
    packing = Packing(z, batch_dims, segments)
    point = packing.pack(z, "z").detach()
    product = _transposed_product(_packed(f, packing), point)
    v = _unit_vectors(point, packing.mask(), generator)
    log_growth = point.new_zeros(point.shape[0])
    counted = num_steps - num_steps // 2
    for step in range(num_steps):
        v = product(v, False)
        growth = two_norm(v)
        v = v / growth.clamp_min(torch.finfo(v.dtype).tiny).unsqueeze(1)
        if step >= num_steps - counted:
            log_growth = log_growth + growth.log() / counted
    return packing.per_problem(log_growth.exp())


def smallest_singular_value(
    f: Callable[[Any], Any],
    z: Any,
    *,
    num_steps: int = 50,
    generator: torch.Generator | None = None,
    batch_dims: int = 1,
    segments: Tensor | None = None,
) -> Tensor:
    """Return an estimate of the smallest singular value of `I - J` at `z` for each problem, `(B,)`.

    It says what a residual is worth. Near an equilibrium `z*`, and with `sigma` for this number,

        ||z - z*|| <= ||f(z) - z|| / sigma,    ||u - u*|| <= ||J^T u + v - u|| / sigma,

    where the second holds for the backward solve, whose residual `ImplicitAdjoint(callback=...)` receives.

    Golub-Kahan bidiagonalization with full orthogonalization, without the matrix: `num_steps` products with `J` and as
    many with `J^T`, which needs `2 num_steps` vectors of the size of a state. The estimate is never too small, up to
    the precision of the products; it is exact from `num_steps = N` on, and close long before where few singular values
    are small.

    Args:
        f: The map, as in `fixed_point`.
        z: A state, usually the equilibrium.
        num_steps: Dimension of the search space.
        generator: Source of the first vector.
        batch_dims: Number of leading dimensions that index independent problems, as in `fixed_point`.
        segments: Problem of each row, as in `fixed_point`.

    Raises:
        ValueError: `num_steps` is below 1.

    References:
        Golub and Kahan (1965), J. SIAM Numer. Anal. 2. Paige (1974), SIAM J. Numer. Anal. 11.
    """
    check_count("num_steps", num_steps, least=1)
    packing = Packing(z, batch_dims, segments)
    point = packing.pack(z, "z").detach()
    mapped, mask = _packed(f, packing), packing.mask()
    transposed = _transposed_product(mapped, point)
    with torch.no_grad():
        product = jacobian_product(mapped, point, mapped(point))
        v = _unit_vectors(point, mask, generator)
        right, left = [v], [v - product(v)]
        diagonal, above = [two_norm(left[0]).double()], []
        left[0] = _divided(left[0], diagonal[0])
        for _ in range(min(num_steps, point.shape[1]) - 1):
            w = _orthogonal(left[-1] - transposed(left[-1], False), right)
            above.append(two_norm(w).double())
            right.append(_divided(w, above[-1]))
            p = _orthogonal(right[-1] - product(right[-1]), left)
            diagonal.append(two_norm(p).double())
            left.append(_divided(p, diagonal[-1]))
        alpha = torch.stack(diagonal, dim=1)  # (B, k)
        # A space that was complete early has no further directions: their columns are zero, and must not count.
        ended = torch.stack([two_norm(v) < 0.5 for v in right], dim=1)
        bidiagonal = torch.diag_embed(torch.where(ended, alpha.amax(dim=1, keepdim=True), alpha))  # (B, k, k)
        if above:
            bidiagonal = bidiagonal + torch.diag_embed(torch.stack(above, dim=1), offset=1)
        smallest = torch.linalg.svdvals(bidiagonal)[:, -1]
    return packing.per_problem(smallest.to(point.dtype))


def error_bound(
    f: Callable[[Any], Any],
    z: Any,
    *,
    smallest: Tensor | None = None,
    num_steps: int = 50,
    generator: torch.Generator | None = None,
    batch_dims: int = 1,
    segments: Tensor | None = None,
) -> Tensor:
    """Return how far `z` may be from the equilibrium, `||f(z) - z|| / sigma` for each problem, `(B,)`.

    `sigma` is the smallest singular value of `I - J` at `z`. With its exact value this bounds the error to first order:
    `f` must be close to linear between `z` and the equilibrium. The estimate of `smallest_singular_value` is exact for
    `num_steps >= N`; with fewer steps it can be too large, and this number too small. For a root of `g`, pass
    `lambda z: z + g(z)`; for a `DEQ`, the map of `layer.prepare(x)`. Norms are those of all parts of a state together.

    Args:
        f: The map, as in `fixed_point`.
        z: A state near an equilibrium.
        smallest: The smallest singular values, where they are known; else they are estimated.
        num_steps: Dimension of the search space of the estimate.
        generator: Source of its first vector.
        batch_dims: Number of leading dimensions that index independent problems, as in `fixed_point`.
        segments: Problem of each row, as in `fixed_point`.
    """
    if smallest is None:
        smallest = smallest_singular_value(
            f, z, num_steps=num_steps, generator=generator, batch_dims=batch_dims, segments=segments
        )
    packing = Packing(z, batch_dims, segments)
    with torch.no_grad():
        point = packing.pack(z, "z")
        distance = safe_two_norm(packing.pack(f(packing.unpack(point))) - point)
    bound = packing.per_problem(distance).to(point.dtype) / smallest
    return torch.where(smallest > 0, bound, torch.inf)


def _unit_vectors(point: Tensor, mask: Tensor | None, generator: torch.Generator | None) -> Tensor:
    v = _normal(point, mask, generator)
    return v / two_norm(v).clamp_min(torch.finfo(v.dtype).tiny).unsqueeze(1)


def _divided(v: Tensor, norm: Tensor) -> Tensor:
    """Return vectors divided by their norms, or zero where the norm is at rounding level."""
    negligible = norm <= 100 * torch.finfo(v.dtype).eps
    return v * torch.where(negligible, 0.0, 1.0 / torch.where(negligible, 1.0, norm)).to(v.dtype).unsqueeze(1)


def _orthogonal(w: Tensor, basis: list[Tensor]) -> Tensor:
    """Return what is left of `w` beside an orthonormal basis."""
    for _ in range(2):  # once is not enough in finite precision
        for v in basis:
            w = torch.addcmul(w, v, inner(v, w).unsqueeze(1), value=-1)
    return w


def _normal(point: Tensor, mask: Tensor | None, generator: Generators | None) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        v = torch.randn(point.shape, dtype=point.dtype, device=point.device, generator=generator)
    elif len(generator) != len(point):
        raise ValueError(f"generator has {len(generator)} entries for {len(point)} problems; give one per problem")
    else:
        rows = [torch.randn(point.shape[1:], dtype=point.dtype, device=point.device, generator=g) for g in generator]
        v = torch.stack(rows) if rows else torch.zeros_like(point)
    return v if mask is None else v * mask


def _packed(f: Callable[[Any], Any], packing: Packing) -> Callable[[Tensor], Tensor]:
    return lambda flat: packing.pack(f(packing.unpack(flat)))


def _difference(f: Callable[[Tensor], Tensor], point: Tensor, step: float) -> Callable[[Tensor, bool], Tensor]:
    """Return `v, _ -> J v` at a point, from two evaluations; differentiable where gradients are enabled."""
    fz, size = f(point), two_norm(point)
    size = torch.where(size > 0, size, point.shape[1] ** 0.5)  # at the origin: one a component

    def product(v: Tensor, create_graph: bool) -> Tensor:
        h = (step * size / two_norm(v)).unsqueeze(1)
        return (f(point + h * v) - fz) / h

    return product


def _transposed_product(f: Callable[[Tensor], Tensor], point: Tensor) -> Callable[[Tensor, bool], Tensor]:
    """Return `v, create_graph -> J^T v` at a point, from one graph of `f`."""
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
