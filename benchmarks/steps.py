"""How do the steps of the solves grow in training, and what do fewer steps cost in quality at inference?

    deepeq bench steps --out DIR --runs RUN_DIR [RUN_DIR ...] [--split valid] [--max_tokens 20000]

Figure 2, left, and figure 3 of the paper, for runs of equilibrium models of text. Steps over training are what each run
recorded, without the warm-up as a shallow stack; a step of the forward solve is an evaluation of f, one of the backward
solve a vector-Jacobian product.

The best checkpoint of each run is evaluated with Broyden's method and with Anderson acceleration, as the run itself
evaluates (its solver where it is of that kind, segments, memory, pieces), but for the tolerance and the step limit:
once for each relative tolerance with a limit of 100 steps, and once for each step limit with a tolerance of 1e-6. A
solve returns the best of the states that it evaluated, of which the first is zero: with a limit of one there is no
other.
The text is the first --max_tokens tokens of a split, cut into the streams of the run's evaluation, so that perplexity
compares within this table and not with that of the whole split.

Steps are means over samples; of a segment solved in pieces, a sample counts its slowest piece, and its worst residual.
Tokens a second are of one pass in one process, softmax included, after one segment to warm up.
"""

import math
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _report import command, markdown, origin, parser, write
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import deepeq
from deepeq.data import Corpus
from deepeq.data.segments import SegmentStream
from deepeq.models import LanguageModel
from deepeq.solvers import Solver
from deepeq.train import RunFolder, evaluate
from deepeq.train.config import EquilibriumConfig
from deepeq.train.metrics import quality, read_metrics
from deepeq.train.pretrained import PretrainedConfig

RTOLS = (1.0, 0.3, 0.1, 0.03, 1e-2, 1e-3, 1e-4, 1e-5)
LIMITS = (1, 2, 3, 5, 8, 12, 16, 20, 30, 40, 60)
MANY_STEPS, TIGHT = 100, 1e-6  # of the sweep over the other one
NAMES = {"perplexity": "perplexity", "bits_per_character": "bits per character"}
STYLES = {"Broyden": "o-", "Anderson": "s--", "FixedPointIteration": "^:"}


class Trained(NamedTuple):
    """A run."""

    name: str
    config: PretrainedConfig
    model: LanguageModel
    batches: SegmentStream
    rows: list[dict[str, Any]]  # of metrics.jsonl
    seed: int


def open_run(path: Path, *, split: Any, max_tokens: int) -> Trained:
    """The model of a run, and the first tokens of a split."""
    folder = RunFolder(path)
    try:
        run, _, model = folder.load_model()
        corpus = folder.load_corpus(run)
        if run.model.depth or not isinstance(corpus, Corpus):
            raise ValueError(f"{path} must be the run of an equilibrium model of text")
        config = PretrainedConfig.of(run, vocab_size=corpus.vocab_size)
        ids = corpus.split(split)[: max_tokens or None]
        batches = SegmentStream(ids, batch_size=config.eval_batch_size, segment_len=config.eval_segment_len)
        rows = read_metrics(folder.metrics)
    except (OSError, ValueError) as error:
        raise SystemExit(f"steps: {error}") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Trained(path.name, config, model, batches, rows, run.train.seed)


