"""A whole run: what it writes, what it refuses, and how it continues after a kill."""

import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepeq import Broyden
from deepeq.cli import main
from deepeq.data import CopyMemoryConfig, Corpus, DataConfig, load_corpus
from deepeq.train import (
    RunConfig,
    RunFolder,
    load_config,
    open_model,
    read_metrics,
    save_config,
)
from deepeq.train import train as train_run
from tests.train.conftest import losses, tiny_run, train, with_layer, with_run, with_train


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def contents(folder: Path | None) -> dict[str, bytes]:
    assert folder is not None
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that `config` describes, to copy."""
    path = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_run(text_file, path))
    return path


def test_run_learns_and_writes_what_it_promises(config: RunConfig) -> None:
    config = with_train(config, steps=100, eval_every=50)
    result = train_run(replace(config, optimizer=replace(config.optimizer, lr=4e-2)))
    assert result is not None
    folder = RunFolder(Path(result["run_dir"]))
    assert result["test_bits_per_character"] < result["baseline_bits_per_character"] - 0.5
    assert result["num_steps"] == 100
    assert result["num_params"] == open_model(folder.path).model.num_params
    assert json.loads(folder.result.read_text()) == result
    for path in (folder.config, folder.metrics, folder.best / "tokenizer.json", folder.last, folder.sample):
        assert path.stat().st_size > 0
    assert {path.stem for path in folder.figures.iterdir()} == {"loss", "steps", "convergence"}
    assert list(folder.path.glob("events.out.tfevents*"))
    rows = read_metrics(folder.metrics)
    warm = [row for row in rows if row["split"] == "train" and row["pretraining"]]
    rest = [row for row in rows if row["split"] == "train" and not row["pretraining"]]
    assert [row["step"] for row in warm] == list(range(1, 31))
    assert {row["forward_steps"] for row in warm} == {3.0}
    assert all("backward_steps" not in row for row in warm)
    for row in rest:
        assert 1 <= row["backward_steps"] <= 6
        assert 0 <= row["forward_unconverged"] <= 1
        assert row["tokens_per_second"] > 0
    assert sum("jacobian_penalty" in row for row in rest) == 35


def test_folder_in_use_and_missing_checkpoint_are_refused(config: RunConfig) -> None:
    train(with_train(config, steps=1))
    with pytest.raises(ValueError, match="already holds a run; add --resume auto"):
        train(config)
    with pytest.raises(ValueError, match="there is no checkpoint in .*elsewhere"):
        train(with_run(config, dir=str(Path(config.run.dir or "") / "elsewhere")), resume="yes")
    with pytest.raises(ValueError, match="resume='auto' needs run.dir"):
        train(with_run(config, dir=None), resume="auto")


def test_second_process_is_kept_out_of_the_folder(config: RunConfig) -> None:
    with RunFolder(Path(config.run.dir or "")).lock(), pytest.raises(ValueError, match="another process is training"):
        train(config)


def test_resuming_a_finished_run_repeats_its_result(config: RunConfig) -> None:
    first, again = train(config, resume="auto"), train(config, resume="auto")
    assert first["test_bits_per_character"] == again["test_bits_per_character"]
    assert len(losses(Path(first["run_dir"]), "test")) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "pickle"])
def test_damaged_checkpoint_is_one_sentence_and_the_one_before_goes_on(
    trained: Path, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(Path(shutil.copytree(trained, tmp_path / "run")))
    result = json.loads(folder.result.read_text())
    newest, before = folder.at_step(12), folder.at_step(10)
    (shard,), (intact,) = newest.glob("*.safetensors"), before.glob("*.safetensors")
    content, untouched = bytearray(shard.read_bytes()), intact.read_bytes()
    content[len(content) // 2] ^= 64
    trap = pickle.dumps(Trap(tmp_path / "ran"))
    shard.write_bytes({"cut": content[:-100], "flipped": content, "empty": b"", "pickle": trap}[damage])
    command = ["train", "--config", str(folder.config), "--run.dir", str(folder.path), "--resume", "auto"]
    capsys.readouterr()
    assert main(command) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert f"{newest} is damaged" in message
    assert f"delete it to continue from {before.name}" in message
    assert intact.read_bytes() == untouched
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(newest)
    again = train(load_config(folder.config), resume="auto")
    assert again["test_bits_per_character"] == result["test_bits_per_character"]


def test_resuming_tells_what_has_changed_and_refuses_what_cannot(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(with_train(config, steps=4))
    with pytest.raises(ValueError, match=r"another optimizer.name; start a new run"):
        train(replace(config, optimizer=replace(config.optimizer, name="sgd")), resume="yes")
    capsys.readouterr()
    train(replace(config, optimizer=replace(config.optimizer, lr=1e-3)), resume="yes")
    assert "continues with another optimizer.lr, train.steps" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["model", "train", "text", "steps"])
def test_resuming_another_run_is_refused_and_changes_nothing(config: RunConfig, part: str, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("abcdefgh hgfedcba " * 100)
    config = replace(config, data=replace(config.data, files=(str(own),)))
    train(with_train(config, steps=4))
    folder = RunFolder(Path(config.run.dir or ""))
    before = folder.config.read_text(), folder.metrics.read_text(), contents(folder.last)
    other = config
    if part == "model":
        other = with_layer(other, d_inner=16)
    elif part == "train":
        other = with_train(other, segment_len=4)
    elif part == "text":
        own.write_text("hgfedcba abcdefgh " * 100)
    else:
        other = with_train(other, steps=2)
    message = {"model": "another model.layer", "train": "another train.segment_len", "text": "text .* has changed"}
    with pytest.raises(ValueError, match=message.get(part, "past train.steps=2")):
        train(other, resume="yes")
    assert before == (folder.config.read_text(), folder.metrics.read_text(), contents(folder.last))


def test_run_in_float64_is_loaded_and_evaluated_in_float64(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = replace(config.equilibrium, eval_solver=Broyden(rtol=1e-10, max_steps=100))
    result = train(with_train(replace(config, equilibrium=exact), precision="64-true", steps=1))
    capsys.readouterr()
    assert main(["eval", "--run", str(config.run.dir)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["bits_per_character"] == pytest.approx(result["test_bits_per_character"], rel=1e-12)
    assert values["forward_unconverged"] == result["test_unconverged"]


def test_files_replace_the_task_of_a_recipe(config: RunConfig) -> None:
    config = replace(config, data=replace(config.data, corpus="copy_memory"))
    train(with_train(config, steps=1))
    assert main(["eval", "--run", str(config.run.dir)]) == 0


def test_copy_memory_trains_and_is_measured_in_its_own_loss(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = CopyMemoryConfig(blank_len=5, num_train=24, num_test=6)
    config = replace(config, data=DataConfig(corpus="copy_memory", copy_memory=task))
    config = with_train(with_layer(config, memory_len=0), segment_len=25, steps=20, eval_batch_size=4)
    result = train(config)
    assert result["baseline_loss"] == pytest.approx(10 * math.log(8) / 25)
    assert 0 < result["test_loss"] < 3
    assert result["test_num_tokens"] == 6 * 25
    capsys.readouterr()
    assert main(["eval", "--run", str(config.run.dir)]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result["test_loss"])
    assert main(["generate", "--run", str(config.run.dir), "--prompt", "1"]) == 2
    assert "not text to continue" in capsys.readouterr().err


def test_byte_pairs_are_measured_in_bits_per_byte(config: RunConfig) -> None:
    data = replace(config.data, unit="bpe", vocab_size=270)
    result, corpus = train(with_train(replace(config, data=data), steps=1)), load_corpus(data)
    assert isinstance(corpus, Corpus)
    bits_per_token = math.log2(result["test_perplexity"])
    expected = bits_per_token * len(corpus.test) / corpus.num_bytes["test"]
    assert result["test_bits_per_byte"] == pytest.approx(expected)
    assert result["test_bits_per_byte"] < bits_per_token


def test_training_leaves_the_arithmetic_of_the_process_as_it_was(config: RunConfig) -> None:
    train(with_train(config, steps=1))
    assert torch.tensor(1e-40) * 1.0 > 0


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
