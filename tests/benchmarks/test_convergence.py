"""The benchmark of convergence, on tiny runs."""

import json
import statistics
from pathlib import Path

import convergence
import pytest
import torch

from deepeq import Anderson, Result
from deepeq.cell import prepare
from deepeq.models import TiedNetwork
from deepeq.train import open_model
from tests.benchmarks.conftest import Bench


@torch.no_grad()
def stacked(path: Path, length: int, num_evals: int) -> list[list[float]]:
    """Relative residuals of `z <- f(z)` by a plain loop: one list for each sequence."""
    trained = open_model(path)
    model, how = trained.model, trained.how
    assert isinstance(model.network, TiedNetwork)
    ids = trained.load_corpus().valid.long()  # pyright: ignore[reportAttributeAccessIssue]
    traces = []
    for row in ids[: len(ids) // 2 * 2].view(2, -1):
        row = row.unsqueeze(0)
        memory = model(
            row[:, 8:16], model(row[:, :8], how=how).memory, how=how
        ).memory  # 12 positions need two segments of 8
        f, z = prepare(model.network.cell, model.embedding(row[:, 16 : 16 + length]), memory=memory)
        traces.append([])
        for _ in range(num_evals):
            fz = f(z)
            traces[-1].append(float((fz - z).norm() / fz.norm()))
            z = fz
    return traces


def test_every_run_length_and_solver_is_traced(bench: Bench, runs: Path) -> None:
    paths = [runs / "equilibrium", runs / "pieces", runs / "stack"]
    options = ["--lengths", "24", "10", "--batch_size", "2", "--num_evals", "15"]
    result = bench(convergence, "--runs", *paths, *options)
    assert [(run["name"], run["depth"]) for run in result["runs"]] == [("equilibrium", 0), ("pieces", 0), ("stack", 4)]
    measured = [[(record["T"], record["first_piece"]) for record in run["lengths"]] for run in result["runs"]]
    assert measured == [[(10, False), (24, False)], [(4, True), (10, False), (24, False)], [(10, False), (24, False)]]
    for run in result["runs"]:
        for solved in (solved for record in run["lengths"] for solved in record["solvers"].values()):
            middle, low, high = (solved[f"relative_{part}"] for part in ("median", "min", "max"))
            assert len(middle) == solved["num_evals"] <= 15
            assert all(a <= b <= c for a, b, c in zip(low, middle, high, strict=True))
            assert solved["best_residual"] <= 1.001 * solved["last_residual"]
    assert "history_size=7" in result["runs"][0]["lengths"][0]["solvers"]["Broyden, window of the recipe"]["solver"]


@pytest.mark.parametrize("name", ["equilibrium", "stack"])
def test_residuals_are_those_of_the_cell_with_its_memory(name: str, bench: Bench, runs: Path) -> None:
    options = ["--lengths", "24", "--batch_size", "2", "--num_evals", "8"]
    result = bench(convergence, "--runs", runs / name, *options)
    solvers = result["runs"][0]["lengths"][0]["solvers"]
    solved, expected = solvers["stacking, z <- f(z)"], stacked(runs / name, 24, 8)
    assert solved["relative_max"] == pytest.approx([max(pair) for pair in zip(*expected, strict=True)], rel=2e-3)
    first = [next(step for step, value in enumerate(trace, 1) if value <= 0.1) for trace in expected]
    assert solved["evaluations_to"]["0.1"] == statistics.median(first)
    assert solved["evaluations_to"]["1e-05"] is None
    damped = solvers["stacking, damped by 0.5"]["relative_max"]
    assert damped[0] == pytest.approx(solved["relative_max"][0])
    assert damped[2] != pytest.approx(solved["relative_max"][2])


def test_evaluations_to_a_tolerance() -> None:
    relative = torch.tensor([[1.0, 1.0, 1.0], [0.05, 0.5, 1.0], [0.5, 0.1, 1.0]])
    assert convergence.evaluations_to(relative, 0.1) == 3
    assert convergence.evaluations_to(relative, 0.06) == float("inf")
    assert convergence.evaluations_to(relative[:, :1], 0.06) == 2


def test_a_solve_that_is_not_finite_is_recorded() -> None:
    traced = convergence.trace(lambda z: z.exp() * 100, torch.zeros(2, 3), Anderson(rtol=1e-6, max_steps=30))
    described = convergence.describe(traced)
    assert described["outcome"] == Result.NONFINITE.name.lower()
    assert described["relative_median"][-1] is None
    json.dumps(described, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere", "", "convergence: .*nowhere"),
        ("stack", "--lengths 4000", "convergence: .* needs 4016"),
        ("copy_memory", "", "convergence: .*copy_memory must be the run of a model of text"),
    ],
)
def test_a_run_that_does_not_fit_is_named(name: str, options: str, message: str, bench: Bench, runs: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        bench(convergence, "--runs", runs / name, *options.split())


def test_runs_of_the_same_name_are_refused(bench: Bench, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench(convergence, "--runs", runs / "stack", runs / "stack")
    assert "--runs must be folders of different names" in capsys.readouterr().err
