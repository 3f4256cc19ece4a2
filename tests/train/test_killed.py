"""A run that is killed at any moment continues to the same numbers, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deepeq.train import RunConfig, read_metrics, save_config
from tests.train.conftest import with_train

TIMES = ("seconds", "tokens_per_second", "peak_memory_mb")


def rows(folder: Path) -> list[dict]:
    kept = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in kept]


def num_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_run_killed_twenty_times_has_the_numbers_of_an_uninterrupted_one(config: RunConfig, tmp_path: Path) -> None:
    config = with_train(config, steps=200, eval_every=40, checkpoint_every=3)
    config = replace(config, model=replace(config.model, input_dropout=0.1, output_dropout=0.1))
    recipe = tmp_path / "recipe.yaml"
    save_config(config, recipe)

    def start(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "deepeq", "train", "--config", str(recipe), "--run.dir", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, "--resume", "auto"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    moments = random.Random(0)
    for kill in range(20):
        process = start(killed)
        if kill % 5 == 0:  # at some moment of its start
            time.sleep(moments.uniform(0.0, 3.0))
        else:  # at some moment of the next few steps
            last = num_lines(killed) + moments.randrange(8)
            while num_lines(killed) <= last and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.1))
        assert process.poll() is None, "the run ended before it was killed twenty times; give it more steps"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(killed).wait() == 0
    assert rows(killed) == rows(whole)