def over_training(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Steps of the solves by optimizer step; rows in which a part of the steps were warm-up are left out."""
    rows = [row for row in rows if not row.get("warm_up") and "forward_steps" in row]
    names = {"train": ("step", "forward_steps", "backward_steps"), "valid": ("step", "forward_steps")}
    return {
        split: {name: [number(row[name]) for row in rows if row["split"] == split] for name in columns}
        for split, columns in names.items()
    }


def solvers_of(own: Solver) -> dict[str, Solver]:
    """Broyden's method, Anderson acceleration, and whatever the run evaluates with in the place of its kind."""
    recipe = EquilibriumConfig().with_defaults().evaluation
    assert recipe is not None
    return {type(solver).__name__: solver for solver in (recipe, deepeq.Anderson(), own)}


def evaluate_with(run: Trained, solver: Solver) -> dict[str, Any]:
    """Quality, steps, residuals and speed."""
    model, residuals = replace(run.config, evaluation=solver).prepare(run.model), []
    hook = model.register_forward_hook(
        lambda _, __, output: residuals.extend(output.solution.relative_residual.tolist())
    )
    about = {"rtol": solver.rtol, "max_steps": solver.max_steps}
    start = time.perf_counter()
    try:
        values = evaluate(model, run.batches)
    except (deepeq.ConvergenceError, FloatingPointError) as error:
        return about | {"error": str(error)}
    finally:
        hook.remove()
    seconds = time.perf_counter() - start
    return about | {
        **{name: number(value) for name, value in quality(run.config.level, values["nll"]).items()},
        "nll": number(values["nll"]),
        "mean_steps": number(values["forward_steps"]),
        "mean_residual": number(statistics.fmean(residuals)),
        "worst_residual": number(values["forward_residual"]),
        "unconverged": number(values["forward_unconverged"]),
        "tokens_per_second": round(values["num_tokens"] / seconds),
    }


def number(value: float) -> float | None:
    """Six digits, and what JSON can hold."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def measure(run: Trained, rtols: list[float], limits: list[int]) -> dict[str, Any]:
    own = run.config.evaluation
    assert own is not None
    with torch.no_grad():
        run.model(run.batches.segment(0)[0].to(run.model.device))
    sweeps = {}
    for name, solver in solvers_of(own).items():
        print(f"{run.name}: {name}", file=sys.stderr)
        solver = replace(solver, atol=0.0)
        sweeps[name] = {
            "solver": str(solver),
            "by_tolerance": [
                evaluate_with(run, replace(solver, rtol=rtol, max_steps=MANY_STEPS))
                for rtol in sorted(rtols, reverse=True)
            ],
            "by_limit": [evaluate_with(run, replace(solver, rtol=TIGHT, max_steps=limit)) for limit in sorted(limits)],
        }
    return {
        "name": run.name,
        "model": str(run.config.model.layer),
        "seed": run.seed,
        "num_tokens": run.batches.num_tokens,
        "batch_size": run.config.eval_batch_size,
        "segment_len": run.config.eval_segment_len,
        "subsequence_len": run.config.subsequence_len,
        "own": {"solver": str(own)} | evaluate_with(run, own),
        "sweeps": sweeps,
        "training": over_training(run.rows),
    }


def draw(result: dict[str, Any]) -> Figure:
    """A color a run; a panel for training, tolerances and step limits."""
    figure = Figure(figsize=(13.0, 4.6), layout="constrained")
    training, tolerances, limits = figure.subplots(1, 3)
    for index, run in enumerate(result["runs"]):
        _draw_training(training, run["training"], f"C{index}")
        for name, sweep in run["sweeps"].items():
            for axes, points, key in ((tolerances, "by_tolerance", "rtol"), (limits, "by_limit", "max_steps")):
                pairs = [(point[key], point.get(result["measure"], math.nan)) for point in sweep[points]]
                axes.plot(*zip(*pairs, strict=True), STYLES[name], color=f"C{index}", markersize=4, linewidth=1.2)
    training.set(title="Steps of the solves", xlabel="optimizer step", ylabel="steps (mean over samples)")
    training.set_ylim(bottom=0)
    styles = {"forward, training": "-", "backward": ":", "forward, validation": "o"}
    training.legend(handles=_keys(styles), fontsize=9)
    part = f"first {result['max_tokens']} tokens" if result["max_tokens"] else "all"
    text = f"{NAMES[result['measure']]} ({part} of {result['split']})"
    tolerances.set(title="Tolerance at inference", xlabel="relative tolerance (tighter to the right)", ylabel=text)
    limits.set(title="Step limit at inference", xlabel="most steps of a solve", ylabel=text)
    tolerances.set_xscale("log")
    tolerances.invert_xaxis()
    used = {name: STYLES[name] for name in STYLES if any(name in run["sweeps"] for run in result["runs"])}
    limits.xaxis.get_major_locator().set_params(integer=True)
    for axes in (tolerances, limits):
        cut = axes.get_ylim()[1] > result["shown"][1]
        axes.set_ylim(*result["shown"])
        axes.legend(handles=_keys(used), title="cut off above; see the table" if cut else None, fontsize=9)
    for axes in (training, tolerances, limits):
        axes.grid(alpha=0.3)
    names = [Line2D([], [], color=f"C{index}", label=run["name"]) for index, run in enumerate(result["runs"])]
    figure.legend(handles=names, loc="outside lower center", ncols=min(4, len(names)))
    return figure


def _draw_training(axes: Any, series: dict[str, dict[str, list[Any]]], color: str) -> None:
    train, valid = series["train"], series["valid"]
    axes.plot(train["step"], train["forward_steps"], "-", color=color, linewidth=1)
    axes.plot(train["step"], train["backward_steps"], ":", color=color, linewidth=1.4)
    axes.plot(valid["step"], valid["forward_steps"], "o", color=color, markersize=5)


def _keys(styles: dict[str, str]) -> list[Line2D]:
    keys = []
    for label, style in styles.items():
        marker = style[0] if style[0] in "os^" else ""
        line = style.removeprefix(marker) or "none"
        keys.append(Line2D([], [], color="0.2", marker=marker, linestyle=line, markersize=5, label=label))
    return keys


def shown(runs: Iterable[dict[str, Any]], name: str) -> tuple[float, float]:
    """What the figure shows of a quality: from a little below the best of all to half more than each run's best."""
    values = [
        [
            point[name]
            for sweep in run["sweeps"].values()
            for points in ("by_tolerance", "by_limit")
            for point in sweep[points]
            if name in point
        ]
        for run in runs
    ]
    best = [min(found) for found in values if found]
    if not best:
        raise SystemExit("steps: no evaluation of any run gave a finite loss; their parameters are damaged")
    return 0.95 * min(best), 1.5 * max(best)


def table(result: dict[str, Any]) -> str:
    """Steps at the two ends of training, then every evaluation."""
    ends = []
    for run in result["runs"]:
        series = run["training"]["train"]
        tenth = math.ceil(len(series["step"]) / 10)
        halves = [(series[name][:tenth], series[name][-tenth:]) for name in ("forward_steps", "backward_steps")]
        ends.append([run["name"], *(statistics.fmean(part) if part else None for pair in halves for part in pair)])
    ends_columns = ["run", "forward steps, first tenth of training", "last tenth"]
    ends_columns += ["backward steps, first tenth", "last tenth"]
    measured = [result["measure"], "mean_steps", "mean_residual", "worst_residual", "unconverged", "tokens_per_second"]
    rows = []
    for run in result["runs"]:
        points = [("as in the run", run["own"])]
        points += [
            (name, point)
            for name, sweep in run["sweeps"].items()
            for point in [*sweep["by_tolerance"], *sweep["by_limit"]]
        ]
        for name, point in points:
            limits = f"{point['rtol']:g}", point["max_steps"]
            rows.append([run["name"], name, *limits, *(point.get(key) for key in measured)])
    columns = ["run", "solver", "rtol", "step limit", *(key.replace("_", " ") for key in measured)]
    return f"{markdown(ends_columns, ends)}\n{markdown(columns, rows)}"


def main() -> None:
    options = parser("steps", __doc__ or "")
    options.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of equilibrium runs")
    options.add_argument("--split", choices=["valid", "test"], default="valid", help="text to evaluate on")
    options.add_argument("--max_tokens", type=int, default=20_000, help="first tokens of it; 0 for all")
    options.add_argument("--rtols", type=float, nargs="+", default=list(RTOLS), help="relative tolerances")
    options.add_argument("--limits", type=int, nargs="+", default=list(LIMITS), help="step limits")
    arguments = options.parse_args()
    if arguments.max_tokens < 0 or min(arguments.limits) < 1 or min(arguments.rtols) <= 0:
        options.error("--max_tokens must be >= 0, --limits >= 1 and --rtols > 0")
    names = [path.name for path in arguments.runs]
    if len(set(names)) < len(names):
        options.error(f"--runs must be folders of different names, got {', '.join(names)}")
    torch.set_flush_denormal(True)  # as training does
    opened = [open_run(path, split=arguments.split, max_tokens=arguments.max_tokens) for path in arguments.runs]
    levels = {run.config.level for run in opened}
    if len(levels) > 1:
        raise SystemExit(f"steps: runs of {' and '.join(sorted(levels))}s have no scale in common; give them apart")
    runs = [measure(run, arguments.rtols, arguments.limits) for run in opened]
    name = next(iter(quality(levels.pop(), 1.0)))
    line = command("steps", arguments, hidden=("runs",)) + f" --runs {' '.join(names)}"
    result = origin(line) | {
        "split": arguments.split,
        "max_tokens": arguments.max_tokens,
        "measure": name,
        "shown": shown(runs, name),
        "runs": runs,
    }
    write(arguments.out, "steps", result, table=table(result), figure=draw(result))


if __name__ == "__main__":
    main()
