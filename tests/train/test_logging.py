"""What a run reports: rows, curves, and warnings with what they say."""

import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from deepeq.train import RunConfig, read_metrics
from deepeq.train.logging import Display, MetricsFile, diagnostics, open_loggers
from deepeq.train.recipe import to_plain
from tests.train.conftest import with_train

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


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_solves_that_never_converge_are_told_once_after_the_first_rows(direction: str) -> None:
    rows = train_rows([1.0] * 5 + [0.9, 0.2, 0.9, 0.9], direction)
    assert steps_with_a_warning(rows) == [120]
    (sentence,) = diagnostics(rows[:6])
    solver = {"forward": "solver", "backward": "backward_solver"}[direction]
    effect = {"forward": "no equilibria", "backward": "gradients are inexact"}[direction]
    for part in ("step 120:", f"90% of the {direction} solves", effect, f"raise equilibrium.{solver}.max_steps"):
        assert part in sentence, part


def test_hard_first_rows_are_no_reason() -> None:
    assert steps_with_a_warning(train_rows([1.0] * 5 + [0.5, 0.4, 0.3])) == []
    assert steps_with_a_warning(train_rows([1.0] * 5)) == []


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
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # In version 0.1 the field had another name.
    rows = [row | {"pretraining": row.get("pretraining", row.get("warm_up"))} for row in rows]
    assert steps_with_a_warning(rows) == []


@pytest.fixture(autouse=True)
def _ordered_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in the order of their names: a second, then a count of the process, where 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def log(config: RunConfig, folder: Path, step: int, rows: dict[int, float]) -> None:
    folder.mkdir(exist_ok=True)
    with open_loggers(config, folder, step) as loggers:
        for at, value in rows.items():
            for logger in loggers:
                logger.log_metrics({"train/nll": value}, at)


def test_resumed_curve_replaces_what_was_logged_after_the_checkpoint(config: RunConfig, tmp_path: Path) -> None:
    log(config, tmp_path, 0, {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0})
    log(config, tmp_path, 2, {3: 3.5, 4: 2.5})
    assert curve(tmp_path, "train/nll") == [(1, 5.0), (2, 4.0), (3, 3.5), (4, 2.5)]


def test_run_killed_at_its_first_checkpoint_starts_its_curve_again(config: RunConfig, tmp_path: Path) -> None:
    log(config, tmp_path, 0, {1: 5.0, 2: 4.0})
    log(config, tmp_path, 0, {1: 6.0})
    assert curve(tmp_path, "train/nll") == [(1, 6.0)]


def test_curves_stay_in_the_folder_whatever_its_name(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELSEWHERE", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    for name in ("$ELSEWHERE", "~", "${ELSEWHERE} $(touch ran)", "-x; touch ran", "[red] {} %s", "new\nline"):
        log(config, Path(name), 0, {1: 5.0})
        assert curve(tmp_path / name, "train/nll") == [(1, 5.0)]
    assert len(list(tmp_path.iterdir())) == 6


def test_without_a_project_there_is_no_other_logger(config: RunConfig, tmp_path: Path) -> None:
    with open_loggers(config, tmp_path, 0) as loggers:
        assert len(loggers) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class StandIn:
    """What the logger uses of wandb, with its calls kept."""

    def __init__(self) -> None:
        self.runs: list[StandIn] = []
        self.arguments: dict[str, Any] = {}
        self.rows: list[dict[str, float]] = []
        self.finished = False

    def init(self, **arguments: Any) -> "StandIn":
        run = StandIn()
        run.arguments = arguments
        self.runs.append(run)
        return run

    def log(self, row: dict[str, float]) -> None:
        assert not self.finished
        self.rows.append(row)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The package in a form that needs no network and is always there."""
    used = StandIn()
    module, library, run = ModuleType("wandb"), ModuleType("wandb.sdk.lib"), ModuleType("wandb.wandb_run")
    vars(module).update(run=None, init=used.init)
    vars(library).update(RunDisabled=type("RunDisabled", (), {}))
    vars(run).update(Run=type("Run", (), {}))
    for name, part in (("wandb", module), ("wandb.sdk.lib", library), ("wandb.wandb_run", run)):
        monkeypatch.setitem(sys.modules, name, part)
    monkeypatch.setitem(sys.modules, "wandb.sdk", ModuleType("wandb.sdk"))
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    return used


def test_project_gets_the_metrics_and_the_configuration(config: RunConfig, tmp_path: Path, wandb: StandIn) -> None:
    config = with_train(config, wandb_project="equilibria")
    folder = tmp_path / "a run"
    log(config, folder, 0, {1: 5.0, 2: 4.0})
    (run,) = wandb.runs
    assert run.rows == [{"train/nll": 5.0, "trainer/global_step": 1}, {"train/nll": 4.0, "trainer/global_step": 2}]
    assert run.finished
    named = {name: run.arguments[name] for name in ("project", "name", "dir", "config")}
    assert named == {"project": "equilibria", "name": "a run", "dir": str(folder), "config": to_plain(config)}
    assert curve(folder, "train/nll") == [(1, 5.0), (2, 4.0)]


def test_resumed_run_keeps_its_id_and_another_run_has_its_own(
    config: RunConfig, tmp_path: Path, wandb: StandIn
) -> None:
    config = with_train(config, wandb_project="equilibria")
    for folder, step in (("one", 0), ("one", 2), ("other", 0), ("one", 0)):
        log(config, tmp_path / folder, step, {step + 1: 5.0})
    first, resumed, other, again = (run.arguments["id"] for run in wandb.runs)
    assert first == resumed
    assert len({first, other, again}) == 3


def test_package_is_not_touched_before_something_is_logged(config: RunConfig, tmp_path: Path, wandb: StandIn) -> None:
    with open_loggers(with_train(config, wandb_project="equilibria"), tmp_path, 0):
        pass
    assert not wandb.runs


def test_missing_package_is_one_sentence_that_says_what_to_install(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    sentence = "train.wandb_project='equilibria' needs the package wandb: pip install wandb"
    with pytest.raises(ValueError, match=sentence):
        open_loggers(with_train(config, wandb_project="equilibria"), tmp_path, 0).__enter__()


def test_resumed_file_drops_the_lines_past_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    for step in (1, 2, 3):
        file.log_metrics({"train/nll": float(step)}, step)
    with path.open("a") as cut:
        cut.write('{"split": "train", "st')
    MetricsFile(path, step=2).log_metrics({"train/nll": 9.0}, 3)
    assert [(row["step"], row["nll"]) for row in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    MetricsFile(path, step=0)
    assert read_metrics(path) == []


def test_damaged_line_is_named_and_missing_file_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("oops\n" + json.dumps({"split": "train", "step": 1}) + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .*metrics.jsonl is not a JSON object"):
        read_metrics(path)
    with pytest.raises(FileNotFoundError, match="is .* the folder of a run"):
        read_metrics(tmp_path / "nothing" / "metrics.jsonl")


def test_display_keeps_step_and_times_first_and_metrics_below() -> None:
    output = io.StringIO()
    display = Display(1000, console=Console(file=output, force_terminal=True, width=80))
    with display:
        display.step(120)
        display.metrics(120, "loss 1.523; " + "a long tail of numbers; " * 10)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", output.getvalue()).splitlines()
    second = next(line for line in lines if line.startswith("loss 1.523"))
    first = lines[lines.index(second) - 1]
    assert re.search(r"step +120/1000 +12% +\S+ left, +\S+ elapsed", first)
    assert max(map(len, lines[-3:])) <= 80
