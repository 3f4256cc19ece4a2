"""How do the steps of the solves grow in training, and what do fewer steps cost in quality at inference?

    python benchmarks/steps.py --out DIR --runs RUN_DIR [RUN_DIR ...] [--split valid] [--max_tokens 20000]

Figure 2, left, and figure 3 of the paper, for runs of equilibrium models of text. Steps over training are what each run
recorded after its pretraining. A step of the forward solve is an evaluation of f, a step of the backward solve is a
vector-Jacobian product.

The best model of each run is evaluated with Broyden's method and with Anderson acceleration. The solver of the run
stands in for the one of its kind, and segments, memory and pieces are the run's too; only the tolerance and the step
limit change: each relative tolerance with a limit of 100 steps, and each step limit with a tolerance of 1e-6. A solve
returns the best of the states that it evaluated, the first of which is zero, so a limit of one returns zero. The text
is the first --max_tokens tokens of a split, cut into the streams of the run's evaluation. Perplexities therefore
compare within this table and not with that of the whole split.

Steps are means over samples. If a segment is solved in pieces, the steps of a sample are those of its slowest piece,
and its residual is the worst one. Tokens per second are of one pass in one process, with the softmax, after one segment
that warms up.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from _harness import Benchmark, markdown, number, seconds_of
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import deepeq
from deepeq.data import SegmentStream, Split
from deepeq.train import EquilibriumConfig, RunFolder, TrainedModel, evaluate, quality_metrics, read_metrics

RTOLS = (1.0, 0.3, 0.1, 0.03, 1e-2, 1e-3, 1e-4, 1e-5)
LIMITS = (1, 2, 3, 5, 8, 12, 16, 20, 30, 40, 60)
MANY_STEPS, TIGHT = 100, 1e-6  # where the other one is varied
NAMES = {"perplexity": "perplexity", "bits_per_character": "bits per character"}
STYLES = {"Broyden": ("o", "-"), "Anderson": ("s", "--"), "FixedPointIteration": ("^", ":")}  # marker and line
MEASURED = ("mean_steps", "mean_residual", "worst_residual", "unconverged", "tokens_per_second")


class Run(NamedTuple):
    """A run, with the text to evaluate on."""

    name: str
    trained: TrainedModel
    batches: SegmentStream
    rows: list[dict[str, Any]]  # metrics.jsonl


def open_run(benchmark: Benchmark, path: Path, *, split: Split, max_tokens: int) -> Run:
    """Return the model of a run, and the first tokens of a split."""
    trained, corpus = benchmark.open_text_model(path)
    config = trained.config
    if config.model.depth:
        benchmark.stop(f"{path} must be the run of an equilibrium model of text")
    try:
        ids = corpus.split(split)[: max_tokens or None]
        batches = SegmentStream(ids, batch_size=config.train.eval_batch_size, segment_len=config.eval_segment_len)
        return Run(path.name, trained, batches, read_metrics(RunFolder(path).metrics))
    except (OSError, ValueError) as error:
        benchmark.stop(error)


def over_training(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Return the steps of the solves by optimizer step, without the rows of the pretraining."""
    rows = [row for row in rows if not row.get("pretraining") and "forward_steps" in row]
    names = {"train": ("step", "forward_steps", "backward_steps"), "valid": ("step", "forward_steps")}
    return {
        split: {name: [number(row[name], 6) for row in rows if row["split"] == split] for name in columns}
        for split, columns in names.items()
    }


def solvers_of(own: deepeq.Solver) -> dict[str, deepeq.Solver]:
    """Return Broyden's method, Anderson acceleration, and the run's own solver in place of the one of its kind."""
    recipe = EquilibriumConfig().with_defaults().eval_solver
    assert recipe is not None
    return {type(solver).__name__: solver for solver in (recipe, deepeq.Anderson(), own)}


