"""Dropout that keeps a map fixed while it is solved, and weight normalization.

The masks are drawn before a solve and held during it: an equilibrium exists only for a map that does not change
(Bai et al. 2019, NeurIPS, appendix E).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized, register_parametrization


def _check_fraction(p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p={p!r} must be in [0, 1): it is the fraction that is dropped")


def variational_mask(shape: Sequence[int], p: float, *, like: Tensor) -> Tensor:
    """Return independent entries, 0 with probability `p` and `1 / (1 - p)` otherwise, so that their mean is 1.

    Args:
        shape: Of the mask; a dimension of size 1 shares its entries.
        p: Fraction of zeros, in `[0, 1)`.
        like: Gives dtype and device; the device's default generator draws.

    Raises:
        ValueError: `p` is out of range.
    """
    _check_fraction(p)
    mask = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    return mask.bernoulli_(1.0 - p).div_(1.0 - p)


class _Dropout(nn.Module):
    """A fraction `p` that is dropped in training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        _check_fraction(p)
        self.p = p

    @property
    def drops(self) -> bool:
        """Whether anything is dropped now."""
        return self.training and self.p > 0.0

    def extra_repr(self) -> str:
        return f"p={self.p}"


class VariationalDropout(_Dropout):
    """One mask for all positions of a sequence (Gal & Ghahramani 2016, NeurIPS, section 4).

    A cell draws `mask` once, in `inject`, and multiplies by it at every evaluation.

    Args:
        p: Fraction of channels that are dropped in training, in `[0, 1)`.

    Raises:
        ValueError: `p` is out of range.
    """

    def mask(self, x: Tensor) -> Tensor | None:
        """Return a fresh mask `(B, 1, D)` for `x` `(B, T, D)`, or None where nothing is dropped."""
        if not self.drops:
            return None
        batch_size, _, channels = x.shape
        return variational_mask((batch_size, 1, channels), self.p, like=x)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(x)
        return x if mask is None else x * mask


class WeightDropout(_Dropout):
    """A weight `(D_out, D_in)` of which single entries are dropped in training, the others scaled by `1 / (1 - p)`.

    DropConnect, for recurrent weights as Merity et al. 2018 (ICLR, section 2) use it; a parametrization for
    `torch.nn.utils.parametrize`. A row that would lose all its entries keeps them unscaled, because weight
    normalization would otherwise divide by zero.

    Args:
        p: Fraction of entries that are dropped, in `[0, 1)`.

    Raises:
        ValueError: `p` is out of range.
    """

    def forward(self, weight: Tensor) -> Tensor:
        if not self.drops:
            return weight
        mask = variational_mask(weight.shape, self.p, like=weight)
        survives = mask.any(dim=1, keepdim=True)  # (D_out, 1)
        return weight * mask.masked_fill(~survives, 1.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return `weight`, from which the same weight is computed when nothing is dropped."""
        return weight


def regularize_weight(module: nn.Linear, *, weight_norm: bool, dropout: float) -> None:
    """Put weight normalization, weight dropout, or both on `module.weight`; with neither, leave it as it is.

    With both, the direction `v` is dropped before it is normalized (as TrellisNet does, Bai et al. 2019, ICLR): every
    row of the weight keeps its norm `g`. The weight's value at this call is kept, so initialize before it: a later
    in-place initialization of `module.weight` would fill a tensor that is thrown away. No row may be zero under
    weight normalization.

    Every access of `module.weight` computes it again, in training with a fresh mask. A cell therefore reads it
    once per solve, in `inject`, and passes the tensor on in the injection.

    Args:
        module: Layer whose `weight` is to be regularized.
        weight_norm: Normalize the rows.
        dropout: Fraction of entries dropped in training, in `[0, 1)`.

    Raises:
        ValueError: `dropout` is out of range, or the weight is parametrized already.
    """
    _check_fraction(dropout)
    if is_parametrized(module, "weight"):
        raise ValueError("module.weight is parametrized already: regularize_weight takes a plain weight, once")
    owner, name = module, "weight"
    if weight_norm:
        parametrizations.weight_norm(module, dim=0)
        owner, name = (
            module.get_submodule("parametrizations.weight"),
            "original1",
        )  # v, dropped before its norm is taken
    if dropout > 0.0:
        # `unsafe` only skips a trial evaluation, which would draw random numbers.
        register_parametrization(owner, name, WeightDropout(dropout), unsafe=True)
