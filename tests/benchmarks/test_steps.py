"""The benchmark of steps, on tiny runs."""

from pathlib import Path

import pytest
import steps

from deepeq import Anderson, Broyden
from deepeq.train import EvaluationOptions, evaluate_run
from tests.benchmarks.conftest import Bench


def test_steps_are_those_of_evaluate_run_and_of_the_metrics(bench: Bench, runs: Path) -> None:
    options = ["--max_tokens", "0", "--rtols", "0.01", "--limits", "4", "1"]
    run = bench(steps, "--runs", runs / "equilibrium", *options)["runs"][0]
    assert set(run["sweeps"]) == {"Broyden", "Anderson"}
    for name, solver in (("Broyden", Broyden(history_size=7)), ("Anderson", Anderson())):
        points = run["sweeps"][name]["by_tolerance"] + run["sweeps"][name]["by_limit"]
        limits = [(point["rtol"], point["max_steps"]) for point in points]
        assert limits == [(0.01, 100), (1e-6, 1), (1e-6, 4)]
        for point, (rtol, max_steps) in zip(points, limits, strict=True):
            expected_with = EvaluationOptions(
                split="valid", solver=solver, rtol=rtol, max_steps=max_steps, device="cpu"
            )
            expected = evaluate_run(runs / "equilibrium", expected_with)
            assert point["bits_per_character"] == pytest.approx(expected["bits_per_character"], rel=1e-4)
            assert point["mean_steps"] == pytest.approx(expected["forward_steps"], rel=1e-4)
            assert 0 < point["mean_residual"] <= point["worst_residual"]
            assert run["num_tokens"] == expected["num_tokens"]
    assert run["training"]["train"]["step"] == [4, 5, 6, 7, 8, 9, 10]  # the first three are pretraining
    assert len(run["training"]["train"]["backward_steps"]) == 7


def test_only_the_first_tokens_are_read(bench: Bench, runs: Path) -> None:
    options = ["--max_tokens", "40", "--rtols", "0.1", "--limits", "2"]
    result = bench(steps, "--runs", runs / "pieces", *options)
    assert result["runs"][0]["num_tokens"] == 38  # two streams, whose first tokens are no targets
    assert result["runs"][0]["piece_len"] == 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere", "", "steps: .*nowhere"),
        ("stack", "", "steps: .*stack must be the run of an equilibrium model"),
        ("equilibrium", "--max_tokens 3", "steps: a text of 3 tokens is too short"),
    ],
)
def test_a_run_that_does_not_fit_is_named(name: str, options: str, message: str, bench: Bench, runs: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        bench(steps, "--runs", runs / name, *options.split())
