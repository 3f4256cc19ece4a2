"""The training loop."""

import math
import shlex
import time
from typing import Any, Literal

import torch
from lightning.fabric import Fabric

from deepeq.data import SPLITS, Batches, Split, load_corpus
from deepeq.models import LanguageModel, TiedNetwork
from deepeq.train.checkpoint import (
    Checkpoint,
    load_checkpoint,
    random_states,
    read_content,
    save_checkpoint,
    set_random_states,
)
from deepeq.train.config import RunConfig, load_config, plain, save_config
from deepeq.train.cores import Cores
from deepeq.train.devices import any_process, is_sharded, make_fabric
from deepeq.train.display import Display, preparation
from deepeq.train.evaluation import evaluate, measure_spectral_radius
from deepeq.train.folder import RunFolder
from deepeq.train.health import warnings
from deepeq.train.loggers import make_loggers, quiet_writers
from deepeq.train.metrics import Averages, MetricsFile, describe, peak_memory_mb, quality
from deepeq.train.optimizer import scheduled_depth, scheduled_solver
from deepeq.train.signals import stop_on_signal
from deepeq.train.step import Step, TrainingError
from deepeq.train.storage import DamagedError, open_stored, remove_temporary

__all__ = ["Interrupted", "Trainer", "TrainingError"]


_FIXED = (
    "equilibrium.warm_up_share",
    "optimizer.name",
    "train.batch_size",
    "train.segment_len",
    "train.seed",
    "train.precision",
)
"""Fields, besides those of the model, that a run keeps when it is resumed."""


class Interrupted(Exception):
    """A run was stopped by a signal, and has saved a checkpoint."""


