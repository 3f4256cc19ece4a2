"""A tiny run on a small text, for everything that needs one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepeq import GMRES, Anderson
from deepeq.data import DataConfig, load_corpus
from deepeq.models import LayerConfig, ModelConfig, TransformerConfig
from deepeq.train import (
    EquilibriumConfig,
    FolderConfig,
    OptimizerConfig,
    RunConfig,
    RunFolder,
    TrainConfig,
    Trainer,
    read_metrics,
)
from deepeq.train import train as train_run
from deepeq.train.distributed import make_fabric
from deepeq.train.logging import open_loggers

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 60


def train(config: RunConfig, **options: Any) -> dict[str, Any]:
    """Train without figures and sample, which take longer than so little training."""
    result = train_run(config, **{"extras": False, **options})
    assert result is not None
    return result


def make_trainer(config: RunConfig) -> Trainer:
    """A trainer in the folder of its configuration, in one process."""
    folder = RunFolder(Path(config.run.dir or ""))
    folder.path.mkdir(parents=True, exist_ok=True)
    return Trainer(config, folder, load_corpus(config.data), make_fabric(config.train))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def config(text_file: Path, tmp_path: Path) -> RunConfig:
    """Twelve steps of a very small model, the first four of a shallow stack, in a fresh folder."""
    return tiny_run(text_file, tmp_path / "run")


def tiny_run(text_file: Path, folder: Path) -> RunConfig:
    return RunConfig(
        data=DataConfig(files=(str(text_file),)),
        model=ModelConfig(layer=TransformerConfig(d_model=16, num_heads=2, d_inner=32, memory_len=8, init_std=0.2)),
        equilibrium=EquilibriumConfig(
            solver=Anderson(rtol=1e-2, max_steps=8),
            backward_solver=GMRES(rtol=1e-1, max_steps=6),
            eval_solver=Anderson(rtol=1e-3, max_steps=20),
            pretrain_fraction=0.3,
            jacobian_weight=0.1,
        ),
        optimizer=OptimizerConfig(lr=1e-2, lr_warmup_steps=2),
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


def losses(folder: Path, split: str = "train") -> list[tuple[int, float]]:
    """The steps and losses of a run on a split."""
    return [(row["step"], row["nll"]) for row in read_metrics(folder / "metrics.jsonl") if row["split"] == split]


def fit(config: RunConfig) -> list[tuple[int, float]]:
    """Train without the evaluation of the end, and return the training losses."""
    trainer = make_trainer(config)
    with open_loggers(config, trainer.folder.path, 0) as loggers:
        trainer.fit(loggers)
    return losses(trainer.folder.path)
