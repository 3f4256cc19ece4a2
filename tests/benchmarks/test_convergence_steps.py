"""The benchmarks of convergence and of steps, on tiny runs."""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import convergence
import pytest
import steps
import torch

from deepeq import GMRES, Anderson, Broyden, Result, Solution
from deepeq.data import DataConfig
from deepeq.models import LayerConfig, ModelConfig, TiedNetwork, TransformerConfig, TrellisConfig
from deepeq.train import RunFolder, train
from deepeq.train.config import EquilibriumConfig, FolderConfig, OptimizerConfig, RunConfig, TrainConfig
from deepeq.train.evaluate_run import EvaluationOptions, evaluate_run

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 60
TRANSFORMER = TransformerConfig(d_model=16, num_heads=2, d_inner=32, memory_len=12, init_std=0.3)
TRELLIS = TrellisConfig(d_input=8, d_hidden=16, d_output=8)
EQUILIBRIUM = EquilibriumConfig(
    solver=Anderson(rtol=1e-2, max_steps=8),
    backward=GMRES(rtol=1e-1, max_steps=6),
    evaluation=Broyden(rtol=1e-3, max_steps=20, history_size=7),
    warm_up_share=0.3,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: an equilibrium, the same in pieces for trellis networks, and a tied stack."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "fox.txt"
    text.write_text(TEXT)

    def run(name: str, layer: LayerConfig, equilibrium: EquilibriumConfig, depth: int = 0) -> None:
        train(
            RunConfig(
                data=DataConfig(files=(str(text),)),
                model=ModelConfig(layer=layer, depth=depth),
                equilibrium=equilibrium,
                optimizer=OptimizerConfig(lr=1e-2, warm_up_steps=2),
                train=TrainConfig(
                    steps=10, batch_size=4, segment_len=8, eval_batch_size=2, log_every=1, accelerator="cpu"
                ),
                run=FolderConfig(dir=str(folder / name)),
            )
        )

    run("equilibrium", TRANSFORMER, EQUILIBRIUM)
    run("pieces", TRELLIS, replace(EQUILIBRIUM, subsequence_len=4))
    run("stack", TRANSFORMER, EquilibriumConfig(), depth=5)
    return folder


def bench(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, out: Path, runs: list[Path], *options: str
) -> dict[str, Any]:
    name = module.__name__
    monkeypatch.setattr(sys, "argv", [name, "--out", str(out), "--runs", *map(str, runs), *options])
    module.main()
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / f"{name}.md").read_text().count("\n") > 5
    return json.loads((out / f"{name}.json").read_text())


