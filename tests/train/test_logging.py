"""Warnings of the metrics: when they come, when they do not, and what they say."""

import json
from pathlib import Path
from typing import Any

import pytest

from deepeq.train.logging import diagnostics

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def train_rows(fractions: list[float], direction: str = "forward", **values: Any) -> list[dict[str, Any]]:
    name = f"{direction}_unconverged"
    return [
        {"split": "train", "step": 20 * i, name: fraction, **values} for i, fraction in enumerate(fractions, start=1)
    ]


def valid_rows(radii: list[float]) -> list[dict[str, Any]]:
    return [{"split": "valid", "step": 100 * i, "spectral_radius": radius} for i, radius in enumerate(radii, start=1)]


def steps_with_a_warning(rows: list[dict[str, Any]]) -> list[int]:
    return [rows[i]["step"] for i in range(len(rows)) if diagnostics(rows[: i + 1])]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_growing_fraction_of_unconverged_solves_is_told_with_numbers_and_advice(direction: str) -> None:
    rows = train_rows([0.02, 0.03, 0.01, 0.02, 0.02, 0.23], direction)
    assert steps_with_a_warning(rows) == [120]
    (sentence,) = diagnostics(rows)
    solver = {"forward": "solver", "backward": "backward_solver"}[direction]
    expected = (
        "step 120:",
        f"23% of the {direction} solves",
        "2.0% was usual",
        "jacobian_weight",
        "optimizer.lr",
        "pretrain_fraction",
        f"equilibrium.{solver}.max_steps",
        f"equilibrium.{solver}.rtol",
    )
    for part in expected:
        assert part in sentence, part


def test_same_reason_is_told_again_only_when_it_doubled() -> None:
    rows = train_rows([0.0] * 6 + [0.12, 0.12, 0.05, 0.15, 0.23, 0.24, 0.3, 0.47, 0.49])
    assert steps_with_a_warning(rows) == [140, 240, 300]


def test_fraction_that_was_always_high_is_no_news() -> None:
    assert steps_with_a_warning(train_rows([0.3] * 10 + [0.59])) == []
    assert steps_with_a_warning(train_rows([0.3] * 10 + [0.6])) == [220]


def test_few_unconverged_solves_or_few_rows_are_no_reason() -> None:
    assert steps_with_a_warning(train_rows([0.0] * 10 + [0.099])) == []
    assert steps_with_a_warning(train_rows([0.0, 0.0, 0.0, 0.0, 0.5])) == []
    assert steps_with_a_warning(train_rows([0.0, 0.0, 0.0, 0.0, 0.0, 0.5])) == [120]


def test_shallow_stack_neither_warns_nor_counts() -> None:
    stack = train_rows([0.0] * 10 + [1.0] * 10, pretraining=1.0)
    assert steps_with_a_warning(stack) == []
    rows = train_rows([0.02] * 5 + [0.5], pretraining=0.0)
    assert diagnostics(stack + rows) == diagnostics(rows) != []
    assert diagnostics(rows + stack[-1:]) == []
    assert diagnostics(stack + rows[4:]) == []  # one row with a solver does not tell what is usual


def test_both_directions_warn_in_one_row() -> None:
    rows = [
        a | b for a, b in zip(train_rows([0.0] * 5 + [0.2]), train_rows([0.0] * 5 + [0.4], "backward"), strict=True)
    ]
    forward, backward = diagnostics(rows)
    assert "20% of the forward" in forward
    assert "40% of the backward" in backward


def test_spectral_radius_that_grew_by_a_half_is_told() -> None:
    rows = valid_rows([0.9, 0.8, 1.1, 1.25, 1.3, 1.87, 1.88])
    assert steps_with_a_warning(rows) == [400, 700]  # 1.25 > 1.5 * 0.8, then 1.88 > 1.5 * 1.25
    (sentence,) = diagnostics(rows[:4])
    for part in ("step 400:", "1.25", "0.80", "jacobian_weight", "optimizer.lr"):
        assert part in sentence, part


def test_spectral_radius_of_the_shallow_stack_does_not_count() -> None:
    stack, solver = train_rows([1.0], pretraining=1.0), train_rows([0.0], pretraining=0.0)
    early, late = valid_rows([0.2, 0.9, 1.3]), valid_rows([1.4, 1.3, 2.1])
    assert steps_with_a_warning(stack + early) == []
    assert steps_with_a_warning(stack + early + solver + late) == [300]
    assert diagnostics(stack + early + solver + late) == diagnostics(late)


def test_contracting_or_steady_map_is_healthy() -> None:
    assert steps_with_a_warning(valid_rows([0.3, 0.6, 0.9, 1.0])) == []
    assert steps_with_a_warning(valid_rows([1.5, 1.9, 2.2])) == []
    assert steps_with_a_warning(valid_rows([4.0])) == []


def test_rows_of_another_kind_between_them_change_nothing() -> None:
    rows = train_rows([0.0] * 5 + [0.5])
    others = [row | {"forward_unconverged": 0.9} for row in valid_rows([0.5] * 10)]
    assert diagnostics(others + rows) == diagnostics(rows) != []
    radii = valid_rows([1.0, 1.5])
    assert diagnostics([{"split": "test", "step": 1, "spectral_radius": 0.5}, *radii]) == diagnostics(radii) != []
    mixed = [*others, *rows]
    assert diagnostics([*mixed, {"split": "test", "step": 120, "nll": 1.0}]) == []
    assert diagnostics([]) == []
    assert diagnostics([{"split": "train", "step": 20, "nll": 1.0}, {"split": "valid", "step": 20, "nll": 1.0}]) == []


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("metrics.jsonl")), ids=lambda path: path.parent.name)
def test_committed_runs_are_healthy(path: Path) -> None:
    assert steps_with_a_warning([json.loads(line) for line in path.read_text().splitlines()]) == []
