"""The training loop: how it stops, how it continues, and what it trains."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from deepeq import PhantomAdjoint
from deepeq.models import RecurrentConfig, TCNConfig, TrellisConfig
from deepeq.train import (
    EquilibriumConfig,
    Geometric,
    Interrupted,
    Linear,
    RunConfig,
    RunFolder,
    load_config,
    read_metrics,
)
from deepeq.train.checkpoint import SavedCheckpoint
from deepeq.train.logging import open_loggers
from tests.train.conftest import fit, losses, make_trainer, train, with_run, with_train


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


def test_text_too_short_for_the_batch_is_named_before_training(config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"the valid data and train.eval_batch_size=500 do not fit"):
        train(with_train(config, eval_batch_size=500))


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
        "adjoint": {"adjoint": PhantomAdjoint(steps=2, damping=0.5), "backward_solver": None},
    }
    seen = {}
    config = with_train(config, steps=6, eval_every=6, checkpoint_every=6)
    for name, values in variants.items():
        variant = replace(config, equilibrium=replace(config.equilibrium, **values))
        seen[name] = fit(with_run(variant, dir=str(tmp_path / name)))[-1][1]
    assert len(set(seen.values())) == len(seen), seen


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("batch_size: 4\n", "batch_size: 2\n", "train.batch_size"),
        ("segment_len: 8\n", "segment_len: 4\n", "train.segment_len"),
        ("precision: 32-true", "precision: 64-true", "train.precision"),
    ],
)
def test_a_run_whose_file_was_edited_does_not_continue(config: RunConfig, old: str, new: str, name: str) -> None:
    """What counts is the configuration in the checkpoint, not the file, which is both the old and the new one here."""
    train(config)
    path = Path(config.run.dir or "") / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(f"  {old}", f"  {new}", 1))
    with pytest.raises(ValueError, match=f"was trained with another {name}"):
        train(replace(load_config(path), run=config.run), resume="yes")


NETWORKS = {
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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("trellis", "gru", "tcn") else name for name in NETWORKS],
)
def test_every_network_trains_and_resumes_to_the_same_losses(
    config: RunConfig, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, values = NETWORKS[name]
    config = replace(
        config,
        model=replace(config.model, **({"layer": layer} if layer else {}), **values),
        equilibrium=EquilibriumConfig() if "depth" in values else config.equilibrium,
    )
    whole = fit(with_run(config, dir=str(tmp_path / "whole")))
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
    assert losses(tmp_path / "halves") == whole
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert any("auxiliary_nll" in row for row in rows) == (name == "auxiliary")
    assert any("forward_unconverged" in row for row in rows) == (name in ("trellis", "dropout"))
