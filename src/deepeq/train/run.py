"""A whole run: training, then the result on the test text, the figures, a sample."""

import dataclasses
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from deepeq.data import CopyMemory, copy_memory_baseline, unigram_bits
from deepeq.data.files import write_atomically
from deepeq.models import LanguageModel
from deepeq.train.config import RunConfig
from deepeq.train.devices import flushed_denormals, make_fabric
from deepeq.train.figures import plot_run
from deepeq.train.folder import Resume, RunFolder
from deepeq.train.generation import generate
from deepeq.train.loop import Trainer
from deepeq.train.metrics import peak_memory_mb, quality


def train(config: RunConfig, *, resume: Resume = "no") -> dict[str, Any] | None:
    """The result of a run: trains, evaluates the best checkpoint on the test text, draws the figures, writes a sample.

    Under `torchrun` every process calls this; the first one returns the result, the others None.

    Args:
        config: The run.
        resume: Whether to go on from the newest checkpoint in `run.dir`: `no`, `yes`, or `auto`, if there is one.

    Raises:
        ValueError: the run folder is in use, holds a run already, or cannot be resumed with this configuration.
        TrainingError: the loss or the gradient became non-finite; the parameters of the step before are untouched.
        Interrupted: SIGINT or SIGTERM; a checkpoint was saved.
    """
    with flushed_denormals():
        return _train(config, resume)


def _train(config: RunConfig, resume: Resume) -> dict[str, Any] | None:
    fabric = make_fabric(config.train)
    # One process chooses the folder, whose name has the time in it, and keeps others out.
    folder = RunFolder.of(config, resume) if fabric.is_global_zero else None
    with nullcontext() if folder is None else folder.lock():
        path, saved = fabric.broadcast(
            (str(folder.path), folder.last is not None) if folder is not None else ("", False)
        )
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=path))
        trainer = Trainer(config, RunFolder(Path(path)), resume=saved, fabric=fabric)
        status = "failed"
        try:
            trainer.fit()
            result = _finish(trainer)
            with fabric.rank_zero_first():
                pass  # the others wait: one that left while the first still writes could take it down with it
            status = "success"
        finally:
            for logger in trainer.loggers:
                logger.finalize(status)
    if fabric.world_size > 1:
        torch.distributed.destroy_process_group()
    return result


def _finish(trainer: Trainer) -> dict[str, Any] | None:
    trainer.load_best()
    values = trainer.evaluate("test")
    result = _result(trainer, values)
    if not trainer.fabric.is_global_zero:
        return None
    model = trainer.folder.load_model()[2].to(trainer.fabric.device)  # whole, where the trainer's may be sharded
    _write_sample(trainer, model)
    plot_run(trainer.folder.path)
    write_atomically(trainer.folder.result, json.dumps(result, indent=1) + "\n")
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in result.items()}
    trainer.display.table(f"{trainer.corpus.name}: result", shown)
    return result


def _result(trainer: Trainer, values: dict[str, Any]) -> dict[str, Any]:
    level = trainer.corpus.level
    result = {f"test_{name}": value for name, value in quality(level, values["nll"]).items()}
    result |= {f"baseline_{name}": value for name, value in quality(level, _baseline_nll(trainer)).items()}
    result |= {f"valid_{name}": value for name, value in quality(level, trainer.best_nll).items()}
    result |= {
        "test_num_tokens": values["num_tokens"],
        "num_params": trainer.model.num_params,
        "num_params_non_embedding": trainer.model.num_params_non_embedding,
        "num_steps": trainer.step,
        "train_seconds": round(trainer.seconds, 1),
        "peak_memory_mb": round(peak_memory_mb(trainer.fabric.device), 1),
        "num_threads": torch.get_num_threads(),
        "device": str(trainer.fabric.device),
        "torch_version": torch.__version__,
        "seed": trainer.config.train.seed,
        "run_dir": str(trainer.folder.path),
    }
    if "forward_steps" in values:
        result |= {"test_forward_steps": values["forward_steps"], "test_unconverged": values["forward_unconverged"]}
    return result


def _baseline_nll(trainer: Trainer) -> float:
    """The loss of the best prediction that looks at no earlier token."""
    corpus = trainer.corpus
    if isinstance(corpus, CopyMemory):
        return copy_memory_baseline(corpus.config.blank_len)
    return unigram_bits(corpus.train, corpus.test, corpus.vocab_size) * math.log(2)


def _write_sample(trainer: Trainer, model: LanguageModel) -> None:
    corpus, train = trainer.corpus, trainer.config.train
    if isinstance(corpus, CopyMemory):
        return
    prompt = corpus.test[: train.segment_len].long()
    sampled = generate(model, [prompt], num_tokens=200, temperature=0.8, segment_len=train.segment_len, seed=train.seed)
    tokens = [token for (token,) in sampled]
    text = f"{corpus.vocabulary.decode(prompt)}\n--- the model goes on: ---\n{corpus.vocabulary.decode(tokens)}\n"
    write_atomically(trainer.folder.sample, text)
