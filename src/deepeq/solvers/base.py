"""The base class of solvers: the tolerances, and `num_stored`, `init` and `step`, which a solver must define."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from deepeq.checks import check_count
from deepeq.packing import Map


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """A rule from `(z, f(z), g(z), state)` to `(next z, state)`, with the tolerances at which the search stops.

    A problem is done when `||g|| <= atol + rtol ||f(z)||` for `z = f(z)`, where `g = f(z) - z`. For `g(z) = 0` it is
    done when `||g|| <= atol + rtol ||g(z0)||`. Where a state grows without bound, a relative residual
    falls although nothing converges. A fixed point whose `||f(z)||` is more than 30 times `||f(z0)||` is therefore done
    only if `||g||` has also fallen to a tenth of the first one, or is more than a hundred times it.

    A rule treats the problems of a batch independently. It returns finite values for finite arguments, also where
    `g = 0`.

    Raises:
        ValueError: A field is out of range.
    """

    rtol: float = 1e-3
    """Relative tolerance; 0 turns it off."""
    atol: float = 0.0
    """Absolute tolerance, in the units of `g`; 0 turns it off."""
    max_steps: int = 30
    """Largest number of steps, each one evaluation of `f` unless the rule says otherwise; 0 returns the first point."""
    min_steps: int = 0
    """Steps that every problem takes at least, even if it reaches its tolerance earlier."""

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} of {type(self).__name__} must be a number")
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r} of {type(self).__name__} must be a finite number >= 0")
        if self.rtol == 0.0 and self.atol == 0.0:
            raise ValueError(
                f"rtol and atol of {type(self).__name__} are both 0, so it would never stop; set one of them"
            )
        check_count("max_steps", self.max_steps, least=0, owner=self)
        check_count("min_steps", self.min_steps, least=0, owner=self)
        if self.min_steps > self.max_steps:
            raise ValueError(
                f"min_steps={self.min_steps} of {type(self).__name__} must be at most max_steps={self.max_steps}"
            )

    def _check_damping(self, damping: float) -> None:
        if not isinstance(damping, int | float) or not 0.0 <= damping < 1.0:
            raise ValueError(f"damping={damping!r} of {type(self).__name__} must lie in [0, 1); 0 means none")

    @property
    @abstractmethod
    def num_stored(self) -> int:
        """Largest number of state-sized vectors that the rule keeps from step to step."""

    @property
    def nonfinite_patience(self) -> int:
        """Number of consecutive non-finite evaluations that the rule can back off from; 0 by default."""
        return 0

    @property
    def differentiable(self) -> bool:
        """Whether gradients may be taken through the steps of the rule, as `BackpropAdjoint` does."""
        return True

    @property
    def independent_rows(self) -> bool:
        """Whether the rule can go on with some rows of its state, those of the problems that are not done."""
        return True

    @property
    def needs_symmetry(self) -> bool:
        """Whether the rule relies on a symmetric Jacobian, so that parts of a state may not be scaled apart."""
        return False

    def bind(self, g: Map) -> Self:
        """Return the rule for one search on `g`; a rule that needs more than evaluations overrides this."""
        return self

    def advice(self, num_steps: int) -> str:
        """Return what a user should change after `num_steps` steps without success, or an empty string."""
        return ""

    @abstractmethod
    def init(self, z0: Tensor) -> Any:
        """Return the state before the first step, for a first point `(B, N)`."""

    @abstractmethod
    def step(self, z: Tensor, fz: Tensor, g: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the next point to evaluate, `(B, N)`, and the state after it.

        Args:
            z: The point that was evaluated last, `(B, N)`.
            fz: Its value `f(z)`.
            g: Its residual `f(z) - z`.
            state: What `init` or the last `step` returned.
        """
