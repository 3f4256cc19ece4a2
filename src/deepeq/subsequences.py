"""Long sequences, solved piece by piece."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deepeq.adjoint import Adjoint
from deepeq.deq import DEQ, InjectingCell
from deepeq.solution import Result, Solution
from deepeq.solvers import Solver


@runtime_checkable
class RememberingCell(InjectingCell, Protocol):
    """A causal cell whose memory of earlier positions can grow."""

    def extend_memory(self, memory: Any, x: Any, z: Any, *, length: int | None = None) -> Any:
        """The memory (or None) followed by a segment `x` with states `z`, differentiable.

        With `length=None` it keeps every position that can matter, otherwise the last `length`.
        """
        ...


@runtime_checkable
class SharingCell(RememberingCell, Protocol):
    """A cell that computes weights from its parameters, normalized or dropped, which several solves can share."""

    def shared_weights(self) -> Any:
        """What `inject` makes of the parameters alone, in training with masks of its own."""
        ...

    def inject(self, x: Any, memory: Any = None, weights: Any = None) -> Any:
        """The injection, with these weights in the place of new ones."""
        ...


class Subsequences(DEQ):
    """A `DEQ` that solves a sequence in pieces of at most `length` positions (Bai et al. 2019, appendix E).

    Called as `layer(x, z0=None, memory=None) -> Solution` like any `DEQ`, for `x` `(B, T, D)` and states of tensors
    `(B, T, ...)`. Each piece has the equilibria of the pieces before it as its memory. The cell is causal, so the
    equilibrium, where there is but one, is that of the whole, found in solves that are each easier. Nothing is
    detached: the backward pass solves piece after piece from the last to the first, and the gradients are those of the
    whole. Between the passes lives one graph of `f` for each piece, together that of `f` over the whole sequence, and
    what `inject` computes for each piece, such as the projections of its memory. Where the cell has
    `shared_weights()`, the pieces share these, dropped entries included; masks of states are drawn for each piece.

    `prepare` and `solve` stay those of the whole sequence. The Solution of the pieces together has:

    - `residual`: the largest of the pieces. It bounds that of the whole, because
      `(sum_i ||r_i||^2) / (sum_i ||f_i||^2) <= max_i ||r_i||^2 / ||f_i||^2`;
    - `converged`: whether all pieces did. With `atol = 0` the whole then did too; an `atol` holds for each piece;
    - `num_steps`: the largest of the pieces, and `trace` their largest residual at each step, where a piece that is
      done keeps its last one;
    - `num_evals`: the sum, of calls that see one piece each;
    - `result`: the worst.

    Args:
        layer: The layer whose cell, solver and adjoint are used. The cell offers `inject` and
            `extend_memory(memory, x, z, *, length)`, and perhaps `shared_weights()` for `inject(x, memory, weights)`.
        length: Most positions in a piece.

    Raises:
        TypeError: `layer` is no `DEQ` (the pieces of an `Unrolled` would see finished layers, where the whole sees
            those of equal depth), or its cell keeps no memory.
        ValueError: `length` is not a whole number >= 1; in a call, a tensor of the state is not `(B, T, ...)`.
    """

    def __init__(self, layer: DEQ, length: int) -> None:
        if not isinstance(layer, DEQ):
            raise TypeError(f"layer must be a DEQ, got {type(layer).__name__}: only equilibria can be found in pieces")
        if not isinstance(layer.cell, RememberingCell):
            raise TypeError(
                f"{type(layer.cell).__name__} must have inject(x, memory) and extend_memory(memory, x, z, *, length) "
                "to be solved in pieces"
            )
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(f"length={length!r} of Subsequences must be a whole number >= 1")
        if layer.batch_dims != 1:
            raise ValueError(f"batch_dims={layer.batch_dims} of layer must be 1, as pieces are cut along dimension 1")
        super().__init__(layer.cell, **layer.options)
        self.length = length

    def forward(
        self,
        x: Tensor,
        z0: Any = None,
        memory: Any = None,
        *,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        segments: Tensor | None = None,
        keep: Sequence[int] = (),
        callback: Callable[[int, Any, Tensor], None] | None = None,
    ) -> Solution:
        """Return the equilibrium of the whole, as `DEQ` does; `callback` sees the steps of each piece.

        Raises:
            ValueError: `segments` are given, or a tensor of the state is not `(B, T, ...)`.
        """
        if segments is not None:
            raise ValueError("segments name the problems of a state without a time dimension; leave them out here")
        rules: dict[str, Any] = {"solver": solver, "adjoint": adjoint, "keep": keep, "callback": callback}
        cell, num_positions = self.cell, x.shape[1]
        assert isinstance(cell, RememberingCell)
        if num_positions <= self.length:
            return super().forward(x, z0, memory, **rules)
        if z0 is not None:
            _check_positions(z0, num_positions, "z0")
        weights = cell.shared_weights() if isinstance(cell, SharingCell) else None
        pieces = []
        for start in range(0, num_positions, self.length):
            window = slice(start, start + self.length)
            x_piece = x[:, window]
            piece = self.solve(*self.prepare(x_piece, _positions(z0, window), memory, weights=weights), **rules)
            _check_positions(piece.value, x_piece.shape[1], "the state")
            pieces.append(piece)
            if window.stop < num_positions:
                memory = cell.extend_memory(memory, x_piece, piece.value, length=None)
        return _join(pieces)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, length={self.length}"


def _positions(state: Any, window: slice) -> Any:
    return pytree.tree_map_only(Tensor, lambda z: z[:, window], state)


def _check_positions(state: Any, num_positions: int, name: str) -> None:
    for z in pytree.tree_leaves(state):
        if z.ndim < 2 or z.shape[1] != num_positions:
            raise ValueError(
                f"Subsequences splits and joins states along dimension 1, so that a tensor of {name} for "
                f"{num_positions} positions must be (B, {num_positions}, ...), got {tuple(z.shape)}"
            )


def _join(pieces: list[Solution]) -> Solution:
    severity = list(Result)
    steps = max(len(piece.residual_history) for piece in pieces)
    traces = [
        torch.cat([piece.residual_history, piece.residual_history[-1:].expand(steps - len(piece.residual_history), -1)])
        for piece in pieces
    ]
    return Solution(
        value=pytree.tree_map(lambda *parts: torch.cat(parts, dim=1), *(piece.value for piece in pieces)),
        relative_residual=torch.stack([piece.relative_residual for piece in pieces]).amax(dim=0),
        absolute_residual=torch.stack([piece.absolute_residual for piece in pieces]).amax(dim=0),
        converged=torch.stack([piece.converged for piece in pieces]).all(dim=0),
        num_steps=torch.stack([piece.num_steps for piece in pieces]).amax(dim=0),
        num_evals=sum(piece.num_evals for piece in pieces),
        result=max((piece.result for piece in pieces), key=severity.index),
        residual_history=torch.stack(traces).amax(dim=0),  # (steps, B)
        kept=tuple(
            pytree.tree_map(lambda *parts: torch.cat(parts, dim=1), *states)
            for states in zip(*(piece.kept for piece in pieces), strict=True)
        ),
        message=next((piece.message for piece in pieces if piece.message), ""),
    )
