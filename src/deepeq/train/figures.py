"""Figures of a run: loss, steps over training (figure 2 left), residual against step (figure 2 right)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.style
import torch
from matplotlib.figure import Figure
from torch import Tensor

from deepeq.data import DataSource
from deepeq.deq import Equilibrium, Pieces
from deepeq.models import TiedNetwork
from deepeq.solvers import FixedPointIteration
from deepeq.train.logging import read_metrics
from deepeq.train.pretrained import CONFIG, TrainedModel, open_model
from deepeq.train.recipe import RunFolder

_LABELS = {"bits_per_character": "bits per character", "perplexity": "perplexity", "loss": "nats per position"}
_CONVERGENCE_STEPS = 60


def plot_run(path: Path) -> list[Path]:
    """Draw the figures of a run folder into its `figures/`, and return their paths.

    Raises:
        FileNotFoundError: The folder holds no run.
        ValueError: A file in it is damaged, or nothing has been measured yet.
    """
    folder = RunFolder(path)
    rows = read_metrics(folder.metrics)
    if not any(row["split"] == "train" for row in rows):
        raise ValueError(f"{folder.metrics} holds no row of training yet; train for at least train.log_every steps")
    trained = open_model(path) if (folder.best / CONFIG).is_file() else None
    return draw_figures(folder.figures, rows, trained, trained and trained.load_corpus())


def draw_figures(
    folder: Path, rows: list[dict[str, Any]], trained: TrainedModel | None = None, corpus: DataSource | None = None
) -> list[Path]:
    """Draw the figures of a run, and return their paths.

    Args:
        folder: Where the figures go.
        rows: What was measured: the rows of `metrics.jsonl`.
        trained: The best model; None if it has none yet.
        corpus: The data that it was trained on.
    """
    folder.mkdir(exist_ok=True)
    written = []
    with matplotlib.style.context("deepeq.style"):
        figures = {"loss": _loss(rows)}
        if any("forward_steps" in row for row in rows):  # an explicit network solves nothing
            figures["steps"] = _steps(rows)
            if trained is not None and corpus is not None:
                figures["convergence"] = _convergence(*_residuals(trained, corpus))
        for name, figure in figures.items():
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1])
    return written


def _figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    return figure, figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)


def _series(rows: list[dict[str, Any]], split: str, name: str) -> tuple[list[int], list[float]]:
    chosen = [row for row in rows if row["split"] == split and name in row]
    return [row["step"] for row in chosen], [row[name] for row in chosen]


def _shade_pretraining(axes: Any, rows: list[dict[str, Any]]) -> None:
    last = max((row["step"] for row in rows if row.get("pretraining")), default=0)
    if last:
        axes.axvspan(0, last, color="0.9", zorder=0, label="pretraining as a shallow stack")


def _loss(rows: list[dict[str, Any]]) -> Figure:
    name = next((name for name in _LABELS if any(name in row for row in rows)), "loss")
    figure, axes = _figure("Training", "optimizer step", f"{_LABELS[name]} (lower is better)")
    _shade_pretraining(axes, rows)
    axes.plot(*_series(rows, "train", name), linewidth=1.2, label="training")
    axes.plot(*_series(rows, "valid", name), "o-", label="validation")
    for step, value in zip(*_series(rows, "test", name), strict=True):
        axes.plot([step], [value], "*", markersize=14, color="black", label=f"test {value:.3g}")
    if name in ("perplexity", "loss"):
        axes.set_yscale("log")
    axes.legend()
    return figure


def _steps(rows: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure("Solver steps over training", "optimizer step", "steps per solve (mean over sequences)")
    _shade_pretraining(axes, rows)
    rows = [row for row in rows if not row.get("pretraining")]
    axes.plot(*_series(rows, "train", "forward_steps"), label="forward, training")
    axes.plot(*_series(rows, "train", "backward_steps"), label="backward")
    axes.plot(*_series(rows, "valid", "forward_steps"), "o--", markersize=4, label="forward, validation")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


@torch.no_grad()
def _residuals(trained: TrainedModel, corpus: DataSource) -> tuple[dict[str, Tensor], int]:
    """Return relative residuals `(steps, B)` on validation text of the evaluation solver and of stacking the cell."""
    config, model, how = trained.config, trained.model.eval(), trained.how
    network = model.network
    assert isinstance(network, TiedNetwork)
    piece, length = (how.equilibrium, how.length) if isinstance(how, Pieces) else (how, None)
    assert isinstance(piece, Equilibrium)
    size = config.train.eval_batch_size
    batches = corpus.stream("valid", batch_size=size, segment_len=config.eval_segment_len)
    memory = model(batches.segment(0)[0].to(model.device), how=how).memory if batches.continuous else None
    x = model.embedding(batches.segment(min(1, batches.num_segments - 1))[0].to(model.device))
    x = x[:, :length]
    solver = replace(piece.solver, rtol=1e-6, atol=0.0, max_steps=_CONVERGENCE_STEPS)
    stack = FixedPointIteration(rtol=1e-6, max_steps=_CONVERGENCE_STEPS)
    histories = {
        label: replace(piece, solver=rule)(network.cell, x, memory=memory).residual_history.cpu()
        for label, rule in ((f"DEQ ({type(solver).__name__})", solver), ("stacking the cell", stack))
    }
    return histories, x.shape[1]


def _convergence(histories: dict[str, Tensor], segment_len: int) -> Figure:
    title = f"Finding the equilibrium of the trained cell (T = {segment_len})"
    figure, axes = _figure(title, "evaluations of f", "relative residual")
    for name, history in histories.items():
        steps = range(1, len(history) + 1)
        (line,) = axes.semilogy(steps, history.median(dim=1).values.clamp_min(1e-9), label=f"{name}, median")
        best, worst = history.amin(dim=1).clamp_min(1e-9), history.amax(dim=1)
        axes.fill_between(steps, best, worst, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.legend(title="band: best to worst sequence")
    return figure
