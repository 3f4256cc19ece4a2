"""A state of any structure as one `(B, N)` tensor: solvers see nothing else."""

import copy
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import (
    _pytree as pytree,
)  # the tree library that torch itself uses; it has no public name yet

from deepeq.checks import check_count
from deepeq.norms import safe_two_norm
from deepeq.solution import Solution

Map = Callable[[Tensor], Tensor]
"""A map of packed states, `(B, N) -> (B, N)`."""
NormName = Literal["parts", "whole", "positions"]
Norm = NormName | Callable[[Any], Tensor]
"""What is compared with the tolerances. Each kind gives one or several numbers per problem; the worst one counts.

- `"parts"`: the two-norm of each tensor of a state, so that a tensor of large numbers cannot hide a wrong small one.
- `"whole"`: the two-norm of all tensors together.
- `"positions"`: the two-norm over the last dimension, at every position of the other dimensions.
- A function of a state that returns non-negative numbers, one or several per problem. It is called for `f(z) - z` and
  for `f(z)`.
"""


class Packing:
    """The structure, shapes and dtypes of a state, and the way to a `(B, N)` tensor and back.

    A state is a tensor, or a tuple, list or dict of them (nested if need be). `batch_dims` or `segments` tells
    which of its entries belong to one problem:

    - `batch_dims=1`: each tensor is `(B, ...)`, for `B` independent problems. A tensor without dimensions is a batch of
      one.
    - `batch_dims=k` with `k >= 2`: the first `k` dimensions index the problems, which all tensors share.
    - `batch_dims=0`: the whole state is one problem; tensors may have any shapes.
    - `segments`, an integer tensor `(R,)`: row `r` of each tensor `(R, ...)` belongs to problem `segments[r]`. Problems
      of fewer rows are padded with zeros to the size of the largest, which costs memory where sizes differ much.

    Complex numbers are packed as pairs of real ones. The packed dtype is float32 or wider, so that the algebra of a
    solver keeps its precision when `f` works in 16 bits.

    Args:
        z0: A state with the structure, the shapes and the dtypes.
        batch_dims: Number of leading dimensions that index the problems.
        segments: Problem of each row, or None.

    Raises:
        TypeError: A part of `z0` is not a floating-point or complex tensor, or `segments` is not an integer tensor.
        ValueError: `z0` is empty, its parts disagree on the batch or the device, or `segments` does not fit.
    """

    def __init__(self, z0: Any, batch_dims: int = 1, segments: Tensor | None = None) -> None:
        if isinstance(z0, Solution):
            raise TypeError("z0 is a Solution; give its .value")
        leaves, self.structure = pytree.tree_flatten(z0)
        if not leaves:
            raise ValueError("z0 holds no tensor; give a tensor of shape (B, ...) or a tuple or dict of them")
        for leaf in leaves:
            _check_leaf(leaf)
        self._skeleton = pytree.tree_unflatten([None] * len(leaves), self.structure)
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.dtype = torch.float32
        for dtype in self.dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype.to_real())
        if len({leaf.device for leaf in leaves}) > 1:
            raise ValueError(
                f"the tensors of z0 must be on one device, got {sorted({str(leaf.device) for leaf in leaves})}"
            )
        self.device_type = leaves[0].device.type
        self._num_leading = batch_dims if segments is None else 1
        self._rows: Tensor | None = None  # where each row of a ragged state goes, (R,)
        if segments is None:
            self.batch_shape = self._leading_shape(batch_dims)
            self.batch_size = prod(self.batch_shape)
            self._row_sizes = [prod(shape[len(self.batch_shape) :]) for shape in self._batched_shapes(batch_dims)]
            self._rows_per_problem = 1
        else:
            self._place_rows(segments, batch_dims, leaves[0].device)
        pairs = [2 if dtype.is_complex else 1 for dtype in self.dtypes]
        self._row_sizes = [size * pair for size, pair in zip(self._row_sizes, pairs, strict=True)]
        self.sizes = [size * self._rows_per_problem for size in self._row_sizes]

    def _leading_shape(self, batch_dims: int) -> tuple[int, ...]:
        check_count("batch_dims", batch_dims, least=0)
        if batch_dims == 0:
            return (1,)
        leading = {tuple(shape[:batch_dims]) if len(shape) or batch_dims > 1 else (1,) for shape in self.shapes}
        if len(leading) > 1 or len(next(iter(leading))) < batch_dims:
            first = "the batch dimension" if batch_dims == 1 else f"the first {batch_dims} dimensions"
            raise ValueError(
                f"the tensors of z0 must share {first}, got shapes {[tuple(shape) for shape in self.shapes]}; "
                "batch_dims=0 makes the state one problem"
            )
        return leading.pop()

    def _batched_shapes(self, batch_dims: int) -> list[tuple[int, ...]]:
        return [(1, *shape) if batch_dims == 0 or not shape else tuple(shape) for shape in self.shapes]

    def _place_rows(self, segments: Tensor, batch_dims: int, device: torch.device) -> None:
        if not isinstance(segments, Tensor) or segments.dtype not in _INTEGERS:
            kind = segments.dtype if isinstance(segments, Tensor) else type(segments).__name__
            raise TypeError(f"segments must be an integer tensor with the problem of each row, not {kind}")
        if batch_dims != 1:
            raise ValueError(f"batch_dims={batch_dims!r} and segments both say what a problem is; give one of them")
        num_rows = len(segments) if segments.ndim == 1 else -1
        if any(not shape or shape[0] != num_rows for shape in self.shapes):
            raise ValueError(
                f"segments has shape {tuple(segments.shape)}, but the tensors of z0 have shapes "
                f"{[tuple(shape) for shape in self.shapes]}; give one problem index per row"
            )
        segments = segments.to(device=device, dtype=torch.int64)
        if num_rows and not 0 <= int(segments.min()) <= int(segments.max()) <= 4 * num_rows + 1024:
            raise ValueError(
                f"segments holds {int(segments.min())} to {int(segments.max())} for {num_rows} rows; count problems "
                "from 0, without large gaps"
            )
        counts = torch.bincount(segments) if num_rows else segments.new_zeros(1)
        order = torch.argsort(segments, stable=True)
        first = counts.cumsum(0) - counts  # in the sorted order
        self.batch_size, self._rows_per_problem = len(counts), max(1, int(counts.max()))
        self.batch_shape = (self.batch_size,)
        position = torch.empty_like(order)
        position[order] = torch.arange(num_rows, device=device) - first[segments[order]]
        self._rows = segments * self._rows_per_problem + position
        self._row_sizes = [prod(shape[1:]) for shape in self.shapes]

    def pack(self, state: Any, source: str = "f") -> Tensor:
        """Return the state as one tensor `(B, N)`; `source` names who made it in the error.

        Raises:
            ValueError: The structure or a shape differs from that of `z0`.
            TypeError: A part is not a floating-point tensor, or is complex where `z0` is real.
        """
        leaves, structure = pytree.tree_flatten(_in_order_of(self._skeleton, state))
        if structure != self.structure or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise ValueError(
                f"{source} returned a state of another structure than z0: return {self._describe()}, or give a z0 like "
                f"the state, got {type(state).__name__}"
            )
        for leaf, shape, dtype in zip(leaves, self.shapes, self.dtypes, strict=True):
            if leaf.shape != shape:
                raise ValueError(
                    f"{source} returned shape {tuple(leaf.shape)} for a state of shape {tuple(shape)}; "
                    "a fixed point needs a map of a space into itself"
                )
            if leaf.is_complex() and not dtype.is_complex:
                raise TypeError(f"{source} returned dtype {leaf.dtype} for a real state; start from a complex z0")
            if not leaf.is_floating_point() and not leaf.is_complex():
                raise TypeError(f"{source} returned dtype {leaf.dtype}; a state must be floating point or complex")
        flat = [self._pack_part(*part) for part in zip(leaves, self.dtypes, self._row_sizes, strict=True)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)  # (B, N)

    def _pack_part(self, leaf: Tensor, dtype: torch.dtype, row_size: int) -> Tensor:
        if dtype.is_complex:
            # Not view_as_real, which refuses conjugates and odd offsets.
            leaf = leaf if leaf.is_complex() else leaf.to(dtype)
            leaf = torch.stack((leaf.real, leaf.imag), dim=-1)
        if self._rows is None:
            return leaf.reshape(self.batch_size, row_size).to(self.dtype)
        rows = leaf.reshape(len(self._rows), row_size).to(self.dtype)
        padded = rows.new_zeros(self.batch_size * self._rows_per_problem, row_size).index_copy(0, self._rows, rows)
        return padded.reshape(self.batch_size, self._rows_per_problem * row_size)

    def unpack(self, flat: Tensor) -> Any:
        """Return the `(B, N)` tensor as a state with the structure, shapes and dtypes of `z0`."""
        parts = flat.split(self.sizes, dim=1) if len(self.sizes) > 1 else [flat]
        leaves = [
            self._unpack_part(*part) for part in zip(parts, self.shapes, self.dtypes, self._row_sizes, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.structure)

    def _unpack_part(self, part: Tensor, shape: torch.Size, dtype: torch.dtype, row_size: int) -> Tensor:
        if self._rows is not None:
            part = part.reshape(self.batch_size * self._rows_per_problem, row_size)[self._rows]
        if dtype.is_complex:
            return torch.complex(*part.reshape(*shape, 2).unbind(dim=-1)).to(dtype)
        return part.reshape(shape).to(dtype)

    @property
    def resolution(self) -> float:
        """Relative rounding of the coarsest dtype that `f` works in."""
        dtypes = [dtype.to_real() for dtype in self.dtypes]
        if torch.is_autocast_enabled(self.device_type):
            dtypes.append(torch.get_autocast_dtype(self.device_type))
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    @property
    def is_batch(self) -> bool:
        """Whether the first dimension of every tensor indexes the problems."""
        return self._rows is None and self._num_leading == 1 and all(self.shapes)

    def with_batch(self, batch_size: int) -> "Packing":
        """Return the packing of a batch of another size."""
        other = copy.copy(self)
        other.shapes = [torch.Size((batch_size, *shape[1:])) for shape in self.shapes]
        other.batch_size, other.batch_shape = batch_size, (batch_size,)
        return other

    @property
    def copies(self) -> bool:
        """Whether `pack` always makes a new tensor; else it may return the state itself."""
        return self._rows is not None or len(self.sizes) > 1 or self.dtypes[0] != self.dtype

    def mask(self) -> Tensor | None:
        """Return a boolean mask `(B, N)` of the entries that are not padding; None if there is no padding."""
        if self._rows is None:
            return None
        rows = torch.zeros(self.batch_size * self._rows_per_problem, 1, dtype=torch.bool, device=self._rows.device)
        rows = rows.index_fill(0, self._rows, True).reshape(self.batch_size, self._rows_per_problem, 1)
        parts = [rows.expand(-1, -1, size).reshape(self.batch_size, -1) for size in self._row_sizes]
        return torch.cat(parts, dim=1)

    def per_problem(self, values: Tensor) -> Tensor:
        """Return numbers `(..., B)` with the leading shape of the problems: `(..., B1, B2)` for `batch_dims=2`."""
        if len(self.batch_shape) == 1:
            return values
        return values.reshape(*values.shape[:-1], *self.batch_shape)

    def norm(self, kind: Norm = "parts") -> Callable[[Tensor], Tensor]:
        """Return the function from `(B, N)` to the norms, `(B,)` or `(B, P)`, that are compared with the tolerances.

        Raises:
            ValueError: `kind` is no `Norm`; in a call, the user's function returned another number of values.
        """
        if callable(kind):
            return lambda flat: self._users_norm(kind, flat)
        if kind == "whole":
            return safe_two_norm
        if kind == "parts":
            return self.norm_of_parts(self.sizes)
        if kind == "positions":
            return self._position_norms
        raise ValueError(f"norm={kind!r} must be 'parts', 'whole', 'positions' or a function of a state")

    @staticmethod
    def norm_of_parts(sizes: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """Return the norms of parts of these sizes, `(B, N) -> (B, P)`, or `(B, N) -> (B,)` for a single part."""
        if len(sizes) < 2:
            return safe_two_norm
        return lambda flat: torch.stack([safe_two_norm(part) for part in flat.split(list(sizes), dim=1)], dim=1)

    def _users_norm(self, function: Callable[[Any], Tensor], flat: Tensor) -> Tensor:
        values = function(self.unpack(flat))
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"norm returned {got}; return a tensor of real floating-point numbers")
        num_problems, shape = self.batch_size, tuple(values.shape)
        if num_problems != 1 and shape[:1] != (num_problems,) and shape[: self._num_leading] != tuple(self.batch_shape):
            raise ValueError(
                f"norm returned shape {shape}; its first dimensions must be {tuple(self.batch_shape)}, with one entry "
                "or several for each problem"
            )
        values = values.reshape(num_problems, max(1, values.numel() // max(1, num_problems)))
        return torch.where(torch.isfinite(flat).all(dim=1, keepdim=True), values, torch.nan)

    def _position_norms(self, flat: Tensor) -> Tensor:
        norms = []
        for part, shape, dtype in zip(flat.split(self.sizes, dim=1), self.shapes, self.dtypes, strict=True):
            channels = (shape[-1] if len(shape) > self._num_leading else 1) * (2 if dtype.is_complex else 1)
            positions = part.shape[1] // max(1, channels)
            norms.append(safe_two_norm(part.reshape(len(part), positions, channels)))
        return torch.cat(norms, dim=1)

    def _describe(self) -> str:
        shapes = [tuple(shape) for shape in self.shapes]
        return f"a tensor of shape {shapes[0]}" if len(shapes) == 1 else f"the structure of z0 with shapes {shapes}"


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _check_leaf(leaf: Any) -> None:
    if isinstance(leaf, Tensor) and leaf.dtype in (torch.complex64, torch.complex128):
        return
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
        raise TypeError(f"z0 must hold floating-point or complex tensors, not {kind}; convert it with .float()")


def _in_order_of(skeleton: Any, state: Any) -> Any:
    """Return the state with its containers as in the skeleton: dicts in any order and lists for tuples are welcome."""
    if type(skeleton) is dict and type(state) is dict and skeleton.keys() == state.keys():
        return {key: _in_order_of(part, state[key]) for key, part in skeleton.items()}
    if type(skeleton) in (tuple, list) and type(state) in (tuple, list) and len(skeleton) == len(state):
        return type(skeleton)(_in_order_of(a, b) for a, b in zip(skeleton, state, strict=True))
    return state
