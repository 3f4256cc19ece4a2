"""Products with the Jacobian of a map of packed states."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deepeq.norms import two_norm
from deepeq.packing import Map


class JacobianProduct:
    """Products `J v` with the Jacobian of one map `(B, N) -> (B, N)` at any number of points.

    A product is one evaluation of the map: in forward mode where the map allows it, else a difference of two values,
    one of them known. The first product decides which, at the cost of one to three extra evaluations. A map that leaves
    torch or detaches a part gives an incomplete tangent without an error; in 16 bits a difference is noise.
    """

    def __init__(self, g: Map) -> None:
        self._g = g
        self._forward_mode: bool | None = None

    def at(self, z: Tensor, gz: Tensor) -> Map:
        """Return the map `v -> J v` at `z`, where `gz = g(z)`."""

        def product(v: Tensor) -> Tensor:
            tangent = None if self._forward_mode is False else self._tangent(z, v)
            if self._forward_mode is None:
                self._forward_mode = tangent is not None and self._is_right(tangent, z, gz, v)
            return tangent if tangent is not None and self._forward_mode else self._difference(z, gz, v)

        return product

    def _is_right(self, tangent: Tensor, z: Tensor, gz: Tensor, v: Tensor) -> bool:
        difference = self._difference(z, gz, v)
        if _agree(tangent, difference) or not bool((difference != 0).any()):
            return True
        return not _agree(difference, self._difference(z, gz, v, factor=64.0))  # two differences tell noise

    def _tangent(self, z: Tensor, v: Tensor) -> Tensor | None:
        try:
            with self._quiet_at_first(), forward_ad.dual_level():
                return forward_ad.unpack_dual(self._g(forward_ad.make_dual(z, v))).tangent
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError):  # no formula, or a transform inside that does not nest
            return None

    @contextmanager
    def _quiet_at_first(self) -> Iterator[None]:
        """Hide torch's own deprecation warnings of its first use in a process."""
        if self._forward_mode is not None:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield

    def _difference(self, z: Tensor, gz: Tensor, v: Tensor, factor: float = 1.0) -> Tensor:
        # The step balances truncation against rounding where z and the second derivative are of order one.
        length, size = two_norm(v).unsqueeze(1), two_norm(z).unsqueeze(1).clamp_min(1.0)
        step = factor * torch.finfo(v.dtype).eps ** 0.5 * size / torch.where(length > 0, length, 1.0)
        return (self._g(torch.addcmul(z, v, step)) - gz) / step


def jacobian_product(g: Map, z: Tensor, gz: Tensor) -> Map:
    """Return the map `v -> J v`, in which `J` is the Jacobian of `g` at `z`.

    Args:
        g: A map of packed states `(B, N)`.
        z: The state, `(B, N)`.
        gz: The value `g(z)`, `(B, N)`.
    """
    return JacobianProduct(g).at(z, gz)


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two products are the same, as far as a difference can tell."""
    size = torch.maximum(two_norm(a), two_norm(b))
    near = two_norm(a - b) <= 0.1 * size
    return bool((near | ~torch.isfinite(size)).all())
