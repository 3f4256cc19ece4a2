"""Several processes do what one does. They are started by `torchrun`, two of them, on the CPU."""

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepeq import FixedPointIteration
from deepeq.cli import main
from deepeq.data import DataConfig
from deepeq.models import ModelConfig, TransformerConfig
from deepeq.train import EquilibriumConfig, FolderConfig, RunConfig, RunFolder, TrainConfig, read_metrics, save_config
from deepeq.train.distributed import peak_memory_mb
from tests.train.conftest import train

TIMES = ("seconds", "tokens_per_second", "peak_memory_mb")
STEPS, LAST_BUT_ONE = 14, 10  # steps of a run, and of its last checkpoint but one


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def config(text_file: Path, base: Path) -> RunConfig:
    """Some steps, the first three of a shallow stack, in float64, where rounding does not hide what differs."""
    layer = TransformerConfig(d_model=16, num_heads=2, d_inner=32, memory_len=8, weight_norm=True)
    # Plain iteration does not amplify rounding, as Anderson acceleration does far from an equilibrium.
    solver = FixedPointIteration(rtol=1e-2, max_steps=12)
    return RunConfig(
        data=DataConfig(files=(str(text_file),)),
        model=ModelConfig(layer=layer),
        equilibrium=EquilibriumConfig(solver=solver, eval_solver=solver, pretrain_fraction=0.2, jacobian_weight=0.1),
        train=TrainConfig(
            steps=STEPS,
            batch_size=4,
            segment_len=8,
            eval_batch_size=2,
            eval_every=STEPS // 2,
            checkpoint_every=10,
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


@pytest.fixture(scope="module")
def launched(config: RunConfig, base: Path) -> Path:
    """The folder of runs in two processes, which start once: two strategies, and a sharded run that is resumed."""
    recipe = base / "recipe.yaml"
    save_config(config, recipe)

    def command(name: str, *options: str) -> list[str]:
        return ["train", "--config", str(recipe), "--run.dir", str(base / name), "--train.strategy", *options]

    resumed = RunFolder(base / "resumed")
    copied = [str(base / "fsdp"), str(resumed.path), str(resumed.at_step(STEPS))]
    commands = [command("ddp", "ddp"), command("fsdp", "fsdp"), command("resumed", "fsdp", "--resume", "auto")]
    turns = list(zip(free_ports(len(commands)), commands, (None, None, copied), strict=True))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [sys.executable, *torchrun, str(Path(__file__).with_name("in_turn.py")), json.dumps(turns)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    printed = [json.loads(line)["run_dir"] for line in result.stdout.splitlines() if line.startswith("{")]
    assert printed == [str(base / name) for name in ("ddp", "fsdp", "resumed")]  # by one process each
    return base


@pytest.fixture(params=["ddp", "fsdp"])
def two(launched: Path, request: pytest.FixtureRequest) -> Path:
    """The folder of a run in two processes."""
    return launched / request.param


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def rows(folder: Path) -> list[dict]:
    kept = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in kept]


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) == STEPS + 2 + 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert (ours["split"], ours["step"]) == (theirs["split"], theirs["step"])
        for name in theirs.keys() - {"split", "step"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-9), name


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
    assert json.loads(capsys.readouterr().out)["nll"] == pytest.approx(one[-1]["nll"], rel=1e-6)
    folder = RunFolder(tmp_path / "copy")
    shutil.copytree(two, folder.path)
    shutil.rmtree(folder.at_step(STEPS))
    assert folder.last == folder.at_step(LAST_BUT_ONE)
    train(replace(config, run=FolderConfig(dir=str(folder.path))), resume="auto")
    assert_same(rows(folder.path), one)


def test_sharded_run_resumes_to_the_same_losses_and_notices_damage(
    config: RunConfig, one: list[dict], launched: Path, tmp_path: Path
) -> None:
    assert_same(rows(launched / "resumed"), one)
    folder = RunFolder(tmp_path / "copy")
    shutil.copytree(launched / "resumed", folder.path)
    shard = next(folder.at_step(STEPS).glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"step-0+{STEPS} is damaged .*delete it to continue from step-0+{LAST_BUT_ONE}"
    ):
        train(replace(config, run=FolderConfig(dir=str(folder.path))), resume="yes")


def test_peak_memory_is_none_where_python_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (peak_memory_mb(torch.device("cpu")) or 0) > 1
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory_mb(torch.device("cpu")) is None


def test_strategy_without_torchrun_is_refused(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, train=replace(config.train, strategy="fsdp"), run=FolderConfig(dir=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="train.strategy='fsdp' is for several processes: start them with torchrun"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("values", "message"), [({"batch_size": 6, "accumulate": 4}, "multiple of accumulate=4")])
def test_rows_that_cannot_be_dealt_out_are_refused(config: RunConfig, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config.train, **values)
