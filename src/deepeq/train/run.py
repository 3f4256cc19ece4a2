"""A whole run: training, then the result on the test text, the figures and a sample."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deepeq.data import CopyMemory, copy_memory_baseline, load_corpus, unigram_bits
from deepeq.files import write_atomically
from deepeq.models import generate
from deepeq.train.checkpoint import SavedCheckpoint
from deepeq.train.config import RunConfig
from deepeq.train.distributed import flushed_denormals, is_sharded, make_fabric, peak_memory_mb
from deepeq.train.figures import draw_figures
from deepeq.train.logging import open_loggers, preparation
from deepeq.train.loop import Trainer
from deepeq.train.pretrained import TrainedModel, load_weights, open_model
from deepeq.train.recipe import Resume, RunFolder
from deepeq.train.summary import write_card


def train(config: RunConfig, *, resume: Resume = "no", extras: bool = True) -> dict[str, Any] | None:
    """Train a model, evaluate its best weights on the test text, draw the figures and write a sample.

    Under `torchrun` every process calls this.

    Args:
        config: The run.
        resume: `no` starts a new run, `yes` continues from the newest checkpoint in `run.dir`, and `auto` continues if
            there is one and starts otherwise.
        extras: Whether to draw the figures and write the sample at the end.

    Returns:
        The result, in the first process; None in the others.

    Raises:
        ValueError: The run folder is in use, holds a run already, or cannot be resumed with this configuration.
        TrainingError: The loss or the gradient is not finite. The parameters are as before this step.
        FloatingPointError: The loss of a validation or of the test is not finite.
        ConvergenceError: An equilibrium in evaluation is not finite.
        OSError: A file cannot be written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    with flushed_denormals():
        fabric = make_fabric(config.train)
        # One process chooses the folder, whose name has the time in it, and keeps others out.
        folder = RunFolder.of(config, resume) if fabric.is_global_zero else None
        with nullcontext() if folder is None else folder.lock():
            if folder is not None:
                folder.remove_temporary()
            path, last = fabric.broadcast((str(folder.path), folder.last) if folder is not None else ("", None))
            config, folder = replace(config, run=replace(config.run, dir=path)), RunFolder(Path(path))
            # One process prepares the data, and the others find it prepared.
            with preparation() as progress, fabric.rank_zero_first():
                corpus = load_corpus(config.data, progress=progress)
            trainer = Trainer(config, folder, corpus, fabric)
            if last is not None:
                trainer.restore(_opened(folder, last))
            writes = open_loggers(config, folder.path, trainer.step) if fabric.is_global_zero else nullcontext([])
            with writes as loggers:
                trainer.fit(loggers)
                result = _finish(trainer, extras=extras)
                with fabric.rank_zero_first():
                    pass  # the others wait: if one exits early, torchrun may stop the first while it writes
        if fabric.world_size > 1:
            torch.distributed.destroy_process_group()
        return result


def _opened(folder: RunFolder, path: Path) -> SavedCheckpoint:
    try:
        return SavedCheckpoint(path)
    except ValueError as error:
        older = folder.saved[:-1]
        hint = f"; delete it to continue from {older[-1].name}" if older else ""
        raise ValueError(f"{error}{hint}") from error


def _finish(trainer: Trainer, *, extras: bool) -> dict[str, Any] | None:
    folder = trainer.folder
    load_weights(folder.best, trainer.model)
    test = trainer.evaluate("test")
    if not trainer.fabric.is_global_zero:
        return None
    result = _result(trainer, test)
    validations = [row for row in trainer.rows if row["split"] == "valid"]
    if validations:  # unless somebody deleted the metrics of a finished run
        valid = min(validations, key=lambda row: row["nll"])
        write_card(folder.best, trainer.trained, valid=valid, test=test, result=result)
    if extras:
        trained = open_model(folder.path) if is_sharded(trainer.model) else trainer.trained
        _write_sample(trainer, trained)
        draw_figures(folder.figures, trainer.rows, trained, trainer.corpus)
    write_atomically(folder.result, json.dumps(result, indent=1) + "\n")
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in result.items()}
    trainer.display.table(f"{trainer.corpus.name}: result", shown)
    return result


def _result(trainer: Trainer, test: dict[str, Any]) -> dict[str, Any]:
    result = {f"test_{name}": value for name, value in trainer.quality("test", test["nll"]).items()}
    result |= {f"baseline_{name}": value for name, value in trainer.quality("test", _baseline_nll(trainer)).items()}
    result |= {f"valid_{name}": value for name, value in trainer.quality("valid", trainer.best_nll).items()}
    result |= {
        "test_num_tokens": test["num_tokens"],
        "num_params": trainer.model.num_params,
        "num_params_non_embedding": trainer.model.num_params_non_embedding,
        "num_steps": trainer.step,
        "train_seconds": round(trainer.seconds, 1),
        "peak_memory_mb": peak_memory_mb(trainer.fabric.device),
        "num_threads": torch.get_num_threads(),
        "device": str(trainer.fabric.device),
        "torch_version": torch.__version__,
        "seed": trainer.config.train.seed,
        "run_dir": str(trainer.folder.path),
    }
    if "forward_steps" in test:
        result |= {"test_forward_steps": test["forward_steps"], "test_unconverged": test["forward_unconverged"]}
    return result


def _baseline_nll(trainer: Trainer) -> float:
    """Return the loss of the best prediction that does not look at earlier tokens."""
    corpus = trainer.corpus
    if isinstance(corpus, CopyMemory):
        return copy_memory_baseline(corpus.config.blank_len)
    return unigram_bits(corpus.train, corpus.test, corpus.vocab_size) * math.log(2)


def _write_sample(trainer: Trainer, trained: TrainedModel) -> None:
    corpus, train, tokenizer = trainer.corpus, trainer.config.train, trained.tokenizer
    if isinstance(corpus, CopyMemory) or tokenizer is None:
        return
    prompt, model = corpus.test[: train.segment_len].long(), trained.model.to(trainer.fabric.device).eval()
    steps = generate(
        model,
        [prompt],
        how=trained.how,
        num_tokens=200,
        temperature=0.8,
        segment_len=train.segment_len,
        seed=train.seed,
    )
    text = tokenizer.decode([token for (token,) in steps])
    write_atomically(trainer.folder.sample, f"{tokenizer.decode(prompt)}\n--- the model continues: ---\n{text}\n")
