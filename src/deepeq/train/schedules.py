"""How a quantity changes over a run: a number that multiplies it, from the share of steps done and the validations."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A factor of the learning rate, of a tolerance, of a step limit or of a weight.

    It is a pure function of its arguments and keeps nothing from step to step, so that a resumed run goes on exactly.

    Raises:
        ValueError: a field is out of range.
    """

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ValueError("; ".join(f"{type(self).__name__}.{problem}" for problem in problems))

    def _problems(self) -> list[str]:
        """A sentence for each field out of range."""
        return []

    @abstractmethod
    def factor(self, progress: float, validations: Sequence[float] = ()) -> float:
        """What multiplies the quantity.

        Args:
            progress: Share of the steps that is done, 0 at the first step and 1 at the last.
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
    """A straight line in the logarithm, as suits tolerances: every step multiplies by the same number."""

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
    """A multiplication at given shares of the steps."""

    at: tuple[float, ...] = (0.5, 0.75)
    """The shares."""
    multiplier: float = 0.1
    """What multiplies at each of them."""

    def _problems(self) -> list[str]:
        return _not_shares(self) + _not_in_range(self, "multiplier", positive=True)

    def factor(self, progress: float, validations: Sequence[float] = ()) -> float:
        return self.multiplier ** sum(progress >= share for share in self.at)


@dataclass(frozen=True, kw_only=True)
class Plateau(Schedule):
    """A multiplication each time that more than `patience` validations in a row are no improvement on the best."""

    multiplier: float = 0.5
    """What multiplies, in (0, 1)."""
    patience: int = 1
    """Most validations without an improvement that change nothing; the count starts anew after each multiplication."""
    min_improvement: float = 0.0
    """A validation has to be lower than the best by more than this to be an improvement."""
    floor: float = 0.0
    """Least factor."""

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
    """A multiplication each time that a validation is worse than the best of those more than `interval` before it.

    The trigger of Merity, Keskar, Socher (2017), by which the released TrellisNet code lowers its learning rate.
    """

    multiplier: float = 0.1
    """What multiplies, in (0, 1)."""
    interval: int = 5
    """How many validations just before the present one are not looked at."""
    at: tuple[float, ...] = ()
    """Shares of the steps at which it multiplies besides, whatever the validations."""
    floor: float = 0.0
    """Least factor."""

    def _problems(self) -> list[str]:
        return _not_decreasing(self) + _not_count(self, "interval") + _not_shares(self)

    def factor(self, progress: float, validations: Sequence[float] = ()) -> float:
        best, times = math.inf, sum(progress >= share for share in self.at)
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


def _not_shares(schedule: Drops | NonMonotone) -> list[str]:
    return [] if all(0.0 < share < 1.0 for share in schedule.at) else [f"at={schedule.at!r} must lie in (0, 1)"]


def _not_decreasing(schedule: Plateau | NonMonotone) -> list[str]:
    problems = []
    if not 0.0 < schedule.multiplier < 1.0:
        problems.append(f"multiplier={schedule.multiplier!r} must lie in (0, 1)")
    if not 0.0 <= schedule.floor <= 1.0:
        problems.append(f"floor={schedule.floor!r} must lie in [0, 1]")
    return problems