class Trainer:
    """One run: a model, its optimizer, its place in the data.

    Args:
        config: The run.
        folder: Where it writes.
        resume: Whether it goes on from the newest checkpoint there.
        fabric: The processes that it runs in; None to launch them.
    """

    def __init__(
        self, config: RunConfig, folder: RunFolder, *, resume: bool = False, fabric: Fabric | None = None
    ) -> None:
        self.config, self.folder = config, folder
        self.fabric = fabric = make_fabric(config.train) if fabric is None else fabric
        torch.manual_seed(config.train.seed)
        # One process prepares the text, the others find it prepared.
        with preparation() as progress, fabric.rank_zero_first():
            self.corpus = load_corpus(config.data, progress=progress)
        self.model = LanguageModel(self.corpus.vocab_size, config.model)
        if config.train.precision == "64-true":
            self.model.double()
        self.averages = Averages(fabric)
        self.cores = Cores.of(self.model, config, lambda solution: self.averages.add_solution("backward", solution))
        self.warm_up_steps = 0 if self.cores is None else self.cores.warm_up_steps
        self.batches = {split: self._batches(split) for split in SPLITS}
        self._step = Step(self.model, config, self._batches("train", whole=True), fabric, self.averages)
        if fabric.global_rank > 0:  # dropout has to differ between the processes
            torch.manual_seed(config.train.seed + fabric.global_rank * 1_000_003)

        self.step, self.seconds, self.best_nll = 0, 0.0, math.inf
        self.validations: list[float] = []
        self.display = Display(config.train.steps, enabled=fabric.is_global_zero)
        if resume:
            self._resume()
        if fabric.is_global_zero:
            folder.path.mkdir(parents=True, exist_ok=True)
            remove_temporary(folder.checkpoints)
            save_config(config, folder.config)
            if self.corpus.vocabulary is not None:
                self.corpus.vocabulary.save(folder.vocabulary)
        self.metrics = MetricsFile(folder.metrics, step=self.step, enabled=fabric.is_global_zero)
        self.loggers = make_loggers(config, folder.path, self.step) if fabric.is_global_zero else []

    def fit(self) -> None:
        """Train to the last step.

        Raises:
            TrainingError: the loss or the gradient became non-finite; the parameters of the step before are untouched.
            Interrupted: SIGINT or SIGTERM; a checkpoint was saved.
        """
        train, start = self.config.train, time.perf_counter() - self.seconds
        with self.display, quiet_writers(), stop_on_signal() as signals:
            self.display.step(self.step)
            self.display.say(self._headline())
            if self.step == 0:
                self._save()  # so that a run killed early can go on
            since, tokens = time.perf_counter(), 0
            while self.step < train.steps:
                tokens += self._take_step()
                self.step += 1
                self.display.step(self.step)
                if self.step % train.log_every == 0 or self.step == train.steps:
                    self._log(tokens / (time.perf_counter() - since))
                    since, tokens = time.perf_counter(), 0
                self.seconds = time.perf_counter() - start
                if self.step % train.eval_every == 0 or self.step == train.steps:
                    before = time.perf_counter()
                    self._validate()
                    since += time.perf_counter() - before
                self.seconds = time.perf_counter() - start
                stop = any_process(bool(signals), self.fabric)
                if self.step % train.checkpoint_every == 0 or self.step == train.steps or stop:
                    self._save()
                if stop and self.step < train.steps:
                    recipe = shlex.quote(str(self.folder.config))
                    raise Interrupted(
                        f"stopped at step {self.step} of {train.steps}; go on with: deepeq train --config {recipe} "
                        "--resume yes"
                    )

    def use_core(self, phase: Literal["warm_up", "train", "evaluation"]) -> None:
        """Put the core of a phase into the model; an explicit network has but one."""
        if self.cores is not None:
            assert isinstance(self.model.network, TiedNetwork)
            self.model.network.core = getattr(self.cores, phase)

    def evaluate(self, split: Split) -> dict[str, Any]:
        """Quality on a split, with the core of evaluation, written to the metrics."""
        self.model.eval()
        self.use_core("evaluation")
        values = evaluate(self.model, self.batches[split], fabric=self.fabric)
        values |= quality(self.corpus.level, values["nll"])
        if split == "valid" and self.cores is not None:
            values["spectral_radius"] = measure_spectral_radius(self.model, self._batches(split, whole=True))
        self._record(split, values)
        return values

    def load_best(self) -> None:
        """Put the checkpoint with the least validation loss into the model."""
        load_checkpoint(self.folder.best, self.model)

    def _take_step(self) -> int:
        if self.step == self.warm_up_steps:
            self.averages.clear()
        self.use_core("warm_up" if self.step < self.warm_up_steps else "train")
        if self.cores is not None:
            config, num_steps = self.config.equilibrium, self.config.train.steps
            self.cores.train.solver = scheduled_solver(config, self.step, num_steps, self.validations)
            if self.step < self.warm_up_steps:
                self.cores.warm_up.depth = scheduled_depth(config, self.step, num_steps, self.validations)
        return self._step.take(self.step, self.validations)

    def _validate(self) -> None:
        values = self.evaluate("valid")
        self.validations.append(values["nll"])
        self.display.say(f"step {self.step}: validation {describe(values)}")
        if values["nll"] < self.best_nll:
            self.best_nll = values["nll"]
            content = Checkpoint(self._progress(), None, {})
            save_checkpoint(self.folder.best, self.model, content, fabric=self.fabric)

    def _log(self, tokens_per_second: float) -> None:
        values: dict[str, Any] = self.averages.compute()
        values |= quality(self.corpus.level, values["nll"]) | {
            "tokens_per_second": round(tokens_per_second, 1),
            "learning_rate": self._step.optimizer.param_groups[0]["lr"],
            "peak_memory_mb": round(peak_memory_mb(self.fabric.device), 1),
            "warm_up": float(self.step <= self.warm_up_steps),
        }
        self._record("train", values)
        self.display.metrics(self.step, describe(values))
        self.averages.clear()

    def _record(self, split: Split, values: dict[str, Any]) -> None:
        row = {"split": split, "step": self.step, **values, "seconds": round(self.seconds, 2)}
        if not self.fabric.is_global_zero:
            return
        self.metrics.write(row)
        if split != "test":
            for logger in self.loggers:
                logger.log_metrics({f"{split}/{name}": value for name, value in values.items()}, self.step)
            for warning in warnings(self.metrics.rows):
                self.display.say(f"WARNING: {warning}")

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "best_nll": self.best_nll,
            "validations": self.validations,
            "averages": self.averages.state(),
            "text": self.corpus.fingerprint,
            "config": plain(self.config),
        }

    def _save(self) -> None:
        path = self.folder.at_step(self.step, sharded=is_sharded(self.model))
        content = Checkpoint(self._progress(), self._step.memory, random_states(self.fabric))
        save_checkpoint(path, self.model, content, optimizer=self._step.optimizer, fabric=self.fabric)
        if self.fabric.is_global_zero:
            self.folder.keep(self.config.train.keep_checkpoints)
        self.fabric.barrier()

    def _resume(self) -> None:
        path, now = self.folder.last, self.config
        assert path is not None
        self._check_changes()
        try:
            progress = read_content(open_stored(path)).progress
        except DamagedError as error:
            older = self.folder.saved[:-1]
            hint = f"; delete it to go on from {older[-1].name}" if older else ""
            raise ValueError(f"{error}{hint}") from error
        if progress["text"] != self.corpus.fingerprint:
            raise ValueError(f"the text of {self.folder.path} has changed since its checkpoint; start a new run")
        if progress["step"] > now.train.steps:
            raise ValueError(f"{self.folder.path} is at step {progress['step']}, past train.steps={now.train.steps}")
        content = load_checkpoint(path, self.model, self._step.optimizer)
        self.step, self.seconds, self.best_nll = progress["step"], progress["seconds"], progress["best_nll"]
        self.validations = progress["validations"]
        self.averages.restore(progress["averages"])
        self._step.restore_memory(content.memory)
        if not set_random_states(content.random, self.fabric):
            self.display.say("another number of processes than before: dropout masks are drawn anew")

    def _check_changes(self) -> None:
        """Refuse a configuration that cannot go on with the run, and tell what else has changed."""
        before = plain(load_config(self.folder.config, complete=True))
        parts = ("data", "model", "equilibrium", "optimizer", "train")
        now = plain(self.config)
        changed = [
            f"{part}.{name}" for part in parts for name in now[part] if now[part][name] != before[part].get(name)
        ]
        fixed = [name for name in changed if name.startswith("model.") or name in _FIXED]
        if fixed:
            raise ValueError(f"{self.folder.path} was trained with another {', '.join(fixed)}; start a new run")
        if changed:
            self.display.say(f"goes on with another {', '.join(changed)}")

    def _batches(self, split: Split, *, whole: bool = False) -> Batches:
        """The share of this process in a split, or the whole of it."""
        train = self.config.train
        training = split == "train"
        length = train.segment_len if training or train.eval_segment_len is None else train.eval_segment_len
        field = "batch_size" if training else "eval_batch_size"
        try:
            batches = self.corpus.stream(split, batch_size=getattr(train, field), segment_len=length)
            return batches if whole else batches.shard(self.fabric.global_rank, self.fabric.world_size)
        except ValueError as error:
            raise ValueError(
                f"the {split} data and train.{field}={getattr(train, field)!r} do not fit: {error}"
            ) from error

    def _headline(self) -> str:
        sizes = " / ".join(f"{self._batches(split, whole=True).num_tokens:,}" for split in SPLITS)
        processes = f"{self.fabric.world_size} x " if self.fabric.world_size > 1 else ""
        return (
            f"{self.corpus.name}: {sizes} targets to train / validate / test, {self.corpus.vocab_size:,} types; "
            f"{self.model.num_params:,} parameters on {processes}{self.fabric.device} "
            f"({torch.get_num_threads()} threads); {self.folder.path}"
        )
