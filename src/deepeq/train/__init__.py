"""Training, evaluation and generation of language models."""

from deepeq.train.config import RunConfig, load_config
from deepeq.train.evaluation import evaluate
from deepeq.train.figures import plot_run
from deepeq.train.folder import RunFolder
from deepeq.train.generation import generate
from deepeq.train.hub import PretrainedModel
from deepeq.train.loop import Interrupted, Trainer, TrainingError
from deepeq.train.run import train
from deepeq.train.schedules import Constant, Cosine, Drops, Geometric, Linear, NonMonotone, Plateau, Schedule

__all__ = [
    "Constant",
    "Cosine",
    "Drops",
    "Geometric",
    "Interrupted",
    "Linear",
    "NonMonotone",
    "Plateau",
    "PretrainedModel",
    "RunConfig",
    "RunFolder",
    "Schedule",
    "Trainer",
    "TrainingError",
    "evaluate",
    "generate",
    "load_config",
    "plot_run",
    "train",
]
