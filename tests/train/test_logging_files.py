"""Curves and rows: what TensorBoard, Weights & Biases and `metrics.jsonl` get."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from deepeq.train import RunConfig, read_metrics
from deepeq.train.logging import MetricsFile, open_loggers
from deepeq.train.recipe import to_plain
from tests.train.conftest import with_train


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
