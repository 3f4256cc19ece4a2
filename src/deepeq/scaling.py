"""Units: powers of two for states, and the scale and sign that make equations a fixed-point map."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepeq.norms import inner, safe_two_norm
from deepeq.packing import Map

_PROBES = 6
"""Most evaluations of the map; nearly always the first is enough."""


def power_of_two(size: Tensor) -> Tensor:
    """Return powers of two, at most twice as large as sizes; two where a size is zero or not finite."""
    size = torch.where(torch.isfinite(size) & (size > 0), size, 1.0)
    return torch.exp2(torch.frexp(size)[1].to(size.dtype))


def automatic_scale(g: Map, z0: Tensor, g0: Tensor) -> Tensor:
    """Return a factor `a` for each problem, `(B, 1)`, such that `z + a g(z)` is a sensible fixed-point map near `z0`.

    With `s` a short step along `g0 = g(z0)` and `y` the change of `g` over it, `|a| = ||s|| / ||y||`, and `a` has the
    opposite sign of `<s, y>`: where the Jacobian is a multiple of the identity, `z + a g(z)` is Newton's step. The
    factor of `c g` is `a / c`. The length of the step is relative to `z0`, or to one where `z0 = 0`. Where `g` is
    non-finite, a shorter step to the other side is tried, and where `y` is at rounding level, a longer one.

    Args:
        g: Map `(B, N) -> (B, N)`.
        z0: First point.
        g0: Its value, `g(z0)`, finite.
    """
    eps = torch.finfo(z0.dtype).eps
    norm, size = safe_two_norm(g0).unsqueeze(1), safe_two_norm(z0).unsqueeze(1)
    size = torch.where(size > 0, size, 1.0)
    direction = (g0 / torch.where(norm > 0, norm, 1.0)).to(g0.dtype)
    length = eps ** (1 / 3) * size
    # Where no probe tells, the first step shall be as long as z0.
    usable = (norm > 0) & torch.isfinite(norm)
    scale, settled = size / torch.where(usable, norm, size), ~usable
    growth = 1e3
    for _ in range(_PROBES):
        y = g(z0 + (length * direction).to(z0.dtype)) - g0
        change = safe_two_norm(y).unsqueeze(1)
        finite, flat = torch.isfinite(change), change <= 100 * eps * norm
        found = finite & ~flat & ~settled
        signed = torch.where(inner(direction, y).unsqueeze(1) > 0, -length, length)
        scale = torch.where(found, signed / torch.where(found, change, 1.0), scale)
        settled = settled | found
        if bool(settled.all()):
            break
        length = torch.where(finite, growth * length, -0.1 * length)
        growth = min(growth * growth, 1e12)
    return scale.to(z0.dtype)


def unit_of_gradients(product: Map, v: Tensor, z: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return powers of two that bring `u` near one, `(B, 1)`, or `(B, N)` for states of several parts.

    A part without a loss of its own gets the unit of the largest. Where the parts of `z` lie far apart, the gradient
    with respect to the large one is small and matters as much: its size is then seen in `J^T v`, for one product.

    Args:
        product: The map `u -> J^T u` of packed states.
        v: Gradient of the loss with respect to the state, `(B, N)`.
        z: The state, `(B, N)`.
        sizes: Number of components of each part of the state; their sum is N.
    """
    if not v.numel():
        return v.new_ones(len(v), 1)
    if len(sizes) < 2:
        return power_of_two(v.abs().amax(dim=1, keepdim=True))
    state, seen = _largest_of_parts(z, sizes), _largest_of_parts(v, sizes)  # (B, P)
    largest = seen.amax(dim=1, keepdim=True)
    unit = torch.where(seen > 0, seen, largest)
    state = torch.where(state > 0, state, state.amax(dim=1, keepdim=True))
    apart = state.amax(dim=1, keepdim=True) > 1e6 * state.amin(dim=1, keepdim=True)
    if bool(apart.any()):
        seen = torch.maximum(seen, _largest_of_parts(product(v), sizes))
        # Parts without a gradient get the size that the sizes of the state suggest, with a margin.
        expected = 1e-3 * state.amin(dim=1, keepdim=True) / state * seen.amax(dim=1, keepdim=True)
        unit = torch.where(apart, torch.maximum(seen, expected), unit)
    unit = power_of_two(unit)
    if not bool((unit != unit[:, :1]).any()):
        return unit[:, :1]
    columns = zip(unit.split(1, dim=1), (size for size in sizes if size), strict=True)
    return torch.cat([column.expand(-1, size) for column, size in columns], dim=1)


def _largest_of_parts(z: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.stack([part.abs().amax(dim=1) for part in z.split(list(sizes), dim=1) if part.shape[1]], dim=1)
