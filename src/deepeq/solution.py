"""What a solve returns, and what it raises."""

from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

State = TypeVar("State")


class Result(Enum):
    """Outcome of a solve; the value is a general sentence, `Solution.message` has the one for the case."""

    CONVERGED = "every problem reached its tolerance"
    MAX_STEPS = (
        "not every problem reached its tolerance: raise max_steps, loosen rtol (or set atol where the equilibrium "
        "itself is near zero), try another solver, or regularize the map (deepeq.jacobian_penalty)"
    )
    NONFINITE = (
        "a non-finite value appeared: look for NaN in the inputs and parameters, then for a diverging iteration "
        "(Broyden or Anderson instead of plain iteration, damping, a normalization inside f, a lower learning rate)"
    )


class Solution(NamedTuple, Generic[State]):
    """An equilibrium and how it was found.

    Numbers per problem are `(B,)`, for `B` problems; with `batch_dims >= 2` they have the leading shape of `z0`.
    Norms are those of the `norm` that the solve was given. A solve converged when every problem did.
    """

    value: State
    """The returned state, with the structure of `z0`; differentiable when gradients are enabled."""
    relative_residual: Tensor
    """Relative residual of the returned state: `||f(z) - z|| / ||f(z)||`, or `||g(z)|| / ||g(z0)||` for a root. `rtol`
    is compared with it."""
    converged: Tensor
    """Whether a problem is confirmed to meet its tolerance, bool. False for all problems of a `Stack`, of
    `PhantomAdjoint(returns="last")`, and where the check found that the problems depend on each other."""
    num_steps: Tensor
    """Steps that a problem took part in before it was done, int64."""
    num_evals: int
    """Calls of `f`, the one that builds the graph for the backward pass included."""
    result: Result
    """Outcome for all problems together."""
    residual_history: Tensor
    """Relative residual at each step, `(steps, B)`; a problem that is done keeps its last one."""
    absolute_residual: Tensor
    """Absolute residual of the returned state: `||f(z) - z||`, or `||g(z)||` for a root. `atol` is compared with it."""
    kept: tuple[State, ...] = ()
    """States after the steps that `keep` named, or after earlier layers where an `Unrolled` was asked to keep them."""
    message: str = ""
    """What went wrong and what to change, in a sentence; empty where there is nothing to say."""

    @property
    def residual(self) -> Tensor:
        """The relative residual, by its short name."""
        return self.relative_residual

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a Solution has no {name!r}; its state is .value, with the residuals beside it")

    def _is_no_tensor(self, other: Any) -> Any:
        raise TypeError("a Solution is not a tensor; take its .value")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = _is_no_tensor

    def __repr__(self) -> str:
        count = self.converged.numel()
        worst = float(self.relative_residual.max()) if count else 0.0
        return (
            f"Solution({self.result.name}, {count} problem{'s' * (count != 1)}, {self.num_evals} "
            f"evaluation{'s' * (self.num_evals != 1)}, worst residual {worst:.1e})"
        )


class ConvergenceError(RuntimeError):
    """A solve failed: a non-finite value, or no convergence where the caller asked for it; `.solution` has the rest."""

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.solution)


class ConvergenceWarning(UserWarning):
    """A solve stopped short of its tolerance: the equilibrium, or the gradient, is less exact than was asked for."""
