"""Several processes do what one does. They are started by `torchrun`, two of them, on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepeq.cli import main
from deepeq.data import DataConfig
from deepeq.models import ModelConfig, TransformerConfig
from deepeq.train import RunConfig, RunFolder, train
from deepeq.train.config import EquilibriumConfig, FolderConfig, TrainConfig, save_config
from deepeq.train.metrics import read_metrics

TIMES = ("seconds", "tokens_per_second", "peak_memory_mb")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def config(text_file: Path, base: Path) -> RunConfig:
    """Fifty steps, ten of them warm-up, in float64, where rounding does not hide what differs."""
    layer = TransformerConfig(d_model=16, num_heads=2, d_inner=32, memory_len=8, weight_norm=True)
    return RunConfig(
        data=DataConfig(files=(str(text_file),)),
        model=ModelConfig(layer=layer),
        equilibrium=EquilibriumConfig(warm_up_share=0.2, jacobian_weight=0.1),
        train=TrainConfig(
            steps=50,
            batch_size=4,
            segment_len=8,
            eval_batch_size=2,
            eval_every=25,
            checkpoint_every=20,
            log_every=1,
            accelerator="cpu",
            precision="64-true",
        ),
        run=FolderConfig(dir=str(base / "one")),
    )


@pytest.fixture(scope="module")
def one(config: RunConfig) -> list[dict]:
    """What one process measured."""
    torch.set_num_threads(1)
    train(config)
    return rows(Path(config.run.dir or ""))


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two(config: RunConfig, base: Path, request: pytest.FixtureRequest) -> Path:
    """The folder of a run in two processes."""
    folder = base / request.param
    result = launch(config, folder, "--train.strategy", request.param)
    assert result.returncode == 0, result.stderr[-6000:]
    assert json.loads(result.stdout.strip().splitlines()[-1])["run_dir"] == str(folder)
    return folder


def launch(config: RunConfig, folder: Path, *options: str) -> subprocess.CompletedProcess:
    recipe = folder.parent / "recipe.yaml"
    save_config(config, recipe)
    processes = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "deepeq", "train"]
    return subprocess.run(
        [sys.executable, *processes, "--config", str(recipe), "--run.dir", str(folder), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def rows(folder: Path) -> list[dict]:
    kept = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in kept]


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) == 50 + 2 + 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert (ours["split"], ours["step"]) == (theirs["split"], theirs["step"])
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=0, abs=1e-6)
        # How far a solve went beyond its tolerance is more sensitive to rounding than what came of it.
        for name in theirs.keys() - {"split", "step", "nll"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-9), name


def test_two_processes_measure_what_one_does(two: Path, one: list[dict]) -> None:
    assert_same(rows(two), one)


def test_accumulated_parts_measure_what_the_whole_batch_does(config: RunConfig, one: list[dict], base: Path) -> None:
    folder = base / "accumulated"
    parts = replace(config.train, accumulate=4)
    train(replace(config, train=parts, run=FolderConfig(dir=str(folder))))
    assert_same(rows(folder), one)


def test_run_of_two_processes_is_used_and_resumed_by_one(
    two: Path, one: list[dict], config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--run", str(two), "--split", "test"]) == 0
    assert json.loads(capsys.readouterr().out)["nll"] == pytest.approx(one[-1]["nll"], rel=1e-4)  # evaluated in float32
    folder = RunFolder(tmp_path / "copy")
    shutil.copytree(two, folder.path)
    shutil.rmtree(folder.at_step(50, sharded=True), ignore_errors=True)
    folder.at_step(50, sharded=False).unlink(missing_ok=True)
    assert folder.last == folder.at_step(40, sharded=two.name == "fsdp")
    train(replace(config, run=FolderConfig(dir=str(folder.path))), resume="auto")
    assert_same(rows(folder.path), one)


def test_sharded_run_resumes_to_the_same_losses_and_notices_damage(
    config: RunConfig, base: Path, one: list[dict], two: Path, tmp_path: Path
) -> None:
    if two.name != "fsdp":
        pytest.skip("a run that is not sharded is resumed in test_loop.py")
    folder = RunFolder(tmp_path / "copy")
    shutil.copytree(two, folder.path)
    shutil.rmtree(folder.at_step(50, sharded=True))
    result = launch(config, folder.path, "--train.strategy", "fsdp", "--resume", "auto")
    assert result.returncode == 0, result.stderr[-6000:]
    assert_same(rows(folder.path), one)

    shard = next(folder.at_step(50, sharded=True).glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-000000050 is damaged .*delete it to go on from step-000000040"):
        train(replace(config, run=FolderConfig(dir=str(folder.path))), resume="yes")


def test_strategy_without_torchrun_is_refused(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, train=replace(config.train, strategy="fsdp"), run=FolderConfig(dir=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="train.strategy='fsdp' is for several processes: start them with torchrun"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("values", "message"), [({"batch_size": 6, "accumulate": 4}, "multiple of accumulate=4")])
def test_rows_that_cannot_be_dealt_out_are_refused(config: RunConfig, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config.train, **values)
