"""A tiny run on a small text, for everything that needs one."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from deepeq import GMRES, Anderson
from deepeq.cli import _parser
from deepeq.data import DataConfig
from deepeq.models import LayerConfig, ModelConfig, TransformerConfig
from deepeq.train.config import EquilibriumConfig, FolderConfig, OptimizerConfig, RunConfig, TrainConfig

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 60

one_parser = cache(_parser)


@pytest.fixture(scope="module", autouse=True)
def _one_parser() -> Iterator[None]:
    """To build the parser of the command takes longer than most of the commands here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepeq.cli._parser", one_parser)
        yield


@pytest.fixture(autouse=True)
def _short_endings(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every test; `monkeypatch.undo()` brings figures and sample back."""
    shorten_endings(monkeypatch)


def shorten_endings(patch: pytest.MonkeyPatch) -> None:
    """Let runs end without figures and sample, which take longer than so little training."""
    patch.setattr("deepeq.train.run.plot_run", lambda path: [])
    patch.setattr("deepeq.train.run._write_sample", lambda trainer, model: None)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def config(text_file: Path, tmp_path: Path) -> RunConfig:
    """Twelve steps of a very small model, four of them warm-up, in a fresh folder."""
    return tiny_run(text_file, tmp_path / "run")


def tiny_run(text_file: Path, folder: Path) -> RunConfig:
    return RunConfig(
        data=DataConfig(files=(str(text_file),)),
        model=ModelConfig(layer=TransformerConfig(d_model=16, num_heads=2, d_inner=32, memory_len=8, init_std=0.2)),
        equilibrium=EquilibriumConfig(
            solver=Anderson(rtol=1e-2, max_steps=8),
            backward=GMRES(rtol=1e-1, max_steps=6),
            evaluation=Anderson(rtol=1e-3, max_steps=20),
            warm_up_share=0.3,
            jacobian_weight=0.1,
        ),
        optimizer=OptimizerConfig(lr=1e-2, warm_up_steps=2),
        train=TrainConfig(
            steps=12,
            batch_size=4,
            segment_len=8,
            eval_batch_size=2,
            eval_every=6,
            checkpoint_every=5,
            log_every=1,
            accelerator="cpu",
        ),
        run=FolderConfig(dir=str(folder)),
    )


def with_train(config: RunConfig, **values: object) -> RunConfig:
    return replace(config, train=replace(config.train, **values))  # pyright: ignore[reportArgumentType]


def with_run(config: RunConfig, **values: object) -> RunConfig:
    return replace(config, run=replace(config.run, **values))  # pyright: ignore[reportArgumentType]


def with_layer(config: RunConfig, layer: LayerConfig | None = None, **values: object) -> RunConfig:
    """The run with another layer, or with other values of its layer."""
    assert config.model.layer is not None
    layer = replace(layer or config.model.layer, **values)  # pyright: ignore[reportArgumentType]
    return replace(config, model=replace(config.model, layer=layer))
