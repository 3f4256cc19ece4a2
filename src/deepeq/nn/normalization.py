"""Weights of bounded or learned size: ordinary parametrizations of `torch.nn.utils.parametrize`, for any module."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from deepeq.checks import check_count

Module = TypeVar("Module", bound=nn.Module)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # their weight is (D_in, D_out, ...)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_NUM_VECTORS = 8
_FIRST_ROUNDS = 5


def weight_norm(module: Module, names: str | Iterable[str] | None = None) -> Module:
    """Parametrize weights as `W_i = g_i v_i / ||v_i||`, with a learned norm `g_i` for each output channel `i`.

    The parametrization is that of `torch.nn.utils.parametrizations.weight_norm`, and keeps the current weight. Its
    parameters are new ones: call this before the optimizer is built.

    Args:
        module: The module that holds the weights, at any depth. It is changed in place.
        names: Dotted names of the weights, as in `module.named_parameters()`. By default the `weight` of every linear
            and convolutional layer.

    Returns:
        `module`.

    Raises:
        ValueError: A name is not a weight `(D_out, D_in, ...)`, is parametrized already, or has a channel of zeros.

    References:
        Salimans, Kingma (2016), Weight normalization, NeurIPS, eq. 2.
    """
    weights = _find_weights(module, names)
    for owner, name, weight in weights:
        if is_parametrized(owner, name):
            raise ValueError(f"{name} of {_type_name(owner)} is parametrized already; weight_norm must come first")
        if weight.device.type != "meta" and bool((_as_matrix(weight, _output_dim(owner)) == 0).all(dim=1).any()):
            raise ValueError(f"{name} of {_type_name(owner)} has an output channel of zeros, which has no direction")
    for owner, name, _ in weights:
        parametrizations.weight_norm(owner, name, dim=_output_dim(owner))
    return module


def spectral_norm(
    module: Module,
    names: str | Iterable[str] | None = None,
    *,
    bound: float,
    clip: bool = True,
    num_steps: int = 3,
) -> Module:
    """Bound the spectral norm of weights: `W min(1, bound / sigma)`, or `W bound / sigma` without `clip`.

    `sigma` is the largest singular value of the weight, flattened to a matrix of one row per output channel. It is
    estimated from eight vectors in a buffer, which follow the first singular vectors while the weight is trained. The
    estimate is never above `sigma`, so the norm can exceed the bound by the error of the estimate. There is no error
    where the vectors span the space, `8 (num_steps + 1) >= D_out`. The gradient is that of `sigma` where the vectors
    have converged. `OncePerSolve` evaluates such weights once per solve.

    For a linear layer this bounds the Lipschitz constant. For a convolution with zero or circular padding it does so
    only up to a factor, the square root of the number of kernel positions (3 for a kernel of 3 x 3).
    `infinity_norm` bounds convolutions without a factor, in another norm.

    In training, each computation of the weight keeps the improved vectors. In evaluation mode it starts from the same
    vectors every time and keeps nothing, so that the weight does not change.

    Args:
        module: The module that holds the weights, at any depth. It is changed in place.
        names: Dotted names of the weights, as in `module.named_parameters()`. By default the `weight` of every linear
            and convolutional layer.
        bound: The largest spectral norm, > 0.
        clip: Leave a weight within the bound exactly as it is. Without it, every weight is scaled to the bound.
        num_steps: Products `W W^T u` with each vector, each time the weight is computed, >= 1.

    Returns:
        `module`.

    Raises:
        ValueError: An argument is out of range, or a name is not a weight `(D_out, D_in, ...)`.

    References:
        Miyato et al. (2018), Spectral normalization for generative adversarial networks, ICLR, section 2.1. Gouk et al.
        (2021), Regularisation of neural networks by enforcing Lipschitz continuity, Machine Learning 110 (the clip).
    """
    check_count("num_steps", num_steps, least=1)
    _check_bound(bound)
    for owner, name, weight in _find_weights(module, names):
        parametrization = _SpectralNorm(weight, bound, clip, _output_dim(owner), num_steps)
        register_parametrization(owner, name, parametrization)
    return module


def infinity_norm(
    module: Module, names: str | Iterable[str] | None = None, *, bound: float, clip: bool = True
) -> Module:
    """Bound the infinity norm of weights: scale each output channel's sum of absolute values to at most `bound`.

    With `clip`, row `i` becomes `W_i min(1, bound / ||W_i||_1)`, otherwise `W_i bound / ||W_i||_1`. The norm is exact,
    without buffers, and bounds the map in the largest absolute value of its components: `max |W x| <= bound max |x|`.
    That holds for convolutions too, whatever their padding.

    An implicit graph network `z = phi(W z A + b)` has exactly one equilibrium if `||W||_inf rho(|A|) < 1` and `phi`
    does not expand. Its authors project `W` onto that ball after each optimizer step. Here the scaling is part of the
    map, and gradients pass through it.

    Args:
        module: The module that holds the weights, at any depth. It is changed in place.
        names: Dotted names of the weights, as in `module.named_parameters()`. By default the `weight` of every linear
            and convolutional layer.
        bound: The largest sum of absolute values in a row, > 0.
        clip: Leave a row within the bound exactly as it is. Without it, every row is scaled to the bound.

    Returns:
        `module`.

    Raises:
        ValueError: `bound` is out of range, or a name is not a weight `(D_out, D_in, ...)`.

    References:
        Gu et al. (2020), Implicit graph neural networks, NeurIPS.
    """
    _check_bound(bound)
    for owner, name, _ in _find_weights(module, names):
        register_parametrization(owner, name, _InfinityNorm(bound, clip, _output_dim(owner)))
    return module


class _Bounded(nn.Module, ABC):
    """A weight that is scaled so that a norm of it is at most, or exactly, `bound`."""

    def __init__(self, bound: float, clip: bool, dim: int) -> None:
        super().__init__()
        self.bound, self.clip, self.dim = bound, clip, dim

    @abstractmethod
    def measure(self, matrix: Tensor) -> Tensor:
        """Return the norm of a matrix `(D_out, N)`, `(1,)`, or that of each row, `(D_out,)`."""

    def forward(self, weight: Tensor) -> Tensor:
        matrix = _as_matrix(weight, self.dim)
        with _full_precision(weight.device.type):
            size = self.measure(_at_least_float32(matrix))
            # Within the bound, the clipped scale is bound / bound, which is exactly 1 and has no gradient.
            least = self.bound if self.clip else torch.finfo(size.dtype).tiny ** 0.5
            scale = self.bound / size.clamp_min(least)
        shape = [1] * weight.ndim
        shape[self.dim] = -1
        return weight * scale.to(weight.dtype).view(shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return `weight`, from which a weight that satisfies the bound is computed unchanged."""
        return weight

    def extra_repr(self) -> str:
        return f"bound={self.bound}, clip={self.clip}"


