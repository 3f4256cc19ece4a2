"""Runs that a benchmark compares: trained by `deepeq train`, in parts of some minutes if asked, and read back."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from _harness import RECIPES, Benchmark

from deepeq.train import EquilibriumConfig, RunConfig, RunFolder, load_config, read_metrics, save_config


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run to train."""

    name: str
    """Name of its folder."""
    label: str
    """Name in tables and figures."""
    recipe: str
    """File in `recipes/`, without .yaml."""
    depth: int | None = None
    """Number of layers of a weight-tied stack of the recipe's cell; None for the network of the recipe."""
    options: tuple[str, ...] = ()
    """More options of `deepeq train`."""

    def config(self) -> RunConfig:
        """Return the configuration, without the options."""
        config = load_config(RECIPES / f"{self.recipe}.yaml")
        if self.depth is None:
            return config
        return replace(config, model=replace(config.model, depth=self.depth), equilibrium=EquilibriumConfig())


class Outcome(NamedTuple):
    """What a finished run reached."""

    name: str
    label: str
    config: RunConfig
    result: dict[str, Any]  # result.json
    tokens: int  # that it was trained on
    valid: list[tuple[int, float, float]]  # (tokens, seconds, quality) of each validation
    rows: list[dict[str, Any]]  # metrics.jsonl

    def quality(self, split: str) -> float:
        """Return the perplexity per token, or the loss where there is no text."""
        return quality({name.removeprefix(f"{split}_"): value for name, value in self.result.items()})


def quality(values: Mapping[str, Any]) -> float:
    """Return the perplexity per token, or the loss, from what a run reports about a text."""
    if "bits_per_character" in values:
        return 2.0 ** values["bits_per_character"]
    return values["perplexity"] if "perplexity" in values else values["loss"]


def add_options(benchmark: Benchmark, *, sizes: Iterable[str] = ()) -> None:
    """Add the options of a benchmark that trains: `--runs`, `--minutes`, and `--size` where there are several."""
    parser = benchmark.parser
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: OUT/runs)")
    parser.add_argument("--minutes", type=float, help="stop after this time; the same command continues")
    if sizes:
        parser.add_argument("--size", choices=tuple(sizes), default="two_cores", help="which recipes")


def runs_folder(benchmark: Benchmark) -> Path:
    """Return the folder of the runs that the arguments name."""
    return benchmark.arguments.runs or benchmark.arguments.out / "runs"


def train_all(benchmark: Benchmark, runs: Sequence[Planned]) -> tuple[list[Outcome], bool]:
    """Train what is not finished yet, one run after the other, as long as `--minutes` allows.

    Returns:
        The finished runs, and whether all of them are finished.

    Raises:
        SystemExit: A run failed, or the folder has a run of the same name that was planned differently.
    """
    folder, minutes = runs_folder(benchmark), benchmark.arguments.minutes
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    finished = all(_train(run, folder / run.name, deadline) for run in runs)
    done = [run for run in runs if RunFolder(folder / run.name).result.exists()]
    return [_outcome(run, folder / run.name) for run in done], finished


def continue_later(benchmark: Benchmark, finished: int, total: int) -> None:
    """Say how many runs are finished, and end with an error where some are not."""
    if finished < total:
        benchmark.stop(f"{finished} of {total} runs are finished; continue with the same command")


def _train(run: Planned, path: Path, deadline: float) -> bool:
    recipe, options = (path.parent / f"{run.name}.{kind}" for kind in ("yaml", "options"))
    if options.exists() and (options.read_text().splitlines() != [*run.options] or load_config(recipe) != run.config()):
        raise SystemExit(f"the run {path} was planned differently; remove it and {options}, or take another folder")
    if RunFolder(path).result.exists():
        return True
    if time.monotonic() >= deadline:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    save_config(run.config(), recipe)
    options.write_text("\n".join(run.options))
    command = [sys.executable, "-m", "deepeq", "train", "--config", str(recipe), "--run.dir", str(path)]
    process = subprocess.Popen([*command, "--resume", "auto", *run.options], stdout=subprocess.DEVNULL)
    try:
        code = process.wait(None if deadline == math.inf else deadline - time.monotonic())
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGINT)  # it saves a checkpoint
        process.wait()
        return RunFolder(path).result.exists()
    if code:
        raise SystemExit(f"the run {path} failed with exit code {code}; its last lines say why")
    return True


def _outcome(run: Planned, path: Path) -> Outcome:
    folder = RunFolder(path)
    config, result = load_config(folder.config, complete=True), json.loads(folder.result.read_text())
    tokens_per_step = config.train.batch_size * config.train.segment_len
    rows = read_metrics(folder.metrics)
    valid = [(row["step"] * tokens_per_step, row["seconds"], quality(row)) for row in rows if row["split"] == "valid"]
    del result["run_dir"]  # a path of this machine
    return Outcome(run.name, run.label, config, result, result["num_steps"] * tokens_per_step, valid, rows)