def evaluate_with(run: Run, solver: deepeq.Solver) -> dict[str, Any]:
    """Return the quality, steps, residuals and speed of an evaluation."""
    model, values, residuals = run.trained.model, {}, []
    how = replace(run.trained.config.equilibrium, eval_solver=solver).evaluation_how()
    hook = model.register_forward_hook(lambda *call: residuals.extend(call[-1].solution.relative_residual.tolist()))
    about = {"rtol": solver.rtol, "max_steps": solver.max_steps}
    try:
        seconds = seconds_of(lambda: values.update(evaluate(model, run.batches, how=how)))
    except (deepeq.ConvergenceError, FloatingPointError) as error:
        return about | {"error": str(error)}
    finally:
        hook.remove()
    found = quality_metrics(run.trained.unit, values["nll"]) | {
        "nll": values["nll"],
        "mean_steps": values["forward_steps"],
        "mean_residual": fmean(residuals),
        "worst_residual": values["forward_residual"],
        "unconverged": values["forward_unconverged"],
    }
    return about | {
        **{name: number(value, 6) for name, value in found.items()},
        "tokens_per_second": round(values["num_tokens"] / seconds),
    }


def measure(run: Run, rtols: Sequence[float], limits: Sequence[int]) -> dict[str, Any]:
    """Return everything about a run."""
    config, model = run.trained.config, run.trained.model
    own = config.equilibrium.eval_solver
    assert own is not None
    with torch.no_grad():
        model(run.batches.segment(0)[0].to(model.device), how=run.trained.how)
    sweeps = {}
    for name, solver in solvers_of(own).items():
        print(f"{run.name}: {name}", file=sys.stderr)
        solver = replace(solver, atol=0.0)
        by_tolerance = [replace(solver, rtol=rtol, max_steps=MANY_STEPS) for rtol in sorted(rtols, reverse=True)]
        by_limit = [replace(solver, rtol=TIGHT, max_steps=limit) for limit in sorted(limits)]
        sweeps[name] = {
            "solver": str(solver),
            "by_tolerance": [evaluate_with(run, each) for each in by_tolerance],
            "by_limit": [evaluate_with(run, each) for each in by_limit],
        }
    return {
        "name": run.name,
        "model": str(config.model.layer),
        "seed": config.train.seed,
        "num_tokens": run.batches.num_tokens,
        "batch_size": config.train.eval_batch_size,
        "segment_len": config.eval_segment_len,
        "piece_len": config.equilibrium.piece_len,
        "own": {"solver": str(own)} | evaluate_with(run, own),
        "sweeps": sweeps,
        "training": over_training(run.rows),
    }


def draw(result: dict[str, Any]) -> Figure:
    """Return a figure with a color for each run, and panels for training, tolerances and step limits."""
    figure = Figure(figsize=(19.0, 6.4), layout="constrained")
    training, tolerances, limits = figure.subplots(1, 3)
    for index, run in enumerate(result["runs"]):
        color, train, valid = f"C{index}", run["training"]["train"], run["training"]["valid"]
        training.plot(train["step"], train["forward_steps"], "-", color=color)
        training.plot(train["step"], train["backward_steps"], ":", color=color)
        training.plot(valid["step"], valid["forward_steps"], "o", color=color)
        for name, sweep in run["sweeps"].items():
            for axes, points, key in ((tolerances, "by_tolerance", "rtol"), (limits, "by_limit", "max_steps")):
                pairs = [(point[key], point.get(result["measure"], math.nan)) for point in sweep[points]]
                axes.plot(*zip(*pairs, strict=True), "".join(STYLES[name]), color=color)
    part = f"first {result['max_tokens']} tokens" if result["max_tokens"] else "all"
    text = f"{NAMES[result['measure']]} ({part} of {result['split']})"
    training.set(title="Steps of the solves", xlabel="optimizer step", ylabel="steps (mean over samples)")
    training.set_ylim(bottom=0)
    series = {"forward, training": ("", "-"), "backward": ("", ":"), "forward, validation": ("o", "none")}
    training.legend(handles=_keys(series))
    tolerances.set(title="Tolerance at inference", xlabel="relative tolerance (tighter to the right)", ylabel=text)
    tolerances.set_xscale("log")
    tolerances.invert_xaxis()
    limits.set(title="Step limit at inference", xlabel="largest number of steps of a solve", ylabel=text)
    limits.xaxis.get_major_locator().set_params(integer=True)
    used = {name: STYLES[name] for name in STYLES if any(name in run["sweeps"] for run in result["runs"])}
    for axes in (tolerances, limits):
        cut = axes.get_ylim()[1] > result["shown"][1]
        axes.set_ylim(*result["shown"])
        axes.legend(handles=_keys(used), title="cut off above; see the table" if cut else None)
    names = [Line2D([], [], color=f"C{index}", label=run["name"]) for index, run in enumerate(result["runs"])]
    figure.legend(handles=names, loc="outside lower center", ncols=min(4, len(names)))
    return figure


