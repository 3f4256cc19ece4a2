"""Averages and the metrics file."""

import json
import math
from pathlib import Path

import pytest
import torch

from deepeq.train.metrics import Averages, MetricsFile, quality, read_metrics


def test_bits_and_perplexity_of_a_uniform_guess() -> None:
    assert quality("character", math.log(8)) == pytest.approx({"bits_per_character": 3.0})
    assert quality("word", math.log(8)) == pytest.approx({"perplexity": 8.0})


def test_means_are_weighted_and_maxima_kept() -> None:
    averages = Averages()
    averages.add("nll", torch.tensor(1.0), 3)
    averages.add("nll", torch.tensor(5.0), 1)
    for value in (2.0, 7.0, 4.0):
        averages.add_max("residual", torch.tensor(value))
    assert averages.compute() == pytest.approx({"nll": 2.0, "residual": 7.0})


def test_restored_averages_go_on_exactly() -> None:
    averages, other = Averages(), Averages()
    averages.add("nll", torch.tensor(0.1), 3)
    averages.add_max("residual", torch.tensor(0.1, dtype=torch.float64) / 3)
    other.restore(json.loads(json.dumps(averages.state())))
    assert other.compute() == averages.compute()


def test_resumed_file_drops_the_lines_past_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    for step in (1, 2, 3):
        file.write({"split": "train", "step": step, "nll": float(step)})
    with path.open("a") as cut:
        cut.write('{"split": "train", "st')
    MetricsFile(path, step=2).write({"split": "train", "step": 3, "nll": 9.0})
    assert [(row["step"], row["nll"]) for row in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    MetricsFile(path, step=0)
    assert read_metrics(path) == []


def test_damaged_line_is_named_and_missing_file_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("oops\n" + json.dumps({"split": "train", "step": 1}) + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .*metrics.jsonl is no JSON object"):
        read_metrics(path)
    with pytest.raises(FileNotFoundError, match="is .* the folder of a run"):
        read_metrics(tmp_path / "nothing" / "metrics.jsonl")
