"""How a quantity changes over a run: a factor that depends on the fraction of the steps done and on the validations."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A factor of the learning rate, of a tolerance, of a step limit or of a weight.

    It is a pure function of its arguments and keeps nothing from step to step, so a resumed run continues exactly.

    Raises:
        ValueError: A field is out of range.
    """

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ValueError("; ".join(f"{type(self).__name__}.{problem}" for problem in problems))

    def _problems(self) -> list[str]:
        """Return a sentence for each field that is out of range."""
        return []

    @abstractmethod
    def factor(self, progress: float, validations: Sequence[float] = ()) -> float:
        """Return the number that multiplies the quantity.

        Args:
            progress: Fraction of the steps that are done, 0 at the first step and 1 at the last.
            validations: Losses on the validation text so far, the oldest first.
        """


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """No change."""

    def factor(self, progress: float, validations: Sequence[float] = ()) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line."""

    start: float = 1.0
    """Factor at the first step."""
    end: float
    """Factor at the last step."""

    def _problems(self) -> list[str]:
        return _not_in_range(self, "start") + _not_in_range(self, "end")

    def factor(self, progress: float, validations: Sequence[float] = ()) -> float:
        return (1.0 - progress) * self.start + progress * self.end  # exact at both ends


@dataclass(frozen=True, kw_only=True)
class Geometric(Schedule):
    """A straight line in the logarithm, for tolerances: every step multiplies by the same number."""

    start: float = 1.0
    """Factor at the first step."""
    end: float
    """Factor at the last step."""

    def _problems(self) -> list[str]:
        return _not_in_range(self, "start", positive=True) + _not_in_range(self, "end", positive=True)

    def factor(self, progress: float, validations: Sequence[float] = ()) -> float:
        return self.start ** (1.0 - progress) * self.end**progress  # exact at both ends


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine, flat at both ends."""

    start: float = 1.0
    """Factor at the first step."""
    end: float = 0.05
    """Factor at the last step."""

    def _problems(self) -> list[str]:
        return _not_in_range(self, "start") + _not_in_range(self, "end")

    def factor(self, progress: float, validations: Sequence[float] = ()) -> float:
        return self.end + (self.start - self.end) * (0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass(frozen=True, kw_only=True)
class Drops(Schedule):
    """A multiplication at given fractions of the steps."""

    at: tuple[float, ...] = (0.5, 0.75)
    """The fractions."""
    multiplier: float = 0.1
    """Factor at each of them."""

    def _problems(self) -> list[str]:
        return _not_fractions(self) + _not_in_range(self, "multiplier", positive=True)

    def factor(self, progress: float, validations: Sequence[float] = ()) -> float:
        return self.multiplier ** sum(progress >= fraction for fraction in self.at)


@dataclass(frozen=True, kw_only=True)
class Plateau(Schedule):
    """A multiplication whenever more than `patience` validations in a row do not improve on the best one."""

    multiplier: float = 0.5
    """Factor of each multiplication, in (0, 1)."""
    patience: int = 1
    """Number of validations without an improvement that change nothing; each multiplication resets the count."""
    min_improvement: float = 0.0
    """A validation is an improvement if it is lower than the best by more than this."""
    floor: float = 0.0
    """Smallest factor."""

    def _problems(self) -> list[str]:
        problems = _not_decreasing(self) + _not_count(self, "patience")
        return problems + _not_in_range(self, "min_improvement")

    def factor(self, progress: float, validations: Sequence[float] = ()) -> float:
        best, stalled, times = math.inf, 0, 0
        for loss in validations:
            if loss < best - self.min_improvement:
                best, stalled = loss, 0
            else:
                stalled += 1
            if stalled > self.patience:
                stalled, times = 0, times + 1
        return max(self.floor, self.multiplier**times)


@dataclass(frozen=True, kw_only=True)
class NonMonotone(Schedule):
    """A multiplication whenever a validation is worse than the best one before the last `interval` validations.

    The released TrellisNet code lowers its learning rate by this rule, which is from Merity, Keskar, Socher (2017).
    """

    multiplier: float = 0.1
    """Factor of each multiplication, in (0, 1)."""
    interval: int = 5
    """Number of validations just before the present one that are not compared."""
    at: tuple[float, ...] = ()
    """Fractions of the steps at which it also multiplies, whatever the validations."""
    floor: float = 0.0
    """Smallest factor."""

    def _problems(self) -> list[str]:
        return _not_decreasing(self) + _not_count(self, "interval") + _not_fractions(self)

    def factor(self, progress: float, validations: Sequence[float] = ()) -> float:
        best, times = math.inf, sum(progress >= fraction for fraction in self.at)
        for before, loss in zip(validations, validations[self.interval + 1 :], strict=False):
            best = min(best, before)
            times += loss > best
        return max(self.floor, self.multiplier**times)


def _not_in_range(schedule: Schedule, name: str, *, positive: bool = False) -> list[str]:
    value = getattr(schedule, name)
    if 0.0 < value < math.inf or (value == 0.0 and not positive):
        return []
    return [f"{name}={value!r} must be {'> 0' if positive else '>= 0'} and finite"]


def _not_count(schedule: Schedule, name: str) -> list[str]:
    value = getattr(schedule, name)
    return [] if isinstance(value, int) and value >= 0 else [f"{name}={value!r} must be a whole number >= 0"]


def _not_fractions(schedule: Drops | NonMonotone) -> list[str]:
    return [] if all(0.0 < fraction < 1.0 for fraction in schedule.at) else [f"at={schedule.at!r} must lie in (0, 1)"]


def _not_decreasing(schedule: Plateau | NonMonotone) -> list[str]:
    problems = []
    if not 0.0 < schedule.multiplier < 1.0:
        problems.append(f"multiplier={schedule.multiplier!r} must lie in (0, 1)")
    if not 0.0 <= schedule.floor <= 1.0:
        problems.append(f"floor={schedule.floor!r} must lie in [0, 1]")
    return problems


def factor_at(
    schedule: Schedule | None, step: int, first: int, num_steps: int, validations: Sequence[float] = ()
) -> float:
    """Return the factor of a schedule at one step; 1 without a schedule.

    Args:
        schedule: The schedule, or None.
        step: The step, counted from 0.
        first: The step that the schedule begins at.
        num_steps: The number of steps after which it ends.
        validations: Losses on the validation text before the step, the oldest first.
    """
    if schedule is None:
        return 1.0
    progress = (step - first) / max(1, num_steps - 1 - first)
    return schedule.factor(max(0.0, progress), validations)
