"""Runs that a benchmark compares: trained by `deepeq train`, in slices of a few minutes if asked, and read back."""

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

from deepeq.train import RunFolder, load_config
from deepeq.train.config import EquilibriumConfig, RunConfig, save_config
from deepeq.train.metrics import read_metrics

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run to come."""

    name: str
    """Of its folder."""
    label: str
    """In tables and figures."""
    recipe: str
    """File in `recipes/`, without .yaml."""
    depth: int | None = None
    """Layers of the weight-tied stack of the recipe's cell, in the place of what the recipe makes of it."""
    options: tuple[str, ...] = ()
    """More options of `deepeq train`."""

    def config(self) -> RunConfig:
        """The configuration, without the options."""
        config = load_config(RECIPES / f"{self.recipe}.yaml")
        if self.depth is None:
            return config
        model = replace(config.model, depth=self.depth)
        return replace(config, model=model, equilibrium=EquilibriumConfig())


class Outcome(NamedTuple):
    """What a finished run has reached."""

    name: str
    label: str
    result: dict[str, Any]  # of result.json
    tokens: int  # that it was trained on
    valid: list[tuple[int, float, float]]  # (tokens, seconds, quality) of each validation
    rows: list[dict[str, Any]]  # of metrics.jsonl

    def quality(self, split: str) -> float:
        """Perplexity a token, or the loss where there is no text."""
        return quality({name.removeprefix(f"{split}_"): value for name, value in self.result.items()})


def quality(values: Mapping[str, Any]) -> float:
    """Perplexity a token, or the loss, from what a run reports about a text."""
    if "bits_per_character" in values:
        return 2.0 ** values["bits_per_character"]
    return values["perplexity"] if "perplexity" in values else values["loss"]


def train_all(runs: Iterable[Planned], folder: Path, *, minutes: float | None) -> bool:
    """Train what is not finished yet, one run after the other, for so many minutes; returns whether all are finished.

    Raises:
        SystemExit: a run failed, or the folder has one of the same name that was planned differently.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    return all(_train(run, folder / run.name, deadline) for run in runs)


def outcomes(runs: Sequence[Planned], folder: Path) -> list[Outcome]:
    """The finished ones among the runs."""
    return [_outcome(run, folder / run.name) for run in runs if RunFolder(folder / run.name).result.exists()]


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
    return Outcome(run.name, run.label, result, result["num_steps"] * tokens_per_step, valid, rows)