@torch.no_grad()
def stacked(path: Path, length: int, num_evals: int) -> list[list[float]]:
    """Relative residuals of `z <- f(z)` by a plain loop: one list a sequence."""
    config, _, model = RunFolder(path).load_model()
    assert isinstance(model.network, TiedNetwork)
    ids = RunFolder(path).load_corpus(config).valid.long()  # pyright: ignore[reportAttributeAccessIssue]
    traces = []
    for row in ids[: len(ids) // 2 * 2].view(2, -1):
        row = row.unsqueeze(0)
        memory = model(row[:, 8:16], model(row[:, :8]).memory).memory  # 12 positions need two segments of 8
        f, z = model.network.core.prepare(model.embedding(row[:, 16 : 16 + length]), memory=memory)
        traces.append([])
        for _ in range(num_evals):
            fz = f(z)
            traces[-1].append(float((fz - z).norm() / fz.norm()))
            z = fz
    return traces


def test_convergence_traces_every_run_length_and_solver(runs, tmp_path, monkeypatch):
    paths = [runs / "equilibrium", runs / "pieces", runs / "stack"]
    options = ["--lengths", "24", "10", "--batch_size", "2", "--num_evals", "15"]
    result = bench(monkeypatch, convergence, tmp_path, paths, *options)
    assert [(run["name"], run["depth"]) for run in result["runs"]] == [("equilibrium", 0), ("pieces", 0), ("stack", 5)]
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
def test_convergence_is_that_of_the_cell_with_its_memory(name, runs, tmp_path, monkeypatch):
    options = ["--lengths", "24", "--batch_size", "2", "--num_evals", "8"]
    result = bench(monkeypatch, convergence, tmp_path, [runs / name], *options)
    solvers = result["runs"][0]["lengths"][0]["solvers"]
    solved, expected = solvers["stacking, z <- f(z)"], stacked(runs / name, 24, 8)
    assert solved["relative_max"] == pytest.approx([max(pair) for pair in zip(*expected, strict=True)], rel=2e-3)
    first = [next(step for step, value in enumerate(trace, 1) if value <= 0.1) for trace in expected]
    assert solved["evaluations_to"]["0.1"] == statistics.median(first)
    assert solved["evaluations_to"]["1e-05"] is None
    damped = solvers["stacking, damped by 0.5"]["relative_max"]
    assert damped[0] == pytest.approx(solved["relative_max"][0])
    assert damped[2] != pytest.approx(solved["relative_max"][2])


def test_evaluations_to_a_tolerance():
    relative = torch.tensor([[1.0, 1.0, 1.0], [0.05, 0.5, 1.0], [0.5, 0.1, 1.0]])
    assert convergence.evaluations_to(relative, 0.1) == 3
    assert convergence.evaluations_to(relative, 0.06) == float("inf")
    assert convergence.evaluations_to(relative[:, :1], 0.06) == 2


def test_a_solve_that_is_not_finite_is_recorded():
    traced = convergence.trace(lambda z: z.exp() * 100, torch.zeros(2, 3), Anderson(rtol=1e-6, max_steps=30))
    described = convergence.describe(traced)
    assert described["outcome"] == Result.NONFINITE.name.lower()
    assert described["relative_median"][-1] is None
    assert isinstance(traced.solution, Solution)
    json.dumps(described, allow_nan=False)


def test_steps_are_those_of_evaluate_run_and_of_the_metrics(runs, tmp_path, monkeypatch):
    options = ["--max_tokens", "0", "--rtols", "0.01", "1", "--limits", "4", "1"]
    run = bench(monkeypatch, steps, tmp_path, [runs / "equilibrium"], *options)["runs"][0]
    assert set(run["sweeps"]) == {"Broyden", "Anderson"}
    for name, solver in (("Broyden", Broyden(history_size=7)), ("Anderson", Anderson())):
        points = run["sweeps"][name]["by_tolerance"] + run["sweeps"][name]["by_limit"]
        limits = [(point["rtol"], point["max_steps"]) for point in points]
        assert limits == [(1.0, 100), (0.01, 100), (1e-6, 1), (1e-6, 4)]
        for point, (rtol, max_steps) in zip(points, limits, strict=True):
            options = EvaluationOptions(split="valid", solver=solver, rtol=rtol, max_steps=max_steps, device="cpu")
            expected = evaluate_run(runs / "equilibrium", options)
            assert point["bits_per_character"] == pytest.approx(expected["bits_per_character"], rel=1e-4)
            assert point["mean_steps"] == pytest.approx(expected["forward_steps"], rel=1e-4)
            assert 0 < point["mean_residual"] <= point["worst_residual"]
    assert run["num_tokens"] == expected["num_tokens"]
    assert run["training"]["train"]["step"] == [4, 5, 6, 7, 8, 9, 10]  # the first three are warm-up
    assert len(run["training"]["train"]["backward_steps"]) == 7


def test_steps_reads_the_first_tokens_alone(runs, tmp_path, monkeypatch):
    options = ["--max_tokens", "40", "--rtols", "0.1", "--limits", "2"]
    paths = [runs / "equilibrium", runs / "pieces"]
    result = bench(monkeypatch, steps, tmp_path, paths, *options)
    assert [run["num_tokens"] for run in result["runs"]] == [38, 38]  # two streams, whose first tokens are no targets
    assert result["runs"][1]["subsequence_len"] == 4


@pytest.mark.parametrize(
    ("module", "name", "options", "message"),
    [
        (convergence, "nowhere", "", "convergence: .*nowhere"),
        (convergence, "stack", "--lengths 4000", "convergence: .* needs 4016"),
        (steps, "nowhere", "", "steps: .*nowhere"),
        (steps, "stack", "", "steps: .*stack must be the run of an equilibrium model"),
        (steps, "equilibrium", "--max_tokens 3", "steps: a text of 3 tokens is too short"),
    ],
)
def test_a_run_that_does_not_fit_is_named(module, name, options, message, runs, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        bench(monkeypatch, module, tmp_path, [runs / name], *options.split())
