"""The training loop."""

import dataclasses
import math
import shlex
import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from torch import Tensor
from torch.utils import _pytree as pytree

from deepeq.data import SPLITS, Batches, Split, load_corpus
from deepeq.models import LanguageModel, ModelOutput, TiedNetwork
from deepeq.solution import ConvergenceError
from deepeq.train.checkpoint import load_checkpoint, save_checkpoint
from deepeq.train.config import RunConfig, load_config, save_config
from deepeq.train.cores import Cores
from deepeq.train.display import Display, preparation
from deepeq.train.evaluation import evaluate
from deepeq.train.folder import RunFolder
from deepeq.train.metrics import Averages, MetricsFile, describe, quality
from deepeq.train.optimizer import jacobian_weight, learning_rate, make_optimizer
from deepeq.train.signals import stop_on_signal


class TrainingError(RuntimeError):
    """A run cannot go on: its loss or its gradient is not finite."""


class Interrupted(Exception):
    """A run was stopped by a signal, and has saved a checkpoint."""


class Trainer:
    """One run: a model, its optimizer, its place in the data."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        logger = TensorBoardLogger(root_dir=folder.path, name="", version="")
        accelerator = config.train.accelerator
        if accelerator == "auto":  # Fabric's own choice may be a device without float64, which the solvers use
            accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        self.fabric = Fabric(accelerator=accelerator, devices=1, precision=config.train.precision, loggers=logger)
        self.fabric.launch()
        torch.manual_seed(config.train.seed)
        with preparation() as progress:
            self.corpus = load_corpus(config.data, progress=progress)
        self.batches = {split: self._batches(split) for split in SPLITS}
        self.model = LanguageModel(self.corpus.vocab_size, config.model)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self._forward, self._wrapped_optimizer = self.fabric.setup(self.model, self.optimizer)
        self._averages = Averages()
        self.cores = Cores.of(self.model, config, lambda solution: self._averages.add_solution("backward", solution))
        self.warm_up_steps = 0 if self.cores is None else self.cores.warm_up_steps

        self.step, self.seconds, self.best_nll = 0, 0.0, math.inf
        self.memory: Any = None
        if config.run.resume:
            self._resume()
        folder.path.mkdir(parents=True, exist_ok=True)
        self.metrics = MetricsFile(folder.metrics, step=self.step)
        save_config(config, folder.config)
        if self.corpus.vocabulary is not None:
            self.corpus.vocabulary.save(folder.vocabulary)

    def fit(self) -> None:
        """Train to the last step."""
        train, start = self.config.train, time.perf_counter() - self.seconds
        with Display(train.steps, start=self.step) as self.display, stop_on_signal() as stop:
            self.display.say(self._headline())
            if self.step == 0:
                self._save(self.folder.last, self.optimizer)  # so that a run killed early can go on
            since, tokens = time.perf_counter(), 0
            while self.step < train.steps:
                if self.step == self.warm_up_steps:
                    self._averages = Averages()
                tokens += self._train_step()
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
                if self.step % train.checkpoint_every == 0 or self.step == train.steps or stop:
                    self._save(self.folder.last, self.optimizer)
                if stop and self.step < train.steps:
                    recipe = shlex.quote(str(self.folder.config))
                    raise Interrupted(
                        f"stopped at step {self.step} of {train.steps}; go on with: deepeq train --config {recipe} "
                        "--run.resume true"
                    )

    def use_core(self, phase: Literal["warm_up", "train", "evaluation"]) -> None:
        """Put the core of a phase into the model; an explicit network has but one."""
        if self.cores is not None:
            assert isinstance(self.model.network, TiedNetwork)
            self.model.network.core = getattr(self.cores, phase)

    def _train_step(self) -> int:
        epoch, position = divmod(self.step, self.batches["train"].num_segments)
        if position == 0 or not self.batches["train"].continuous:
            self.memory = None
        batch = self.batches["train"].segment(position, epoch=epoch)
        tokens, targets = (part.to(self.fabric.device) for part in batch)
        self.model.train()
        self.use_core("warm_up" if self.step < self.warm_up_steps else "train")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, self.step, self.config.train.steps)
        try:
            output, loss = self._loss(tokens, targets)
            self._wrapped_optimizer.zero_grad()
            self.fabric.backward(loss)
        except ConvergenceError as error:
            raise TrainingError(f"step {self.step + 1}: {error}") from error
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_gradient_norm)
        self._check_finite("norm of the gradient", norm)
        self._wrapped_optimizer.step()
        self.memory = output.memory
        self._averages.add("gradient_norm", norm)
        if output.solution is not None and self.cores is not None:
            self._averages.add_solution("forward", output.solution)
        return targets.numel()

    def _loss(self, tokens: Tensor, targets: Tensor) -> tuple[ModelOutput, Tensor]:
        weight = jacobian_weight(self.config.equilibrium, self.step, self.config.train.steps)
        generator = None
        if weight:
            # A source of its own for each step: a resumed run draws the same vectors, on any device.
            generator = torch.Generator(self.fabric.device).manual_seed(self.config.train.seed + self.step)
        output: ModelOutput = self._forward(tokens, self.memory, targets, penalty_generator=generator)
        assert output.nll is not None
        nll = output.nll.mean()
        self._check_finite("loss", nll)
        self._averages.add("nll", nll, targets.numel())
        loss = nll
        if output.jacobian_penalty is not None:
            self._averages.add("jacobian_penalty", output.jacobian_penalty)
            loss = loss + weight * output.jacobian_penalty
        if output.auxiliary_nll is not None:
            self._averages.add("auxiliary_nll", output.auxiliary_nll)
            loss = loss + self.config.model.auxiliary_weight * output.auxiliary_nll
        return output, loss

    def _check_finite(self, what: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value)):
            raise TrainingError(
                f"step {self.step + 1}: the {what} is {float(value.detach())}, and the optimizer was not run; lower "
                f"optimizer.lr (now {self.config.optimizer.lr}), lengthen the warm-up, or go on from "
                f"{self.folder.last} if it exists"
            )

    def evaluate(self, split: Split) -> dict[str, Any]:
        """Quality on a split, with the core of evaluation, written to the metrics."""
        self.model.eval()
        self.use_core("evaluation")
        values = evaluate(self.model, self.batches[split])
        values |= quality(self.corpus.level, values["nll"])
        self.metrics.write(split, self.step, values | {"seconds": round(self.seconds, 2)})
        return values

    def _validate(self) -> None:
        values = self.evaluate("valid")
        self.fabric.log_dict({f"valid/{name}": value for name, value in values.items()}, step=self.step)
        self.display.say(f"step {self.step}: validation {describe(values)}")
        if values["nll"] < self.best_nll:
            self.best_nll = values["nll"]
            self._save(self.folder.best)

    def _log(self, tokens_per_second: float) -> None:
        values = self._averages.compute()
        values |= quality(self.corpus.level, values["nll"]) | {
            "tokens_per_second": round(tokens_per_second, 1),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "warm_up": float(self.step <= self.warm_up_steps),
        }
        self.metrics.write("train", self.step, values | {"seconds": round(self.seconds, 2)})
        self.fabric.log_dict({f"train/{name}": value for name, value in values.items()}, step=self.step)
        self.display.metrics(self.step, describe(values))
        self._averages = Averages()

    def _save(self, path: Path, optimizer: torch.optim.Optimizer | None = None) -> None:
        progress = {
            "step": self.step,
            "seconds": self.seconds,
            "best_nll": self.best_nll,
            "averages": self._averages.state(),
            "text": self.corpus.fingerprint,
        }
        memory = self.memory if optimizer is not None else None
        save_checkpoint(path, self.model, progress=progress, optimizer=optimizer, memory=memory)

    def _resume(self) -> None:
        before, now = load_config(self.folder.config, complete=True), self.config
        changed = [
            f"{part}.{f.name}"
            for part in ("model", "train")
            for f in dataclasses.fields(getattr(now, part))
            if getattr(getattr(now, part), f.name) != getattr(getattr(before, part), f.name)
            and (part == "model" or f.name in ("batch_size", "segment_len", "seed", "precision"))
        ]
        if changed:
            raise ValueError(f"{self.folder.path} was trained with another {', '.join(changed)}; start a new run")
        progress, memory = load_checkpoint(self.folder.last, self.model, self.optimizer)
        if progress["text"] != self.corpus.fingerprint:
            raise ValueError(f"the text of {self.folder.path} has changed since its checkpoint; start a new run")
        if progress["step"] > now.train.steps:
            raise ValueError(f"{self.folder.path} is at step {progress['step']}, past train.steps={now.train.steps}")
        self.step, self.seconds, self.best_nll = progress["step"], progress["seconds"], progress["best_nll"]
        self._averages = Averages(progress["averages"])
        self.memory = pytree.tree_map_only(Tensor, lambda part: part.to(self.fabric.device), memory)

    def _batches(self, split: Split) -> Batches:
        train = self.config.train
        training = split == "train"
        length = train.segment_len if training or train.eval_segment_len is None else train.eval_segment_len
        field = "batch_size" if training else "eval_batch_size"
        try:
            return self.corpus.stream(split, batch_size=getattr(train, field), segment_len=length)
        except ValueError as error:
            raise ValueError(
                f"the {split} data and train.{field}={getattr(train, field)!r} do not fit: {error}"
            ) from error

    def _headline(self) -> str:
        sizes = " / ".join(f"{self.batches[split].num_tokens:,}" for split in SPLITS)
        return (
            f"{self.corpus.name}: {sizes} targets to train / validate / test, {self.corpus.vocab_size:,} types; "
            f"{self.model.num_params:,} parameters on {self.fabric.device} ({torch.get_num_threads()} threads); "
            f"{self.folder.path}"
        )
