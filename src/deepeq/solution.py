"""What a solve returns, and what it raises."""

from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor


class Result(Enum):
    """Outcome of a solve; the value is the sentence for the user."""

    CONVERGED = "every sample reached its tolerance"
    MAX_STEPS = (
        "the step limit was reached before every sample converged: raise max_steps, loosen rtol (or set atol where the "
        "equilibrium itself is near zero), try another solver, or regularize the map (deepeq.jacobian_penalty)"
    )
    NONFINITE = (
        "a non-finite value appeared: look for NaN in the inputs and parameters, then for a diverging iteration "
        "(Broyden or Anderson instead of plain iteration, damping, a normalization inside f, a lower learning rate)"
    )


class Solution(NamedTuple):
    """An equilibrium and how it was found.

    A solve converged when every sample did.
    """

    value: Any
    """The returned state, with the structure of `z0`; differentiable when gradients are enabled."""
    residual: Tensor
    """`||f(z) - z|| / ||f(z)||` of the returned state, `(B,)`."""
    converged: Tensor
    """Whether `||f(z) - z|| <= atol + rtol ||f(z)||` holds for the returned state, bool `(B,)`."""
    num_steps: Tensor
    """Steps that a sample took part in before it was done, one evaluation of `f` each, int64 `(B,)`."""
    num_evals: int
    """Calls of `f`, the one that builds the graph for the backward pass included."""
    result: Result
    """Outcome for the batch."""
    trace: Tensor
    """Relative residual at each step, `(steps, B)`; a sample that is done keeps its last one."""
    intermediate: tuple[Any, ...] = ()
    """States after earlier layers, where an `Unrolled` was asked to keep them."""


class ConvergenceError(RuntimeError):
    """A solve failed: a non-finite value, or no convergence where the caller asked for it; `.solution` has the rest."""

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution


class ConvergenceWarning(UserWarning):
    """A backward solve stopped short of its tolerance, so that a gradient is less exact than was asked for."""