def _keys(styles: dict[str, Any]) -> list[Line2D]:
    return [
        Line2D([], [], color="0.2", marker=marker, linestyle=line, markersize=5, label=label)
        for label, (marker, line) in styles.items()
    ]


def shown(benchmark: Benchmark, runs: Iterable[dict[str, Any]], name: str) -> tuple[float, float]:
    """Return the range of the figure: from a little below the best quality to half more than each run's best."""
    best = []
    for run in runs:
        points = [
            point for sweep in run["sweeps"].values() for key in ("by_tolerance", "by_limit") for point in sweep[key]
        ]
        best += [min(point[name] for point in points if name in point)] if any(name in p for p in points) else []
    if not best:
        benchmark.stop("no evaluation of any run gave a finite loss; their parameters are damaged")
    return 0.95 * min(best), 1.5 * max(best)


def table(result: dict[str, Any]) -> str:
    """Return the steps at the two ends of training, then every evaluation."""
    ends, rows, measured = [], [], (result["measure"], *MEASURED)
    for run in result["runs"]:
        series = run["training"]["train"]
        tenth = math.ceil(len(series["step"]) / 10)
        parts = [part for key in ("forward", "backward") for part in _ends(series[f"{key}_steps"], tenth)]
        ends.append([run["name"], *(fmean(part) if part else None for part in parts)])
        points = [("as in the run", run["own"])]
        for name, sweep in run["sweeps"].items():
            points += [(name, point) for point in [*sweep["by_tolerance"], *sweep["by_limit"]]]
        for name, point in points:
            limits = f"{point['rtol']:g}", point["max_steps"]
            rows.append([run["name"], name, *limits, *(point.get(key) for key in measured)])
    first = ("run", "forward steps, first tenth of training", "last tenth", "backward steps, first tenth", "last tenth")
    columns = ["run", "solver", "rtol", "step limit", *(key.replace("_", " ") for key in measured)]
    return f"{markdown(first, ends)}\n{markdown(columns, rows)}"


def _ends(values: Sequence[float], count: int) -> tuple[Sequence[float], Sequence[float]]:
    return values[:count], values[-count:]


def main() -> None:
    benchmark = Benchmark("steps", __doc__, draw)
    options = benchmark.parser
    options.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of equilibrium runs")
    options.add_argument("--split", choices=["valid", "test"], default="valid", help="text to evaluate on")
    options.add_argument("--max_tokens", type=int, default=20_000, help="number of its first tokens; 0 for all")
    options.add_argument("--rtols", type=float, nargs="+", default=list(RTOLS), help="relative tolerances")
    options.add_argument("--limits", type=int, nargs="+", default=list(LIMITS), help="step limits")
    arguments = benchmark.parse()
    if arguments.max_tokens < 0 or min(arguments.limits) < 1 or min(arguments.rtols) <= 0:
        options.error("--max_tokens must be >= 0, --limits >= 1 and --rtols > 0")
    benchmark.check_names(arguments.runs)
    text = {"split": arguments.split, "max_tokens": arguments.max_tokens}
    opened = [open_run(benchmark, path, **text) for path in arguments.runs]
    units = {run.trained.unit for run in opened}
    if len(units) > 1:
        benchmark.stop(f"runs of {' and '.join(sorted(units))} tokens have no scale in common; give them one by one")
    runs = [measure(run, arguments.rtols, arguments.limits) for run in opened]
    name = next(iter(quality_metrics(units.pop(), 1.0)))
    result = text | {"measure": name, "shown": shown(benchmark, runs, name), "runs": runs}
    benchmark.report(result, table(result))


if __name__ == "__main__":
    main()
