"""The training loop."""

import dataclasses
import hashlib
import json
import math
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from torch import Tensor

from deepeq.adjoint import ImplicitAdjoint
from deepeq.data import Corpus, SegmentStream, load_corpus, unigram_bits
from deepeq.data.files import write_atomically
from deepeq.deq import DEQ, Unrolled
from deepeq.models import LanguageModel, Memory, ModelOutput, nll
from deepeq.solution import ConvergenceError, Solution
from deepeq.stability import jacobian_penalty
from deepeq.train.checkpoint import load_checkpoint, save_checkpoint
from deepeq.train.config import RunConfig, load_config, save_config
from deepeq.train.display import Display
from deepeq.train.evaluation import evaluate
from deepeq.train.figures import plot_run
from deepeq.train.folder import RunFolder
from deepeq.train.generation import generate
from deepeq.train.metrics import Averages, MetricsFile, describe, peak_memory_mb, quality
from deepeq.train.optimizer import learning_rate, make_optimizer
from deepeq.train.signals import stop_on_signal


class TrainingError(RuntimeError):
    """A run cannot go on: its loss or its gradient is not finite."""


class Interrupted(Exception):
    """A run was stopped by a signal, and has saved a checkpoint."""


def train(config: RunConfig) -> dict[str, Any]:
    """The result of a run: trains, evaluates the best checkpoint on the test text, draws the figures, writes a sample.

    Raises:
        ValueError: the run folder is in use, holds a run already, or cannot be resumed with this configuration.
        TrainingError: the loss or the gradient became non-finite; the parameters of the step before are untouched.
        Interrupted: SIGINT or SIGTERM; a checkpoint was saved.
    """
    # Saturated softmaxes give gradients too small for normal floats, which made products on a CPU four times slower.
    torch.set_flush_denormal(True)
    folder = RunFolder.of(config)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder.path)))
    with folder.lock():
        trainer = Trainer(config, folder)
        trainer.fit()
        return trainer.finish()


