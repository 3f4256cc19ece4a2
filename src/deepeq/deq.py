"""How to solve for the state of a cell: `Equilibrium`, `Stack` and `Pieces`.

A way to solve is a frozen value, called as `how(cell, x, z0, memory) -> Solution`. It is an argument of every call and
never a state of the cell, so that training, evaluation and a benchmark can each solve the same cell their own way.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from deepeq.adjoint import Adjoint, ImplicitAdjoint, tracked
from deepeq.cell import method, prepare, require
from deepeq.checks import check_choice, check_count
from deepeq.diagnosis import OnFailure
from deepeq.norms import ratio, safe_two_norm
from deepeq.packing import Norm, NormName, Packing
from deepeq.solution import Result, Solution
from deepeq.solve import Nonfinite, check_rules, fixed_point
from deepeq.solvers import Anderson, Solver

Callback = Callable[[int, Any, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Equilibrium:
    """Solve for the equilibrium `z* = cell(z*, injection)` (Bai et al. 2019, eq. 2), with gradients of an adjoint.

    Raises:
        TypeError: `solver` is not a `Solver`, or `adjoint` not an `Adjoint`.
        ValueError: Another field has a value that is not allowed.
    """

    solver: Solver = field(default_factory=Anderson)
    """Forward solver."""
    adjoint: Adjoint = field(default_factory=ImplicitAdjoint)
    """How gradients are computed."""
    batch_dims: int = 1
    """Number of leading dimensions of the state that index independent problems; 0 for one coupled state."""
    norm: Norm = "parts"
    """What is compared with the tolerances, as in `fixed_point`."""
    on_failure: OnFailure = "warn"
    """What happens when a problem misses its tolerance: `"ignore"`, `"warn"` or `"raise"`."""
    nonfinite: Nonfinite = "raise"
    """What happens when a value is not finite: `"raise"` or `"keep"`, as in `fixed_point`."""
    verify: bool = True
    """Check that the problems do not depend on each other, as in `fixed_point`."""

    def __post_init__(self) -> None:
        check_rules(self.solver, self.adjoint)
        check_choice("on_failure", self.on_failure, OnFailure)
        check_choice("nonfinite", self.nonfinite, Nonfinite)
        if not callable(self.norm):
            check_choice("norm", self.norm, NormName)
        check_count("batch_dims", self.batch_dims, least=0, owner=self)

    def __call__(
        self,
        cell: nn.Module,
        x: Any,
        z0: Any = None,
        memory: Any = None,
        *,
        segments: Tensor | None = None,
        keep: Sequence[int] = (),
        callback: Callback | None = None,
    ) -> Solution:
        """Return the equilibrium of a cell.

        Args:
            cell: A `Cell`, or a plain module called as `cell(z, x)`.
            x: The input.
            z0: First state; default that of the cell.
            memory: What the cell's `inject` takes besides the input.
            segments: Problem of each row of the state, as in `fixed_point`.
            keep: Steps whose states are returned too, as in `fixed_point`.
            callback: Observer of each step, as in `fixed_point`.
        """
        f, z0 = prepare(cell, x, z0, memory)
        return self.solve(f, z0, segments=segments, keep=keep, callback=callback)

    def solve(
        self,
        f: Callable[[Any], Any],
        z0: Any,
        *,
        segments: Tensor | None = None,
        keep: Sequence[int] = (),
        callback: Callback | None = None,
    ) -> Solution:
        """Return the equilibrium of a map that `prepare` returned for a cell.

        Args:
            f: The map of the state.
            z0: First state.
            segments: Problem of each row of a ragged state, as in `fixed_point`.
            keep: Steps whose states are returned too, as in `fixed_point`.
            callback: Called as `callback(step, z, residual)` after each step.
        """
        return fixed_point(f, z0, segments=segments, keep=keep, callback=callback, **vars(self))


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Apply `no_grad_depth + depth` tied layers `z <- cell(z, injection)`, with ordinary backpropagation (eq. 3).

    The Solution does not claim an equilibrium: its residuals are those of the state before the last layer, and no
    problem is `converged`.

    Raises:
        ValueError: A count is not a whole number, or is too small.
    """

    depth: int
    """Number of layers that gradients pass through."""
    no_grad_depth: int = 0
    """Number of layers before them, which run without a graph (truncated backpropagation)."""
    checkpoint: bool = False
    """Keep only about `sqrt(depth)` states between forward and backward, and compute the layers between them twice
    (Chen et al. 2016, Training deep nets with sublinear memory cost)."""
    keep_every: int = 0
    """Return the state after every `keep_every`-th of the `depth` layers, except the last, in `Solution.kept`, for
    auxiliary losses; 0 for none."""
    batch_dims: int = 1
    """Number of leading dimensions of the state that index the problems of the residuals; 0 for one."""

    def __post_init__(self) -> None:
        check_count("depth", self.depth, least=1, owner=self)
        for name in ("no_grad_depth", "keep_every", "batch_dims"):
            check_count(name, getattr(self, name), least=0, owner=self)

    def __call__(self, cell: nn.Module, x: Any, z0: Any = None, memory: Any = None) -> Solution:
        """Return the state after the last layer.

        Args:
            cell: A `Cell`, or a module called as `cell(z, x)`.
            x: The input.
            z0: State before the first layer; None for the cell's own.
            memory: What earlier segments left, or None.
        """
        return self.solve(*prepare(cell, x, z0, memory))

    def solve(self, f: Callable[[Any], Any], z0: Any) -> Solution:
        """Return the state after the last application of the map that `prepare` returned for a cell."""
        packing = Packing(z0, self.batch_dims)
        z, kept, history = z0, [], []
        if self.no_grad_depth:
            with torch.no_grad():
                z, _, residuals = self._layers(f, packing, z, -self.no_grad_depth, 0)
            history.append(residuals)
        # An f that hides its parameters from autograd gets gradients only where its argument asks for one.
        z = pytree.tree_map_only(Tensor, tracked, z)
        stride = math.isqrt(self.depth - 1) + 1 if self.checkpoint else self.depth
        for first in range(0, self.depth, stride):
            arguments = (f, packing, z, first, min(first + stride, self.depth))
            if self.checkpoint and torch.is_grad_enabled():
                z, states, residuals = checkpoint(self._layers, *arguments, use_reentrant=False)
            else:
                z, states, residuals = self._layers(*arguments)
            kept += states
            history.append(residuals)
        residuals = torch.cat(history)  # (layers, 2, B)
        steps = torch.full((packing.batch_size,), len(residuals), device=residuals.device)
        return Solution(
            value=z,
            relative_residual=packing.per_problem(residuals[-1, 0]),
            converged=packing.per_problem(torch.zeros_like(steps, dtype=torch.bool)),
            num_steps=packing.per_problem(steps),
            num_evals=len(residuals),
            result=Result.MAX_STEPS,
            residual_history=packing.per_problem(residuals[:, 0]),
            absolute_residual=packing.per_problem(residuals[-1, 1]),
            kept=tuple(kept),
        )

    def _layers(
        self, f: Callable[[Any], Any], packing: Packing, z: Any, first: int, last: int
    ) -> tuple[Any, list[Any], Tensor]:
        """Return the state after layers `first + 1 ... last`, the kept ones, and the residuals `(layers, 2, B)`."""
        kept, residuals = [], []
        for layer in range(first + 1, last + 1):
            z, before = f(z), z
            with torch.no_grad():
                before, after = packing.pack(before, "z0"), packing.pack(z, "the cell")
                distance = safe_two_norm(after - before)
                residuals.append(torch.stack([ratio(distance, safe_two_norm(after)), distance]).to(after.dtype))
            if self.keep_every and layer % self.keep_every == 0 and 0 < layer < self.depth:
                kept.append(z)
        return z, kept, torch.stack(residuals)


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Solve a long sequence in pieces of at most `length` positions (Bai et al. 2019, appendix E).

    Inputs are `(B, T, D)` and states are tensors `(B, T, ...)`, or structures of them. The equilibria of earlier pieces
    are the memory of each piece. The cell must be causal: no position may depend on later ones. This is not checked.
    Then the pieces together have the equilibrium of the whole sequence, if there is only one, and each solve is easier.
    Nothing is detached: the backward pass solves the
    pieces from the last to the first, and the gradients are those of the whole sequence. Between the passes lives one
    graph of `f` for each piece, plus what `inject` computes for each piece, such as the projections of its memory. The
    pieces share the weights of the cell's `shared_weights`, dropped entries included. Masks of states are drawn for
    each piece.

    The Solution describes all pieces together:

    - `relative_residual`: the largest. It bounds the residual of the whole sequence, because
      `(sum_i ||r_i||^2) / (sum_i ||f_i||^2) <= max_i ||r_i||^2 / ||f_i||^2`;
    - `absolute_residual`: the largest, which does not bound that of the whole sequence;
    - `converged`: whether all pieces converged. With `atol = 0` the whole sequence then did too;
    - `num_steps`: the largest, and `residual_history` the largest at each step, where a finished piece keeps its last
      residual;
    - `num_evals`: the sum, of calls that see one piece each;
    - `result`: the worst.

    Raises:
        TypeError: `equilibrium` is not an `Equilibrium`. A stack in pieces would not be the stack of the whole
            sequence: its pieces would see finished layers of earlier positions.
        ValueError: `length` is not a whole number >= 1, or the equilibrium has `batch_dims` other than 1.
    """

    equilibrium: Equilibrium
    """How each piece is solved."""
    length: int
    """Largest number of positions in a piece."""

    def __post_init__(self) -> None:
        if not isinstance(self.equilibrium, Equilibrium):
            kind = type(self.equilibrium).__name__
            raise TypeError(f"equilibrium must be an Equilibrium, got {kind}: only equilibria can be found in pieces")
        check_count("length", self.length, least=1, owner=self)
        if self.equilibrium.batch_dims != 1:
            raise ValueError(
                f"batch_dims={self.equilibrium.batch_dims} of the equilibrium must be 1, as pieces are cut along "
                "dimension 1"
            )

    def __call__(
        self,
        cell: nn.Module,
        x: Tensor,
        z0: Any = None,
        memory: Any = None,
        *,
        keep: Sequence[int] = (),
        callback: Callback | None = None,
    ) -> Solution:
        """Return the equilibrium of the whole sequence.

        Args:
            cell: A cell with `inject` and `extend_memory`.
            x: The input, `(B, T, D)`.
            z0: First state of the whole sequence; None for the cell's own.
            memory: What earlier segments left, or None.
            keep: Steps whose states are returned too, as in `fixed_point`.
            callback: Called as `callback(step, z, residual)` after each step of each piece.

        Raises:
            TypeError: The cell has no `inject` and `extend_memory` of its own.
            ValueError: A tensor of the state is not `(B, T, ...)`.
        """
        require_pieces(cell)
        num_positions = x.shape[1]
        if num_positions <= self.length:
            return self.equilibrium(cell, x, z0, memory, keep=keep, callback=callback)
        if z0 is not None:
            _check_positions(z0, num_positions, "z0")
        weights = method(cell, "shared_weights")()
        pieces = []
        for start in range(0, num_positions, self.length):
            positions = slice(start, start + self.length)
            x_piece, z0_piece = x[:, positions], pytree.tree_map_only(Tensor, lambda z, at=positions: z[:, at], z0)
            f, first = prepare(cell, x_piece, z0_piece, memory, weights=weights)
            piece = self.equilibrium.solve(f, first, keep=keep, callback=callback)
            _check_positions(piece.value, x_piece.shape[1], "the state")
            pieces.append(piece)
            if positions.stop < num_positions:
                memory = method(cell, "extend_memory")(memory, x_piece, piece.value, length=None)
        return _join(pieces)


How = Equilibrium | Stack | Pieces
"""A way to solve: a frozen value called as `how(cell, x, z0, memory) -> Solution`."""


def require_pieces(cell: nn.Module) -> None:
    """Raise TypeError, naming the missing methods, for a cell that cannot be solved in pieces."""
    require(cell, "inject(x, memory)", "extend_memory(memory, x, z, *, length)", purpose="be solved in pieces")


def _check_positions(state: Any, num_positions: int, name: str) -> None:
    for z in pytree.tree_leaves(state):
        if z.ndim < 2 or z.shape[1] != num_positions:
            raise ValueError(
                f"Pieces cuts and joins states along dimension 1, so a tensor of {name} for {num_positions} positions "
                f"must be (B, {num_positions}, ...), got {tuple(z.shape)}"
            )


def _join(pieces: list[Solution]) -> Solution:
    steps = max(len(piece.residual_history) for piece in pieces)
    histories = [
        torch.cat([piece.residual_history, piece.residual_history[-1:].expand(steps - len(piece.residual_history), -1)])
        for piece in pieces
    ]

    def joined(*states: Any) -> Any:
        return pytree.tree_map(lambda *parts: torch.cat(parts, dim=1), *states)

    return Solution(
        value=joined(*(piece.value for piece in pieces)),
        relative_residual=torch.stack([piece.relative_residual for piece in pieces]).amax(dim=0),
        absolute_residual=torch.stack([piece.absolute_residual for piece in pieces]).amax(dim=0),
        converged=torch.stack([piece.converged for piece in pieces]).all(dim=0),
        num_steps=torch.stack([piece.num_steps for piece in pieces]).amax(dim=0),
        num_evals=sum(piece.num_evals for piece in pieces),
        result=max((piece.result for piece in pieces), key=list(Result).index),
        residual_history=torch.stack(histories).amax(dim=0),  # (steps, B)
        kept=tuple(joined(*states) for states in zip(*(piece.kept for piece in pieces), strict=True)),
        message=next((piece.message for piece in pieces if piece.message), ""),
    )
