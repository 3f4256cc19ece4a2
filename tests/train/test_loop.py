"""The training loop: what it writes, how it stops, how it continues."""

import json
import math
import os
import pickle
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepeq import Broyden
from deepeq.cli import main
from deepeq.data import CopyMemoryConfig, DataConfig
from deepeq.models import RecurrentConfig, TCNConfig, TrellisConfig
from deepeq.nn import AdaptiveSoftmax
from deepeq.train import (
    EquilibriumConfig,
    Geometric,
    Interrupted,
    Linear,
    RunConfig,
    RunFolder,
    TrainingError,
    evaluate,
    load_config,
    open_model,
    plot_run,
    read_metrics,
)
from deepeq.train import train as train_run
from deepeq.train.checkpoint import SavedCheckpoint
from deepeq.train.logging import open_loggers
from deepeq.train.pretrained import save_model
from tests.train.conftest import make_trainer, tiny_run, train, with_layer, with_run, with_train


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def losses(folder: Path, split: str = "train") -> list[tuple[int, float]]:
    return [(row["step"], row["nll"]) for row in read_metrics(folder / "metrics.jsonl") if row["split"] == split]


def fit(config: RunConfig) -> list[tuple[int, float]]:
    """Train without the evaluation of the end, and return the training losses."""
    trainer = make_trainer(config)
    with open_loggers(config, trainer.folder.path, 0) as loggers:
        trainer.fit(loggers)
    return losses(trainer.folder.path)


def test_run_learns_and_writes_what_it_promises(config: RunConfig) -> None:
    config = with_train(config, steps=200, eval_every=100)
    result = train_run(config)
    assert result is not None
    folder = RunFolder(Path(result["run_dir"]))
    assert result["test_bits_per_character"] < result["baseline_bits_per_character"] - 0.5
    assert result["num_steps"] == 200
    assert result["num_params"] == open_model(folder.path).model.num_params
    assert json.loads(folder.result.read_text()) == result
    for path in (folder.config, folder.metrics, folder.best / "tokenizer.json", folder.last, folder.sample):
        assert path.stat().st_size > 0
    assert {path.stem for path in folder.figures.iterdir()} == {"loss", "steps", "convergence"}
    assert list(folder.path.glob("events.out.tfevents*"))
    rows = read_metrics(folder.metrics)
    warm = [row for row in rows if row["split"] == "train" and row["pretraining"]]
    rest = [row for row in rows if row["split"] == "train" and not row["pretraining"]]
    assert [row["step"] for row in warm] == list(range(1, 61))
    assert {row["forward_steps"] for row in warm} == {3.0}
    assert all("backward_steps" not in row for row in warm)
    for row in rest:
        assert 1 <= row["backward_steps"] <= 6
        assert 0 <= row["forward_unconverged"] <= 1
        assert row["tokens_per_second"] > 0
    assert sum("jacobian_penalty" in row for row in rest) == 70