class Trainer:
    """One run: a model, its optimizer, its place in the corpus."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        logger = TensorBoardLogger(root_dir=folder.path, name="", version="")
        accelerator = config.train.accelerator
        if accelerator == "auto":  # Fabric's own choice may be a device without float64, which the solvers use
            accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        self.fabric = Fabric(accelerator=accelerator, devices=1, precision=config.train.precision, loggers=logger)
        self.fabric.launch()
        torch.manual_seed(config.train.seed)
        self.corpus: Corpus = load_corpus(config.data)
        self.streams = {split: self._stream(split) for split in ("train", "valid", "test")}
        self.model = LanguageModel(len(self.corpus.vocabulary), config.model)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self._forward, self._wrapped_optimizer = self.fabric.setup(self.model, self.optimizer)

        cell, equilibrium = self.model.cell, config.equilibrium
        assert equilibrium.backward is not None
        self._averages = Averages()
        adjoint = ImplicitAdjoint(
            solver=equilibrium.backward, callback=lambda solution: self._averages.add_solution("backward", solution)
        )
        self.warm_up = Unrolled(cell, equilibrium.warm_up_depth)
        self.equilibrium = DEQ(cell, solver=equilibrium.solver, adjoint=adjoint)
        self.evaluation = DEQ(cell, solver=equilibrium.evaluation)
        self.warm_up_steps = math.ceil(equilibrium.warm_up_share * config.train.steps)

        self.step, self.seconds, self.best_nll = 0, 0.0, math.inf
        self.memory: Memory | None = None
        if config.run.resume:
            self._resume()
        folder.path.mkdir(parents=True, exist_ok=True)
        self._metrics = MetricsFile(folder.metrics, step=self.step)
        save_config(config, folder.config)
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

    def finish(self) -> dict[str, Any]:
        """Evaluate the best checkpoint on the test text; write the figures, the sample and the result."""
        load_checkpoint(self.folder.best, self.model)
        self.model.core = self.evaluation
        values = evaluate(self.model, self.streams["test"])
        test = quality(self.corpus.vocabulary.level, values["nll"])
        self._metrics.write("test", self.step, values | test)
        self._write_sample()
        plot_run(self.folder.path)
        unigram = unigram_bits(self.corpus.train, self.corpus.test, len(self.corpus.vocabulary))
        result = {f"test_{name}": value for name, value in test.items()}
        result |= {f"unigram_{n}": v for n, v in quality(self.corpus.vocabulary.level, unigram * math.log(2)).items()}
        result |= {
            f"valid_{name}": value for name, value in quality(self.corpus.vocabulary.level, self.best_nll).items()
        }
        result |= {
            "test_num_tokens": values["num_tokens"],
            "test_forward_steps": values["forward_steps"],
            "test_unconverged": values["forward_unconverged"],
            "num_params": self.model.num_params,
            "num_steps": self.step,
            "train_seconds": round(self.seconds, 1),
            "peak_memory_mb": round(peak_memory_mb(self.fabric.device), 1),
            "num_threads": torch.get_num_threads(),
            "device": str(self.fabric.device),
            "torch_version": torch.__version__,
            "seed": self.config.train.seed,
            "run_dir": str(self.folder.path),
        }
        write_atomically(self.folder.result, json.dumps(result, indent=1) + "\n")
        shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in result.items()}
        self.display.table(f"{self.corpus.name}: result", shown)
        return result

    def _train_step(self) -> int:
        position = self.step % self.streams["train"].num_segments
        if position == 0:
            self.memory = None
        tokens, targets = (part.to(self.fabric.device) for part in self.streams["train"].segment(position))
        warm = self.step < self.warm_up_steps
        self.model.core = self.warm_up if warm else self.equilibrium
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, self.step, self.config.train.steps)
        try:
            output: ModelOutput = self._forward(tokens, self.memory)
            loss = nll(output.logits, targets)
            self._check_finite("loss", loss)
            self._wrapped_optimizer.zero_grad()
            self.fabric.backward(loss + self._jacobian_penalty(tokens, output.solution))
        except ConvergenceError as error:
            raise TrainingError(f"step {self.step + 1}: {error}") from error
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_gradient_norm)
        self._check_finite("norm of the gradient", norm)
        self._wrapped_optimizer.step()
        self.memory = output.memory
        self._averages.add("nll", loss, targets.numel())
        self._averages.add("gradient_norm", norm)
        self._averages.add_solution("forward", output.solution)
        return targets.numel()

    def _jacobian_penalty(self, tokens: Tensor, solution: Solution) -> Tensor | float:
        weight, share = self.config.equilibrium.jacobian_weight, self.config.equilibrium.jacobian_share
        # Spread over the steps without a random number, so that a resumed run takes the same ones.
        if weight == 0.0 or math.floor((self.step + 1) * share) == math.floor(self.step * share):
            return 0.0
        with self.fabric.autocast():
            injection = self.model.cell.inject(self.model.embed(tokens), self.memory)
            # A source of its own for each step: a resumed run draws the same vectors, on any device.
            generator = torch.Generator(self.fabric.device).manual_seed(self.config.train.seed + self.step)
            penalty = jacobian_penalty(lambda z: self.model.cell(z, injection), solution.value, generator=generator)
        self._averages.add("jacobian_penalty", penalty)
        return weight * penalty

    def _check_finite(self, what: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value)):
            raise TrainingError(
                f"step {self.step + 1}: the {what} is {float(value.detach())}, and the optimizer was not run; lower "
                f"optimizer.lr (now {self.config.optimizer.lr}), lengthen the warm-up, or go on from "
                f"{self.folder.last} if it exists"
            )

    def _validate(self) -> None:
        self.model.core = self.evaluation
        values = evaluate(self.model, self.streams["valid"])
        values |= quality(self.corpus.vocabulary.level, values["nll"])
        self._metrics.write("valid", self.step, values | {"seconds": round(self.seconds, 2)})
        self.fabric.log_dict({f"valid/{name}": value for name, value in values.items()}, step=self.step)
        self.display.say(f"step {self.step}: validation {describe(values)}")
        if values["nll"] < self.best_nll:
            self.best_nll = values["nll"]
            self._save(self.folder.best)

    def _log(self, tokens_per_second: float) -> None:
        values = self._averages.compute()
        values |= quality(self.corpus.vocabulary.level, values["nll"]) | {
            "tokens_per_second": round(tokens_per_second, 1),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "warm_up": float(self.step <= self.warm_up_steps),
        }
        self._metrics.write("train", self.step, values | {"seconds": round(self.seconds, 2)})
        self.fabric.log_dict({f"train/{name}": value for name, value in values.items()}, step=self.step)
        self.display.metrics(self.step, describe(values))
        self._averages = Averages()

    def _save(self, path: Path, optimizer: torch.optim.Optimizer | None = None) -> None:
        progress = {
            "step": self.step,
            "seconds": self.seconds,
            "best_nll": self.best_nll,
            "averages": self._averages.state(),
            "text": _fingerprint(self.corpus),
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
            and (part == "model" or f.name in ("batch_size", "segment_len", "seed"))
        ]
        if changed:
            raise ValueError(f"{self.folder.path} was trained with another {', '.join(changed)}; start a new run")
        progress, memory = load_checkpoint(self.folder.last, self.model, self.optimizer)
        if progress["text"] != _fingerprint(self.corpus):
            raise ValueError(f"the text of {self.folder.path} has changed since its checkpoint; start a new run")
        if progress["step"] > now.train.steps:
            raise ValueError(f"{self.folder.path} is at step {progress['step']}, past train.steps={now.train.steps}")
        self.step, self.seconds, self.best_nll = progress["step"], progress["seconds"], progress["best_nll"]
        self._averages = Averages(progress["averages"])
        self.memory = memory and Memory(*(part.to(self.fabric.device) for part in memory))

    def _stream(self, split: str) -> SegmentStream:
        train = self.config.train
        field = "batch_size" if split == "train" else "eval_batch_size"
        try:
            ids = getattr(self.corpus, split)
            return SegmentStream(ids, batch_size=getattr(train, field), segment_len=train.segment_len)
        except ValueError as error:
            raise ValueError(f"the {split} text and train.{field} do not fit: {error}") from error

    def _write_sample(self) -> None:
        vocabulary = self.corpus.vocabulary
        prompt = self.corpus.test[: self.config.train.segment_len]
        generator = torch.Generator().manual_seed(self.config.train.seed)
        tokens = list(generate(self.model, prompt, num_tokens=200, temperature=0.8, generator=generator))
        text = f"{vocabulary.decode(prompt)}\n--- the model goes on: ---\n{vocabulary.decode(tokens)}\n"
        write_atomically(self.folder.sample, text)

    def _headline(self) -> str:
        sizes = " / ".join(f"{len(part):,}" for part in (self.corpus.train, self.corpus.valid, self.corpus.test))
        return (
            f"{self.corpus.name}: {sizes} {self.corpus.vocabulary.level}s to train / validate / test, "
            f"{len(self.corpus.vocabulary):,} types; {self.model.num_params:,} parameters on {self.fabric.device} "
            f"({torch.get_num_threads()} threads); {self.folder.path}"
        )


def _fingerprint(corpus: Corpus) -> str:
    ids = torch.cat([corpus.train, corpus.valid, corpus.test])
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
