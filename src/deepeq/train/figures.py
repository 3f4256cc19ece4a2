"""Figures of a run: loss, steps over training (figure 2 left), residual against step (figure 2 right)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from deepeq.deq import DEQ
from deepeq.models import TiedNetwork
from deepeq.solvers import FixedPointIteration
from deepeq.train.config import load_config
from deepeq.train.folder import RunFolder
from deepeq.train.metrics import read_metrics

_LABELS = {"bits_per_character": "bits per character", "perplexity": "perplexity", "loss": "nats a position"}
_CONVERGENCE_STEPS = 60


def plot_run(path: Path) -> list[Path]:
    """The figures of a run folder, written to its `figures/`.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a file in it is damaged, or nothing has been measured yet.
    """
    folder = RunFolder(path)
    rows = read_metrics(folder.metrics)
    if not any(row["split"] == "train" for row in rows):
        raise ValueError(f"{folder.metrics} holds no line of training yet; train for at least train.log_every steps")
    folder.figures.mkdir(exist_ok=True)
    figures = {"loss": _loss(rows)}
    if load_config(folder.config, complete=True).model.depth == 0:
        figures["steps"] = _steps(rows)
        if folder.last is not None or folder.best.exists():
            figures["convergence"] = _convergence(*_residuals(folder))
    written = []
    for name, figure in figures.items():
        written.append(folder.figures / f"{name}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def _figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _series(rows: list[dict[str, Any]], split: str, name: str) -> tuple[list[int], list[float]]:
    chosen = [row for row in rows if row["split"] == split and name in row]
    return [row["step"] for row in chosen], [row[name] for row in chosen]


def _shade_warm_up(axes: Any, rows: list[dict[str, Any]]) -> None:
    last = max((row["step"] for row in rows if row.get("warm_up")), default=0)
    if last:
        axes.axvspan(0, last, color="0.9", zorder=0, label="warm-up as a shallow stack")


def _loss(rows: list[dict[str, Any]]) -> Figure:
    name = next((name for name in _LABELS if any(name in row for row in rows)), "loss")
    figure, axes = _figure("Training", "optimizer step", _LABELS[name])
    _shade_warm_up(axes, rows)
    axes.plot(*_series(rows, "train", name), linewidth=1, label="training")
    axes.plot(*_series(rows, "valid", name), "o-", markersize=4, label="validation")
    for step, value in zip(*_series(rows, "test", name), strict=True):
        axes.plot([step], [value], "*", markersize=11, color="black", label=f"test {value:.3g}")
    if name in ("perplexity", "loss"):
        axes.set_yscale("log")
    axes.legend()
    return figure


def _steps(rows: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure("Solver steps over training", "optimizer step", "steps of a solve (mean over samples)")
    _shade_warm_up(axes, rows)
    rows = [row for row in rows if not row.get("warm_up")]
    axes.plot(*_series(rows, "train", "forward_steps"), label="forward, training")
    axes.plot(*_series(rows, "train", "backward_steps"), label="backward")
    axes.plot(*_series(rows, "valid", "forward_steps"), "o--", markersize=4, label="forward, validation")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


@torch.no_grad()
def _residuals(folder: RunFolder) -> tuple[dict[str, Tensor], int]:
    """Relative residuals `(steps, B)` on validation text, of the solver of evaluation and of stacking the cell."""
    config, _, model = folder.load_model()
    network, evaluation = model.network, config.equilibrium.evaluation
    assert isinstance(network, TiedNetwork)
    assert evaluation is not None
    length = config.train.eval_segment_len or config.train.segment_len
    batches = folder.load_corpus(config).stream("valid", batch_size=config.train.eval_batch_size, segment_len=length)
    memory = model(batches.segment(0)[0]).memory if batches.continuous else None
    x = model.embedding(batches.segment(min(1, batches.num_segments - 1))[0])
    x = x[:, : config.equilibrium.subsequence_len]  # the first piece of those that are solved
    solver = replace(evaluation, rtol=1e-6, atol=0.0, max_steps=_CONVERGENCE_STEPS)
    stack = FixedPointIteration(rtol=1e-6, max_steps=_CONVERGENCE_STEPS)
    layer = DEQ(network.cell, solver=solver, on_failure="ignore", verify=False)
    traces = {
        f"DEQ ({type(solver).__name__})": layer(x, memory=memory).residual_history,
        "stacking the cell": layer(x, memory=memory, solver=stack).residual_history,
    }
    return traces, x.shape[1]


def _convergence(traces: dict[str, Tensor], segment_len: int) -> Figure:
    title = f"Finding the equilibrium of the trained cell (T = {segment_len})"
    figure, axes = _figure(title, "evaluations of f", "relative residual")
    for name, trace in traces.items():
        steps = range(1, len(trace) + 1)
        (line,) = axes.semilogy(steps, trace.median(dim=1).values.clamp_min(1e-9), label=f"{name}, median")
        axes.fill_between(
            steps, trace.amin(dim=1).clamp_min(1e-9), trace.amax(dim=1), color=line.get_color(), alpha=0.2, linewidth=0
        )
    axes.legend(title="band: best to worst sample")
    return figure
