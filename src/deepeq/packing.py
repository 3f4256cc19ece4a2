"""A state of any structure as one `(B, N)` tensor: solvers see nothing else."""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import (
    _pytree as pytree,
)  # the tree library that torch itself uses; it has no public name yet


class Packing:
    """The structure, shapes and dtypes of a state, and the way to a `(B, N)` tensor and back.

    A state is a tensor `(B, ...)`, or a tuple, list or dict of them (nested if need be) with one batch size. A tensor
    without dimensions is a batch of one. The packed dtype is float32 or wider, so that the algebra of a solver keeps
    its precision when `f` works in 16 bits.

    Raises:
        TypeError: a part of `z0` is not a floating-point tensor.
        ValueError: `z0` is empty, or its parts disagree on the batch size or the device.
    """

    def __init__(self, z0: Any) -> None:
        leaves, self.structure = pytree.tree_flatten(z0)
        if not leaves:
            raise ValueError("z0 holds no tensor; give a tensor of shape (B, ...) or a tuple or dict of them")
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"z0 must hold real floating-point tensors, not {kind}; convert it with .float()")
        self._skeleton = pytree.tree_unflatten([None] * len(leaves), self.structure)
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        batch_sizes = {shape[0] if shape else 1 for shape in self.shapes}
        if len(batch_sizes) > 1 or len({leaf.device for leaf in leaves}) > 1:
            raise ValueError(
                f"the tensors of z0 must share the batch dimension and the device, got shapes "
                f"{[tuple(shape) for shape in self.shapes]} on {sorted({str(leaf.device) for leaf in leaves})}"
            )
        self.batch_size = batch_sizes.pop()
        self.sizes = [prod(shape[1:]) for shape in self.shapes]
        self.dtype = torch.float32
        for dtype in self.dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype)

    def pack(self, state: Any, source: str = "f") -> Tensor:
        """The state as one tensor `(B, N)`; `source` names who made it in the error.

        Raises:
            ValueError: the structure or a shape differs from that of `z0`.
            TypeError: a part is not a floating-point tensor.
        """
        leaves, structure = pytree.tree_flatten(_in_order_of(self._skeleton, state))
        if structure != self.structure or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise ValueError(
                f"{source} returned a state of another structure than z0; return {self._describe()}, got {type(state)}"
            )
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            if leaf.shape != shape:
                raise ValueError(
                    f"{source} returned shape {tuple(leaf.shape)} for a state of shape {tuple(shape)}; "
                    "a fixed point needs a map of a space into itself"
                )
            if not leaf.is_floating_point():
                raise TypeError(f"{source} returned dtype {leaf.dtype}; a state must be real floating point")
        flat = [
            leaf.reshape(self.batch_size, size).to(self.dtype) for leaf, size in zip(leaves, self.sizes, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)  # (B, N)

    def unpack(self, flat: Tensor) -> Any:
        """The `(B, N)` tensor as a state with the structure, shapes and dtypes of `z0`."""
        parts = flat.split(self.sizes, dim=1) if len(self.sizes) > 1 else [flat]
        leaves = [
            part.reshape(shape).to(dtype) for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.structure)

    def _describe(self) -> str:
        shapes = [tuple(shape) for shape in self.shapes]
        return f"a tensor of shape {shapes[0]}" if len(shapes) == 1 else f"the structure of z0 with shapes {shapes}"


def _in_order_of(skeleton: Any, state: Any) -> Any:
    """The state with its mappings in the order of the skeleton's keys: equal mappings may be written in any order."""
    if isinstance(skeleton, dict) and isinstance(state, dict) and skeleton.keys() == state.keys():
        return {key: _in_order_of(part, state[key]) for key, part in skeleton.items()}
    if type(skeleton) is type(state) and type(skeleton) in (tuple, list) and len(skeleton) == len(state):
        return type(skeleton)(_in_order_of(a, b) for a, b in zip(skeleton, state, strict=True))
    return state
