"""The files of a run folder."""

from pathlib import Path

from deepeq.data import Vocabulary
from deepeq.deq import DEQ
from deepeq.models import LanguageModel
from deepeq.train.checkpoint import load_checkpoint
from deepeq.train.config import RunConfig, load_config


class RunFolder:
    """Names of what a run writes, and the way to load it again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.vocabulary = path / "vocabulary.json"
        self.metrics = path / "metrics.jsonl"
        self.last = path / "checkpoint" / "last.safetensors"
        self.best = path / "checkpoint" / "best.safetensors"
        self.figures = path / "figures"
        self.sample = path / "sample.txt"
        self.result = path / "result.json"

    def load_model(self) -> tuple[RunConfig, Vocabulary, LanguageModel]:
        """The configuration, the vocabulary, and the model of the best checkpoint, with the solver of evaluation.

        Raises:
            FileNotFoundError: the folder holds no run, or no checkpoint yet.
            ValueError: a file in it is damaged.
        """
        config, vocabulary = load_config(self.config), Vocabulary.load(self.vocabulary)
        model = LanguageModel(len(vocabulary), config.model)
        load_checkpoint(self.best if self.best.exists() else self.last, model)
        model.core = DEQ(model.cell, solver=config.equilibrium.evaluation)
        return config, vocabulary, model.eval()