class _SpectralNorm(_Bounded):
    vectors: Tensor  # (num_vectors, D_out), estimates of the first left singular vectors

    def __init__(self, weight: Tensor, bound: float, clip: bool, dim: int, num_steps: int) -> None:
        super().__init__(bound, clip, dim)
        self.num_steps = num_steps
        matrix = _at_least_float32(_as_matrix(weight.detach(), dim))
        # A generator of its own: what a model draws afterwards must not depend on how it is normalized.
        generator = torch.Generator(device="cpu").manual_seed(0)
        shape = min(_NUM_VECTORS, len(matrix)), len(matrix)
        vectors = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(matrix)
        with torch.no_grad():
            for _ in range(_FIRST_ROUNDS):
                vectors = _improve(matrix, vectors, num_steps)
        self.register_buffer("vectors", vectors.to(weight.dtype))

    def measure(self, matrix: Tensor) -> Tensor:
        with torch.no_grad():
            vectors = _improve(matrix, self.vectors.to(matrix.dtype), self.num_steps)
            if self.training:
                self.vectors.copy_(vectors)
        # The graph keeps `vectors`, not the buffer, which the next solve may change before this one's backward pass.
        return torch.linalg.vector_norm(vectors[0] @ matrix).view(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_steps={self.num_steps}"


class _InfinityNorm(_Bounded):
    def measure(self, matrix: Tensor) -> Tensor:
        return matrix.abs().sum(dim=1)


def _improve(matrix: Tensor, vectors: Tensor, num_steps: int) -> Tensor:
    """Return better estimates of the first left singular vectors of a matrix `(D_out, N)`, as orthonormal rows.

    They are the best combinations, those with the largest `||W^T u||`, of the given vectors `U` and of
    `A U, ..., A^k U` with `A = W W^T` (block Krylov, Rayleigh-Ritz), the best one first. A plain power iteration lags
    behind a trained weight, because training against a bound makes many singular values crowd there: no single vector
    stands out. Where the result is not finite the given vectors stay, so that one bad weight does not erase them.
    """
    blocks = [vectors]
    for _ in range(num_steps):
        blocks.append(functional.normalize((blocks[-1] @ matrix) @ matrix.T, dim=1))
    basis = torch.linalg.qr(torch.cat(blocks).T).Q.T  # (K, D_out)
    projected = basis @ matrix  # (K, N)
    gram = (
        (projected @ projected.T).double().nan_to_num(0.0, 0.0, 0.0)
    )  # the eigenvalue routine refuses what is no number
    best = torch.linalg.eigh(gram).eigenvectors[:, -len(vectors) :].flip(1)  # (K, num_vectors), ascending in the result
    improved = best.T.to(matrix.dtype) @ basis
    return torch.where(improved.isfinite().all(), improved, vectors)


def _find_weights(module: nn.Module, names: str | Iterable[str] | None) -> list[tuple[nn.Module, str, Tensor]]:
    """Return the owner, the name and the value of each weight. All are checked before the caller changes one."""
    if names is None:
        names = [f"{path}.weight".lstrip(".") for path, layer in module.named_modules() if isinstance(layer, _LAYERS)]
        if not names:
            raise ValueError(
                f"{_type_name(module)} has no linear or convolutional layer; give the names of its weights"
            )
    found = []
    for full_name in dict.fromkeys([names] if isinstance(names, str) else names):
        path, _, name = full_name.rpartition(".")
        try:
            owner = module.get_submodule(path)
            weight = getattr(owner, name)
        except AttributeError as error:
            raise ValueError(f"names has {full_name!r}, but {_type_name(module)} has no such tensor") from error
        registered = name in owner._parameters or name in owner._buffers or is_parametrized(owner, name)
        if not registered or weight is None or weight.ndim < 2 or not weight.is_floating_point():
            raise ValueError(
                f"names has {full_name!r}, which must be a real weight of two dimensions or more, (D_out, D_in, ...)"
            )
        found.append((owner, name, weight))
    return found


def _output_dim(owner: nn.Module) -> int:
    return 1 if isinstance(owner, _TRANSPOSED) else 0


def _as_matrix(weight: Tensor, dim: int) -> Tensor:
    return weight.movedim(dim, 0).flatten(1)  # (D_out, N)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _full_precision(device_type: str) -> Any:
    """No autocast: a norm from products of 16 bits would be off by a percent."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _check_bound(bound: float) -> None:
    if not 0.0 < bound < math.inf:
        raise ValueError(f"bound={bound!r} must be a number > 0")


def _type_name(module: nn.Module) -> str:
    return type(module).__name__
