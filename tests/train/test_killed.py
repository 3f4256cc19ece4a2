"""A run that is killed at any moment goes on to the same numbers, bit for bit."""

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deepeq.train import RunConfig
from deepeq.train.config import save_config
from deepeq.train.metrics import read_metrics
from tests.train.conftest import with_train

TIMES = ("seconds", "tokens_per_second", "peak_memory_mb")


def rows(folder: Path) -> list[dict]:
    kept = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in kept]


@pytest.mark.slow
def test_run_killed_twenty_times_has_the_numbers_of_an_uninterrupted_one(config: RunConfig, tmp_path: Path) -> None:
    config = with_train(config, steps=200, eval_every=40, checkpoint_every=5, batch_size=16, segment_len=32)
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
    moments, num_kills = random.Random(0), 0
    while num_kills < 20:
        process = start(killed)
        try:
            assert process.wait(moments.uniform(3.0, 9.0)) == 0
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            num_kills += 1
    assert num_kills == 20, "the run ended before it was killed twenty times; give it more steps"
    assert start(killed).wait() == 0
    assert rows(killed) == rows(whole)