def test_resumed_run_has_the_losses_of_an_uninterrupted_one(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(with_run(config, dir=str(tmp_path / "whole")))
    halves = with_run(config, dir=str(tmp_path / "halves"))
    trainer = make_trainer(halves)
    original = trainer.optimizer_step.run

    def killed_after_seven_steps(step: int, validations: list[float]) -> int:
        if step == 7:
            raise KeyboardInterrupt
        return original(step, validations)

    monkeypatch.setattr(trainer.optimizer_step, "run", killed_after_seven_steps)
    with pytest.raises(KeyboardInterrupt), open_loggers(halves, trainer.folder.path, 0) as loggers:
        trainer.fit(loggers)
    assert [step for step, _ in losses(tmp_path / "halves")][-1] == 7
    train(halves, resume="yes")  # from the checkpoint of step 5
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert losses(tmp_path / "halves", "test") == losses(tmp_path / "whole", "test")


def test_ctrl_c_finishes_the_step_and_saves(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(config)
    original = trainer.optimizer_step.run

    def interrupted_in_the_third_step(step: int, validations: list[float]) -> int:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(step, validations)

    monkeypatch.setattr(trainer.optimizer_step, "run", interrupted_in_the_third_step)
    before = signal.getsignal(signal.SIGINT)
    sentence = "stopped at step 3 of 12; continue with: deepeq train --config"
    with pytest.raises(Interrupted, match=sentence), open_loggers(config, trainer.folder.path, 0) as loggers:
        trainer.fit(loggers)
    assert signal.getsignal(signal.SIGINT) is before
    assert trainer.folder.last is not None
    assert SavedCheckpoint(trainer.folder.last).progress["step"] == 3
    train(config, resume="yes")
    assert [step for step, _ in losses(trainer.folder.path)] == list(range(1, 13))


@pytest.mark.parametrize("where", ["loss", "gradient", "equilibrium"])
def test_non_finite_value_stops_before_the_optimizer(
    config: RunConfig, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(replace(config, equilibrium=replace(config.equilibrium, pretrain_fraction=0.0)))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    if where == "loss":
        monkeypatch.setattr(AdaptiveSoftmax, "nll", lambda self, hidden, targets: hidden.sum(dim=2) * math.nan)
    elif where == "gradient":
        trainer.model.embedding.tables[0].register_hook(lambda gradient: gradient * math.inf)
    else:
        trainer.model.network.cell.register_forward_hook(lambda cell, arguments, z: z * math.nan)
    with pytest.raises(TrainingError, match=r"step 1: .*(nan|inf|non-finite)"):
        trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.folder.last is not None
    assert SavedCheckpoint(trainer.folder.last).progress["step"] == 0


def contents(folder: Path | None) -> dict[str, bytes]:
    assert folder is not None
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folder_in_use_and_missing_checkpoint_are_refused(config: RunConfig) -> None:
    train(with_train(config, steps=1))
    with pytest.raises(ValueError, match="already holds a run; add --resume auto"):
        train(config)
    with pytest.raises(ValueError, match="there is no checkpoint in .*elsewhere"):
        train(with_run(config, dir=str(Path(config.run.dir or "") / "elsewhere")), resume="yes")
    with pytest.raises(ValueError, match="resume='auto' needs run.dir"):
        train(with_run(config, dir=None), resume="auto")


def test_run_killed_before_its_first_checkpoint_continues(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(with_train(config, checkpoint_every=100))
    monkeypatch.setattr(trainer, "evaluate", lambda split: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert train(config, resume="auto")["num_steps"] == 12


def test_the_last_checkpoints_and_the_best_are_kept(config: RunConfig) -> None:
    train(with_train(config, checkpoint_every=3, keep_checkpoints=3))
    folder = RunFolder(Path(config.run.dir or ""))
    assert folder.saved == [folder.at_step(step) for step in (6, 9, 12)]
    assert folder.best.exists()


@pytest.fixture(scope="module")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that `config` describes, to copy."""
    path = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_run(text_file, path))
    return path


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


def test_resuming_a_finished_run_repeats_its_result(config: RunConfig) -> None:
    first, again = train(config, resume="auto"), train(config, resume="auto")
    assert first["test_bits_per_character"] == again["test_bits_per_character"]
    assert len(losses(Path(first["run_dir"]), "test")) == 1


def test_second_process_is_kept_out_of_the_folder(config: RunConfig) -> None:
    with RunFolder(Path(config.run.dir or "")).lock(), pytest.raises(ValueError, match="another process is training"):
        train(config)


def test_text_too_short_for_the_batch_is_named_before_training(config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"the valid data and train.eval_batch_size=500 do not fit"):
        train(with_train(config, eval_batch_size=500))


def test_damaged_parameters_fail_the_command_with_one_sentence(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(with_train(config, steps=1))
    folder = RunFolder(Path(config.run.dir or ""))
    trained = open_model(folder.path)
    with torch.no_grad():
        trained.model.embedding.tables[0].fill_(math.nan)
    save_model(folder.best, trained)
    capsys.readouterr()
    for command in (["eval"], ["generate", "--prompt", "a"]):
        assert main([*command, "--run", str(folder.path)]) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_every_option_of_the_equilibrium_changes_the_run(config: RunConfig, tmp_path: Path) -> None:
    solver, backward = config.equilibrium.solver, config.equilibrium.backward_solver
    variants = {
        "base": {},
        "solver": {"solver": replace(solver, max_steps=3)},
        "backward_solver": {"backward_solver": replace(backward, max_steps=2)},
        "pretrain_fraction": {"pretrain_fraction": 0.0},
        "pretrain_depth": {"pretrain_depth": 2},
        "pretrain_depth_schedule": {"pretrain_depth_schedule": Linear(end=2.0)},
        "jacobian_weight": {"jacobian_weight": 0.0},
        "jacobian_fraction": {"jacobian_fraction": 1.0},
        "jacobian_schedule": {"jacobian_schedule": Linear(end=5.0)},
        "tolerance_schedule": {"tolerance_schedule": Geometric(start=20.0, end=1.0)},
        "step_limit_schedule": {"step_limit_schedule": Linear(start=0.3, end=1.0)},
        "piece_len": {"piece_len": 3, "jacobian_weight": 0.0},
    }
    seen = {}
    config = with_train(config, steps=9, eval_every=9)
    for name, values in variants.items():
        variant = replace(config, equilibrium=replace(config.equilibrium, **values))
        seen[name] = fit(with_run(variant, dir=str(tmp_path / name)))[-1][1]
    assert len(set(seen.values())) == len(seen), seen


EXPLICIT = {
    "trellis": (TrellisConfig(d_input=8, d_hidden=12, d_output=8), {}),
    "dropout": (
        TrellisConfig(d_input=8, d_hidden=12, d_output=8, hidden_dropout=0.2, weight_dropout=0.2),
        {"input_dropout": 0.2, "output_dropout": 0.2},
    ),
    "tied": (None, {"depth": 2}),
    "untied": (None, {"depth": 2, "tied": False}),
    "auxiliary": (TrellisConfig(d_input=8, d_hidden=12, d_output=8), {"depth": 4, "auxiliary_every": 2}),
    "tcn": (TCNConfig(d_input=8, d_hidden=8, kernel_size=2), {"depth": 2, "tied": False}),
    "lstm": (RecurrentConfig(d_input=8, d_hidden=8), {"depth": 1, "tied": False}),
    "gru": (RecurrentConfig(d_input=8, d_hidden=8, kind="gru"), {"depth": 2, "tied": False}),
}


@pytest.mark.parametrize("name", EXPLICIT)
def test_every_network_trains_and_resumes_to_the_same_losses(
    config: RunConfig, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, values = EXPLICIT[name]
    config = replace(
        config,
        model=replace(config.model, **({"layer": layer} if layer else {}), **values),
        equilibrium=EquilibriumConfig() if "depth" in values else config.equilibrium,
    )
    whole = train(with_run(config, dir=str(tmp_path / "whole")))
    assert ("test_unconverged" in whole) == (name in ("trellis", "dropout"))
    halves = with_run(config, dir=str(tmp_path / "halves"))
    first = make_trainer(halves)
    original = first.optimizer_step.run

    def interrupted_in_the_sixth_step(step: int, validations: list[float]) -> int:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(step, validations)

    monkeypatch.setattr(first.optimizer_step, "run", interrupted_in_the_sixth_step)
    with pytest.raises(Interrupted), open_loggers(halves, first.folder.path, 0) as loggers:
        first.fit(loggers)
    train(halves, resume="yes")
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert any("auxiliary_nll" in row for row in rows) == (name == "auxiliary")


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


def test_equilibrium_section_of_an_explicit_network_is_refused(config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"equilibrium is set, but model.depth=2 makes an explicit network"):
        replace(config, model=replace(config.model, depth=2))


def test_bfloat16_training_stays_close_to_float32(config: RunConfig, tmp_path: Path) -> None:
    final = {}
    for precision in ("32-true", "bf16-mixed"):
        final[precision] = fit(with_run(with_train(config, precision=precision), dir=str(tmp_path / precision)))[-1][1]
    assert final["bf16-mixed"] != final["32-true"]
    assert final["bf16-mixed"] == pytest.approx(final["32-true"], rel=0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The folder of a finished run, for the commands that only read it."""
    path = tmp_path_factory.mktemp("finished")
    (path / "recipe.yaml").write_text(
        f"data: {{files: ['{text_file}']}}\n"
        "model: {layer: {class_path: deepeq.models.TransformerConfig, "
        "init_args: {d_model: 16, num_heads: 2, d_inner: 32, memory_len: 8}}}\n"
        "train: {steps: 30, batch_size: 4, segment_len: 8, eval_batch_size: 2, log_every: 5, accelerator: cpu}\n"
    )
    assert main(["train", "--config", str(path / "recipe.yaml"), "--run.dir", str(path / "run")]) == 0
    return path / "run"


def test_eval_agrees_with_the_result_of_training(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--run", str(finished), "--split", "test"]) == 0
    values = json.loads(capsys.readouterr().out)
    result = json.loads((finished / "result.json").read_text())
    assert values["bits_per_character"] == pytest.approx(result["test_bits_per_character"], rel=1e-6)
    assert values["num_tokens"] == result["test_num_tokens"]
    assert main(["eval", "--run", str(finished), "--split", "valid", "--batch_size", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "valid"


def test_plot_draws_the_three_figures(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (finished / "figures").iterdir():
        path.unlink()
    assert main(["plot", "--run", str(finished)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(path.name for path in written) == ["convergence.png", "loss.png", "steps.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.parametrize("command", ["eval", "plot", "generate"])
def test_folder_without_a_run_exits_with_2_and_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--prompt", "a"] if command == "generate" else []
    assert main([command, "--run", str(tmp_path / "nowhere"), *extra]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert "nowhere" in captured.err


def test_changed_text_is_noticed_before_evaluation(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.txt"
    own.write_text("abcdefgh " * 200)
    config = replace(config, data=replace(config.data, files=(str(own),)))
    train(with_train(config, steps=1))
    own.write_text("ABCDEFGH " * 200)
    assert main(["eval", "--run", str(config.run.dir)]) == 2
    assert "has changed" in capsys.readouterr().err


def test_plot_without_measurements_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no row of training yet"):
        plot_run(tmp_path)


def test_evaluation_weights_every_token_alike(config: RunConfig) -> None:
    trainer = make_trainer(config)
    stream = trainer.batches("valid")
    lengths = {targets.shape[1] for _, targets in stream}
    assert len(lengths) == 2  # the last segment is shorter
    values, memory, total = evaluate(trainer.model, stream), None, 0.0
    for tokens, targets in stream:
        output = trainer.model(tokens, memory)
        memory = output.memory
        picked = output.logits.log_softmax(dim=-1).gather(2, targets.unsqueeze(2))
        total -= float(picked.sum().detach())
    assert values["num_tokens"] == sum(targets.numel() for _, targets in stream)
    assert values["nll"] == pytest.approx(total / values["num_tokens"], rel=1e-5)


def test_training_leaves_the_arithmetic_of_the_process_as_it_was(config: RunConfig) -> None:
    train(with_train(config, steps=1))
    assert torch.tensor(1e-40) * 1.0 > 0
