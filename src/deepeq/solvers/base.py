"""What every solver shares: tolerances, and the one rule it has to provide."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """A rule from `(z, f(z), state)` to `(next z, state)`, with the tolerances at which `iterate` stops.

    A sample is done when `||f(z) - z|| <= atol + rtol ||f(z)||` (Euclidean norms). A rule treats the samples of a batch
    independently and must return finite values for finite arguments, also when `f(z) = z`.

    Raises:
        ValueError: a field is out of range.
    """

    rtol: float = 1e-3
    """Relative tolerance; 0 turns it off."""
    atol: float = 0.0
    """Absolute tolerance, in the units of the state; 0 turns it off."""
    max_steps: int = 30
    """Most steps, each one evaluation of `f` (the backward pass has its first one for free)."""

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r} of {type(self).__name__} must be a finite number >= 0")
        if self.rtol == 0.0 and self.atol == 0.0:
            raise ValueError(
                f"rtol and atol of {type(self).__name__} are both 0, so it would never stop; set one of them"
            )
        self._check_count("max_steps", self.max_steps)

    def _check_count(self, name: str, value: int, *, least: int = 1) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} of {type(self).__name__} must be a whole number >= {least}")

    def _check_damping(self, damping: float) -> None:
        if not 0.0 <= damping < 1.0:
            raise ValueError(f"damping={damping!r} of {type(self).__name__} must lie in [0, 1); 0 means none")

    @property
    @abstractmethod
    def num_stored(self) -> int:
        """Most vectors of the size of a state that the rule keeps from step to step."""

    @abstractmethod
    def init(self, z0: Tensor) -> Any:
        """The state before the first step."""

    @abstractmethod
    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next point to evaluate, `(B, N)`, and the state after it."""
