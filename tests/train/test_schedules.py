"""Schedules: hand-computed factors, the replay of validations, and what is refused."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepeq.train import Constant, Cosine, Drops, Geometric, Linear, NonMonotone, Plateau
from deepeq.train.schedules import Schedule

EXPECTED = {
    Constant(): [1.0, 1.0, 1.0, 1.0, 1.0],
    Linear(start=3.0, end=1.0): [3.0, 2.5, 2.0, 1.5, 1.0],
    Geometric(start=16.0, end=1.0): [16.0, 8.0, 4.0, 2.0, 1.0],
    Geometric(end=0.0001): [1.0, 0.1, 0.01, 0.001, 0.0001],
    Cosine(end=0.2): [1.0, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2 + 0.4 * (1 - 0.5**0.5), 0.2],
    Cosine(start=0.0, end=2.0): [0.0, 1 - 0.5**0.5, 1.0, 1 + 0.5**0.5, 2.0],
    Drops(at=(0.25, 0.9), multiplier=0.5): [1.0, 0.5, 0.5, 0.5, 0.25],
    Drops(at=(0.6,), multiplier=3.0): [1.0, 1.0, 1.0, 3.0, 3.0],
    Plateau(): [1.0] * 5,
    NonMonotone(at=(0.5, 0.75), floor=0.05): [1.0, 1.0, 0.1, 0.05, 0.05],
}
DEFAULTS = [Constant(), Linear(end=0.5), Geometric(end=0.5), Cosine(), Drops(), Plateau(), NonMonotone()]

losses = st.lists(st.floats(0.0, 10.0), max_size=30)


@pytest.mark.parametrize("schedule", EXPECTED, ids=repr)
def test_factors_at_the_quarters_of_a_run_are_those_computed_by_hand(schedule: Schedule) -> None:
    factors = [schedule.factor(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert factors == pytest.approx(EXPECTED[schedule], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("kind", [Linear, Geometric])
@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_ends_are_exact(kind: type[Linear] | type[Geometric], start: float, end: float) -> None:
    schedule = kind(start=start, end=end)
    assert (schedule.factor(0.0), schedule.factor(1.0)) == (start, end)


def test_plateau_multiplies_each_time_that_its_patience_runs_out() -> None:
    schedule = Plateau(multiplier=0.5, patience=1)
    validations = [5.0, 4.0, 4.0, 4.5, 3.0, 3.5, 3.2, 3.1, 3.0, 2.0]
    # 4.0 and 4.5 are the two without improvement; 3.5 and 3.2 again, and after them 3.1 and 3.0.
    factors = [schedule.factor(0.5, validations[:count]) for count in range(len(validations) + 1)]
    assert factors == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


def test_plateau_stops_at_its_floor() -> None:
    assert Plateau(patience=0, floor=0.3).factor(0.5, [1.0] * 9) == 0.3


@given(losses, st.integers(0, 3), st.floats(0.0, 1.0))
def test_plateau_equals_that_of_torch(validations: list[float], patience: int, improvement: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    peer = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, threshold=improvement, threshold_mode="abs", eps=0.0
    )
    schedule = Plateau(patience=patience, min_improvement=improvement)
    for count, loss in enumerate(validations, start=1):
        peer.step(loss)
        assert schedule.factor(0.0, validations[:count]) == optimizer.param_groups[0]["lr"]


def test_non_monotone_multiplies_where_a_validation_is_worse_than_the_best_before_its_interval() -> None:
    schedule = NonMonotone(multiplier=0.25, interval=2, floor=0.01)
    validations = [3.0, 2.0, 2.5, 2.9, 2.1, 1.0, 1.9, 2.05, 1.5]
    # Compared with the best of those more than two before: 2.9 < 3, 2.1 > 2, 1 < 2, 1.9 < 2, 2.05 > 2, 1.5 > 1.
    factors = [schedule.factor(0.5, validations[:count]) for count in range(len(validations) + 1)]
    assert factors == [1.0, 1.0, 1.0, 1.0, 1.0, 0.25, 0.25, 0.25, 0.0625, 0.015625]
    assert schedule.factor(0.5, [*validations, 9.0]) == 0.01


@given(losses, st.integers(1, 5))
def test_non_monotone_follows_its_definition(validations: list[float], interval: int) -> None:
    triggers = [
        loss
        for i, loss in enumerate(validations)
        if len(validations[:i]) > interval and loss > min(validations[:i][:-interval])
    ]
    assert NonMonotone(multiplier=0.5, interval=interval).factor(0.0, validations) == 0.5 ** len(triggers)


def test_shares_multiply_besides_the_validations() -> None:
    schedule = NonMonotone(multiplier=0.5, interval=0, at=(0.5,))
    assert [schedule.factor(progress, [1.0, 2.0]) for progress in (0.4, 0.5)] == [0.5, 0.25]


@pytest.mark.parametrize("schedule", DEFAULTS, ids=repr)
@given(losses, st.floats(0.0, 1.0))
def test_factor_is_a_pure_function(schedule: Schedule, validations: list[float], progress: float) -> None:
    before = list(validations)
    first = schedule.factor(progress, validations)
    schedule.factor(1.0 - progress, [*validations, 1.0])
    assert schedule.factor(progress, tuple(before)) == first >= 0.0
    assert validations == before


OPTIONS = {
    Linear(start=0.4, end=0.7): {"start": 0.5, "end": 0.9},
    Geometric(start=0.4, end=0.7): {"start": 0.5, "end": 0.9},
    Cosine(): {"start": 0.5, "end": 0.9},
    Drops(): {"at": (0.9,), "multiplier": 0.5},
    Plateau(): {"multiplier": 0.2, "patience": 0, "min_improvement": 1.5, "floor": 0.9},
    NonMonotone(multiplier=0.2): {"multiplier": 0.3, "interval": 1, "at": (0.1, 0.2), "floor": 0.9},
}


@pytest.mark.parametrize("schedule", OPTIONS, ids=repr)
def test_every_option_changes_the_factor(schedule: Schedule) -> None:
    assert set(OPTIONS[schedule]) == {f.name for f in fields(schedule)}
    validations = [9.0, 5.0, 4.0, 4.5, 4.2, 4.2, 4.1, 6.0]
    values = {name: getattr(schedule, name) for name in OPTIONS[schedule]}
    kind = type(schedule)
    factors = [kind(**(values | {name: value})).factor(0.6, validations) for name, value in OPTIONS[schedule].items()]
    assert schedule.factor(0.6, validations) not in factors


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Linear, {"start": -1.0, "end": float("inf")}, "Linear.start=-1.0 must be >= 0 and finite; Linear.end=inf"),
        (Geometric, {"start": 0.0, "end": -2.0}, "Geometric.start=0.0 must be > 0 and finite; Geometric.end=-2.0"),
        (Cosine, {"end": float("nan")}, "Cosine.end=nan must be >= 0"),
        (Drops, {"at": (0.5, 1.0), "multiplier": 0.0}, r"Drops.at=\(0.5, 1.0\) must lie in \(0, 1\); Drops.multiplier"),
        (
            Plateau,
            {"multiplier": 1.0, "patience": -1},
            r"Plateau.multiplier=1.0 must lie in \(0, 1\); Plateau.patience",
        ),
        (Plateau, {"min_improvement": -0.1, "floor": 2.0}, r"Plateau.floor=2.0 .*; Plateau.min_improvement=-0.1"),
        (NonMonotone, {"interval": 1.5, "at": (0.0,)}, "NonMonotone.interval=1.5 .* whole number >= 0; NonMonotone.at"),
    ],
)
def test_values_out_of_range_are_named_together(kind: type[Schedule], values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_misspelled_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="patient"):
        Plateau(patient=2)  # pyright: ignore[reportCallIssue]
