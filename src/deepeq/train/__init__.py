"""Training, evaluation and generation of language models."""

from deepeq.train.config import RunConfig, load_config
from deepeq.train.evaluation import evaluate
from deepeq.train.figures import plot_run
from deepeq.train.folder import RunFolder
from deepeq.train.generation import generate
from deepeq.train.loop import Interrupted, Trainer, TrainingError
from deepeq.train.run import train

__all__ = [
    "Interrupted",
    "RunConfig",
    "RunFolder",
    "Trainer",
    "TrainingError",
    "evaluate",
    "generate",
    "load_config",
    "plot_run",
    "train",
]
