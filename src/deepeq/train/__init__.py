"""Training, evaluation and publication of language models."""

from deepeq.train.config import EquilibriumConfig, FolderConfig, OptimizerConfig, RunConfig, TrainConfig
from deepeq.train.evaluation import EvaluationOptions, evaluate, evaluate_run, quality_metrics
from deepeq.train.figures import plot_run
from deepeq.train.logging import read_metrics
from deepeq.train.loop import Interrupted, Trainer
from deepeq.train.pretrained import PretrainedModel, TrainedModel, export, open_model
from deepeq.train.recipe import RunFolder, load_config, recipe_parser, run_config, save_config
from deepeq.train.run import train
from deepeq.train.schedules import Constant, Cosine, Drops, Geometric, Linear, NonMonotone, Plateau, Schedule
from deepeq.train.step import TrainingError
from deepeq.train.summary import describe_model

__all__ = [
    "Constant",
    "Cosine",
    "Drops",
    "EquilibriumConfig",
    "EvaluationOptions",
    "FolderConfig",
    "Geometric",
    "Interrupted",
    "Linear",
    "NonMonotone",
    "OptimizerConfig",
    "Plateau",
    "PretrainedModel",
    "RunConfig",
    "RunFolder",
    "Schedule",
    "TrainConfig",
    "TrainedModel",
    "Trainer",
    "TrainingError",
    "describe_model",
    "evaluate",
    "evaluate_run",
    "export",
    "load_config",
    "open_model",
    "plot_run",
    "quality_metrics",
    "read_metrics",
    "recipe_parser",
    "run_config",
    "save_config",
    "train",
]
