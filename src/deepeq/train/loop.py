"""The training loop."""

import math
import shlex
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger

from deepeq.data import SPLITS, Batches, DataSource, Split
from deepeq.models import LanguageModel
from deepeq.train.checkpoint import (
    CheckpointContent,
    SavedCheckpoint,
    random_states,
    save_checkpoint,
    set_random_states,
)
from deepeq.train.config import RunConfig
from deepeq.train.distributed import any_process, peak_memory_mb, stop_on_signal
from deepeq.train.evaluation import Averages, evaluate, measure_spectral_radius, quality_metrics
from deepeq.train.logging import Display, MetricsFile, describe, diagnostics
from deepeq.train.pretrained import TrainedModel, save_model
from deepeq.train.recipe import RunFolder, load_config, save_config, to_plain
from deepeq.train.step import Step
from deepeq.train.summary import write_card

_FIXED = (
    "equilibrium.pretrain_fraction",
    "optimizer.name",
    "train.batch_size",
    "train.segment_len",
    "train.seed",
    "train.precision",
)
"""Fields, besides those of the model, that a resumed run must keep."""


class Interrupted(Exception):
    """A run was stopped by a signal, and has saved a checkpoint."""


class Trainer:
    """One run: a model, its optimizer, and its place in the data.

    Args:
        config: The run.
        folder: The folder that it writes to.
        corpus: The data of the configuration.
        fabric: The processes that it runs in.

    Raises:
        ValueError: The data does not fit the batch sizes or the number of processes.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, corpus: DataSource, fabric: Fabric) -> None:
        self.config, self.folder, self.corpus, self.fabric = config, folder, corpus, fabric
        torch.manual_seed(config.train.seed)
        self.model = LanguageModel(corpus.vocab_size, config.model)
        if config.train.precision == "64-true":
            self.model.double()
        self.batches = {split: self._batches(split) for split in SPLITS}
        """The splits, with the rows of all processes."""
        self.trained = TrainedModel(
            config=config, vocab_size=corpus.vocab_size, tokenizer=corpus.tokenizer, model=self.model, data=config.data
        )
        """The model as it is at any time, with what it needs to predict."""
        self.averages = Averages(fabric)
        self.optimizer_step = Step(self.model, config, self.batches["train"], fabric, self.averages)
        if fabric.global_rank > 0:  # dropout must differ between the processes
            torch.manual_seed(config.train.seed + fabric.global_rank * 1_000_003)
        self.step, self.seconds, self.best_nll = 0, 0.0, math.inf
        self.validations: list[float] = []
        self.display = Display(config.train.steps, enabled=fabric.is_global_zero)
        self.loggers: Sequence[Logger] = ()

    def fit(self, loggers: Sequence[Logger] = ()) -> None:
        """Train to the last step.

        Args:
            loggers: Where metrics go, in the process that writes them.

        Raises:
            TrainingError: The loss or the gradient is not finite. The parameters are as before this step.
            FloatingPointError: The loss of a validation is not finite.
            ConvergenceError: An equilibrium in evaluation is not finite.
            OSError: A file cannot be written.
            Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
        """
        self.loggers = loggers
        train, start = self.config.train, time.perf_counter() - self.seconds
        pretrain_steps = 0 if self.config.model.depth else self.config.equilibrium.pretrain_steps(train.steps)
        if self.fabric.is_global_zero:
            save_config(self.config, self.folder.config)
        with self.display, stop_on_signal() as signals:
            self.display.step(self.step)
            self.display.say(self._headline())
            if self.step == 0:
                self._save()  # so that a run that is killed early can continue
            since, tokens = time.perf_counter(), 0
            while self.step < train.steps:
                if self.step == pretrain_steps:
                    self.averages.clear()  # the averages of the shallow stack end with it
                tokens += self.optimizer_step.run(self.step, self.validations)
                self.step += 1
                self.seconds = time.perf_counter() - start
                self.display.step(self.step)
                if self.step % train.log_every == 0 or self.step == train.steps:
                    self._log(tokens / (time.perf_counter() - since), pretraining=self.step <= pretrain_steps)
                    since, tokens = time.perf_counter(), 0
                if self.step % train.eval_every == 0 or self.step == train.steps:
                    before = time.perf_counter()
                    self._validate()
                    since += time.perf_counter() - before
                self.seconds = time.perf_counter() - start
                stop = any_process(bool(signals), self.fabric)
                if self.step % train.checkpoint_every == 0 or self.step == train.steps or stop:
                    self._save()
                if stop and self.step < train.steps:
                    raise Interrupted(
                        f"stopped at step {self.step} of {train.steps}; continue with: deepeq train --config "
                        f"{shlex.quote(str(self.folder.config))} --resume yes"
                    )

    def evaluate(self, split: Split) -> dict[str, Any]:
        """Return the quality on a split, solved as in evaluation, and write it to the metrics."""
        self.model.eval()
        how, whole = self.trained.how, self.batches[split]
        own = whole.shard(self.fabric.global_rank, self.fabric.world_size)
        values = evaluate(self.model, own, how=how, fabric=self.fabric)
        values |= self.quality(split, values["nll"])
        if split == "valid" and how is not None:
            values["spectral_radius"] = measure_spectral_radius(self.model, whole, how)
        self._record(split, values)
        return values

    def quality(self, split: Split, nll: float) -> dict[str, float]:
        """Return what the field reports for a mean loss on a split."""
        return quality_metrics(self.corpus.unit, nll, bytes_per_token=self.corpus.bytes_per_token(split))

    def _batches(self, split: Split) -> Batches:
        train = self.config.train
        length = train.segment_len if split == "train" else self.config.eval_segment_len
        name = "batch_size" if split == "train" else "eval_batch_size"
        try:
            batches = self.corpus.stream(split, batch_size=getattr(train, name), segment_len=length)
            if split != "train":
                batches.shard(0, self.fabric.world_size)
        except ValueError as error:
            raise ValueError(
                f"the {split} data and train.{name}={getattr(train, name)!r} do not fit: {error}"
            ) from error
        return batches

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` so far, in the process that writes them."""
        return next((logger.rows for logger in self.loggers if isinstance(logger, MetricsFile)), [])

    def restore(self, saved: SavedCheckpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: The checkpoint is of another configuration, another text or another model.
        """
        self._check_changes(saved.progress.get("config"))
        progress, steps = saved.progress, self.config.train.steps
        if progress["text"] != self.corpus.fingerprint:
            raise ValueError(f"the text of {self.folder.path} has changed since its checkpoint; start a new run")
        if progress["step"] > steps:
            raise ValueError(f"{self.folder.path} is at step {progress['step']}, past train.steps={steps}")
        content = saved.restore(self.model, self.optimizer_step.optimizer)
        self.step, self.seconds, self.best_nll = progress["step"], progress["seconds"], progress["best_nll"]
        self.validations = progress["validations"]
        self.averages.restore(progress["averages"])
        self.optimizer_step.restore_memory(content.memory)
        if not set_random_states(content.random, self.fabric):
            self.display.say("the number of processes has changed, so dropout masks are drawn from new generators")

    def _check_changes(self, before: dict[str, Any] | None) -> None:
        """Refuse a configuration that cannot continue the run, and tell what else has changed.

        Args:
            before: The configuration in the checkpoint. Older checkpoints have none, and the file of the run is taken.
        """
        old: dict[str, Any] = before or to_plain(load_config(self.folder.config, complete=True))
        now = to_plain(self.config)
        parts = ("data", "model", "equilibrium", "optimizer", "train")
        changed = [f"{part}.{name}" for part in parts for name in now[part] if now[part][name] != old[part].get(name)]
        fixed = [name for name in changed if name.startswith("model.") or name in _FIXED]
        if fixed:
            raise ValueError(f"{self.folder.path} was trained with another {', '.join(fixed)}; start a new run")
        if changed:
            self.display.say(f"continues with another {', '.join(changed)}")

    def _validate(self) -> None:
        values = self.evaluate("valid")
        self.validations.append(values["nll"])
        self.display.say(f"step {self.step}: validation {describe(values)}")
        if values["nll"] < self.best_nll:
            self.best_nll = values["nll"]
            facts = {"step": self.step, "valid_nll": self.best_nll}
            save_model(self.folder.best, self.trained, facts=facts, fabric=self.fabric)
            if self.fabric.is_global_zero:
                write_card(self.folder.best, self.trained, valid=values)

    def _log(self, tokens_per_second: float, *, pretraining: bool) -> None:
        values: dict[str, Any] = self.averages.compute()
        values |= self.quality("train", values["nll"]) | {
            "tokens_per_second": round(tokens_per_second, 1),
            "learning_rate": self.optimizer_step.optimizer.param_groups[0]["lr"],
            "pretraining": float(pretraining),
        }
        memory = peak_memory_mb(self.fabric.device)
        if memory is not None:
            values["peak_memory_mb"] = memory
        self._record("train", values)
        self.display.metrics(self.step, describe(values))
        self.averages.clear()

    def _record(self, split: Split, values: dict[str, Any]) -> None:
        row = {f"{split}/{name}": value for name, value in (values | {"seconds": round(self.seconds, 2)}).items()}
        for logger in self.loggers:
            if split != "test" or isinstance(logger, MetricsFile):  # the test text makes no curve
                logger.log_metrics(row, self.step)
        for sentence in diagnostics(self.rows):
            self.display.say(f"WARNING: {sentence}")

    def _save(self) -> None:
        progress = {
            "config": to_plain(self.config),  # the file of the run may be edited
            "step": self.step,
            "seconds": self.seconds,
            "best_nll": self.best_nll,
            "validations": self.validations,
            "averages": self.averages.state(),
            "text": self.corpus.fingerprint,
        }
        content = CheckpointContent(progress, self.optimizer_step.memory, random_states(self.fabric))
        path, optimizer = self.folder.at_step(self.step), self.optimizer_step.optimizer
        save_checkpoint(path, self.model, optimizer, content, self.fabric)
        if self.fabric.is_global_zero:
            self.folder.keep(self.config.train.keep_checkpoints)
        self.fabric.barrier()

    def _headline(self) -> str:
        sizes = " / ".join(f"{self.batches[split].num_tokens:,}" for split in SPLITS)
        processes = f"{self.fabric.world_size} x " if self.fabric.world_size > 1 else ""
        return (
            f"{self.corpus.name}: {sizes} targets to train / validate / test, {self.corpus.vocab_size:,} types; "
            f"{self.model.num_params:,} parameters on {processes}{self.fabric.device} "
            f"({torch.get_num_threads()} threads); {self.folder.path}"
        )
