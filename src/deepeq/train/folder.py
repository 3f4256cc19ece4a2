"""The files of a run folder."""

import fcntl
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from deepeq.data import CopyMemory, Corpus, Vocabulary, known_vocab_size, load_corpus
from deepeq.models import LanguageModel, TiedNetwork
from deepeq.train.checkpoint import load_checkpoint
from deepeq.train.config import RunConfig, load_config
from deepeq.train.cores import evaluation_core
from deepeq.train.storage import remove

Resume = Literal["no", "yes", "auto"]
"""Whether a run goes on from the newest checkpoint in its folder: never, in any case, or if there is one."""


_CHECKPOINT = re.compile(r"step-\d+(\.safetensors)?")


class RunFolder:
    """Names of what a run writes, and the way to load it again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.vocabulary = path / "vocabulary.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoint"
        self.best = self.checkpoints / "best.safetensors"
        self.figures = path / "figures"
        self.sample = path / "sample.txt"
        self.result = path / "result.json"

    @classmethod
    def of(cls, config: RunConfig, resume: Resume) -> Self:
        """The folder that a run is to use.

        Raises:
            ValueError: it holds a run already, or none to resume.
        """
        if resume != "no" and config.run.dir is None:
            raise ValueError(f"resume={resume!r} needs run.dir, the folder of the run to go on with")
        name = f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = cls(Path(config.run.dir) if config.run.dir is not None else Path("runs") / name)
        if resume == "yes" and folder.last is None:
            raise ValueError(f"there is no checkpoint in {folder.checkpoints}; start the run with --resume auto or no")
        if resume == "no" and (folder.last is not None or folder.best.exists()):
            raise ValueError(
                f"{folder.path} already holds a run; add --resume auto to go on, or choose another --run.dir"
            )
        return folder

    @property
    def saved(self) -> list[Path]:
        """Complete checkpoints to go on from, oldest first."""
        return sorted(path for path in self.checkpoints.glob("step-*") if _CHECKPOINT.fullmatch(path.name))

    @property
    def last(self) -> Path | None:
        """The newest checkpoint to go on from."""
        return self.saved[-1] if self.saved else None

    def at_step(self, step: int, *, sharded: bool) -> Path:
        """The name of a checkpoint: a folder if it is sharded, else a file."""
        return self.checkpoints / f"step-{step:09d}{'' if sharded else '.safetensors'}"

    def keep(self, count: int) -> None:
        """Delete all but the newest checkpoints."""
        for path in self.saved[:-count]:
            remove(path)

    def load_model(self) -> tuple[RunConfig, Vocabulary | None, LanguageModel]:
        """The configuration, the vocabulary if there is text, and the model of the best checkpoint for evaluation.

        Raises:
            FileNotFoundError: the folder holds no run, or no checkpoint yet.
            ValueError: a file in it is damaged.
        """
        config = load_config(self.config, complete=True)
        vocabulary = None if config.data.is_copy_memory else Vocabulary.load(self.vocabulary)
        size = known_vocab_size(config.data) if vocabulary is None else len(vocabulary)
        assert size is not None
        model = LanguageModel(size, config.model)
        if config.train.precision == "64-true":
            model.double()
        load_checkpoint(self.best if self.best.exists() or self.last is None else self.last, model)
        if config.model.depth == 0:
            assert isinstance(model.network, TiedNetwork)
            model.network.core = evaluation_core(model.network, config.equilibrium)
        return config, vocabulary, model.eval()

    def load_corpus(self, config: RunConfig) -> Corpus | CopyMemory:
        """What the run was trained on.

        Raises:
            ValueError: it has changed since.
        """
        corpus = load_corpus(config.data)
        if corpus.vocabulary is not None and corpus.vocabulary != Vocabulary.load(self.vocabulary):
            raise ValueError(f"the text that {self.path} was trained on has changed; its vocabulary is another now")
        return corpus

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder.

        Raises:
            ValueError: one is at work in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process is training in {self.path}; choose another --run.dir") from error
            yield
