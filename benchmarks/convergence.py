"""How does the residual of trained cells fall with the evaluations of f, by stacking the cell and by each solver?

    python benchmarks/convergence.py --out DIR --runs RUN_DIR [RUN_DIR ...] [--lengths 100 200 400 800]

Figure 2, right, and figure 4 of the paper. The runs are equilibrium models and weight-tied stacks of text; a dotted
line marks the number of layers that a stack was trained with. The sequences begin at evenly spaced places of the
validation text, the same ones for every length T. Each has the memory that its model has there, after reading as many
tokens before it as the memory holds, in segments and with the solver (or the layers) of the run's own evaluation. All
solvers get the same map f, zeros to start from, and a tolerance that few samples reach (a sample that does keeps its
last residual). An evaluation is one call of f for the whole batch; the first one sees the zeros.

`evaluations_to` is the median over the sequences of the first evaluation whose residual is within a tolerance, null
where half of them have none. A residual is that of the state at an evaluation, not of the best one so far, so that
oscillation shows; `best_residual` is that of the best state, which a solve returns. Relative residuals are ||f(z) - z||
/ ||f(z)|| of a whole sequence. A run that solves its segments in pieces (`equilibrium.piece_len`) is measured on whole
ones too, as if it did not, and on its first piece. Seconds are of one solve after two evaluations that warm up; they
include the measurement of two norms per evaluation, and not what comes before the first one (embedding, memory, keys
and values).
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _harness import Benchmark, markdown, number, synchronize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.utils import _pytree as pytree

import deepeq
from deepeq.cell import prepare
from deepeq.models import LanguageModel, TiedNetwork
from deepeq.train import RunConfig, RunFolder, quality_metrics, read_metrics

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
RTOL = 1e-6  # where a sample stops: below all of TOLERANCES, and within reach of float32
DAMPING = 0.5


class Trained(NamedTuple):
    """A run, with sequences of validation text."""

    config: RunConfig
    model: LanguageModel
    network: TiedNetwork
    validation: dict[str, float]  # perplexity or bits per character of the model
    tokens: Tensor  # (B, longest T)
    memory: Any  # what is before them


class Trace(NamedTuple):
    """One solve."""

    relative: Tensor  # (evaluations, B)
    absolute: Tensor  # (evaluations, B)
    seconds: list[float]  # from the start to the end of each evaluation
    solution: deepeq.Solution


def open_run(benchmark: Benchmark, path: Path, *, batch_size: int, longest: int) -> Trained:
    """Return the model of a run, with sequences of validation text and the memory before them."""
    trained, corpus = benchmark.open_text_model(path)
    config, model, network = trained.config, trained.model, trained.model.network
    if not isinstance(network, TiedNetwork):
        benchmark.stop(f"{path} must be the run of an equilibrium or of a weight-tied stack (model.tied) on text")
    segment_len = config.eval_segment_len
    num_before = segment_len * max(1, math.ceil((network.cell.memory_length() or 0) / segment_len))
    needed, available = num_before + longest, len(corpus.valid) // batch_size - 1
    if available < needed:
        benchmark.stop(
            f"the validation text of {path} gives {batch_size} sequences of {available} tokens, and T = {longest} "
            f"after {num_before} tokens of memory needs {needed}: give smaller --lengths or a smaller --batch_size"
        )
    tokens = corpus.stream("valid", batch_size=batch_size, segment_len=needed).segment(0)[0].to(model.device)
    memory = None
    for segment in tokens[:, :num_before].split(segment_len, dim=1):
        memory = network(model.embedding(segment), memory, how=trained.how).memory
    nll = [row["nll"] for row in read_metrics(RunFolder(path).metrics) if row["split"] == "valid"]
    validation = quality_metrics(corpus.unit, min(nll)) if nll else {}  # none yet in a run that has just begun
    return Trained(config, model, network, validation, tokens[:, num_before:], memory)


def solvers_of(config: RunConfig, num_evals: int) -> dict[str, deepeq.Solver]:
    """Return the solvers by their names in the legend."""
    limits: dict[str, Any] = {"rtol": RTOL, "max_steps": num_evals}
    own = config.equilibrium.eval_solver
    if not isinstance(own, deepeq.Broyden):  # a stack, or a run that evaluates with another method
        own = deepeq.Broyden(history_size=20)
    return {
        "stacking, z <- f(z)": deepeq.FixedPointIteration(**limits),
        f"stacking, damped by {DAMPING:g}": deepeq.FixedPointIteration(damping=DAMPING, **limits),
        "Anderson": deepeq.Anderson(**limits),
        "Broyden, full history": deepeq.Broyden(history_size=num_evals, **limits),
        "Broyden, window of the recipe": deepeq.Broyden(history_size=own.history_size, **limits),
    }


def trace(f: Callable[[Any], Any], z0: Any, solver: deepeq.Solver) -> Trace:
    """Return a solve with the absolute residual and the time of each evaluation."""
    absolute, seconds = [], []

    def recorded(z: Any) -> Any:
        fz = f(z)
        changes = pytree.tree_leaves(pytree.tree_map(torch.sub, fz, z))
        absolute.append(torch.cat([change.flatten(1) for change in changes], dim=1).norm(dim=1))
        synchronize()
        seconds.append(time.perf_counter() - start)
        return fz

    start = time.perf_counter()
    with torch.no_grad():
        solution = deepeq.fixed_point(recorded, z0, solver=solver, on_failure="ignore", nonfinite="keep", verify=False)
    return Trace(solution.residual_history.cpu(), torch.stack(absolute).cpu(), seconds, solution)


def evaluations_to(relative: Tensor, tolerance: float) -> float:
    """Return the median over samples of the first evaluation within a tolerance; `inf` if half of them have none."""
    reached = relative <= tolerance  # (evaluations, B)
    first = torch.where(reached.any(dim=0), reached.int().argmax(dim=0) + 1.0, torch.inf)
    return statistics.median(first.tolist())


def describe(traced: Trace) -> dict[str, Any]:
    """Return what the result keeps of a solve."""

    def numbers(values: Tensor) -> list[float | None]:
        return [number(value) for value in values.tolist()]

    relative, best = traced.relative, traced.solution.relative_residual
    counts = {f"{tolerance:g}": evaluations_to(relative, tolerance) for tolerance in TOLERANCES}
    times = {name: traced.seconds[math.ceil(n) - 1] if n < math.inf else math.inf for name, n in counts.items()}
    return {
        "outcome": traced.solution.result.name.lower(),
        "evaluations_to": {tolerance: number(count) for tolerance, count in counts.items()},
        "seconds_to": {tolerance: number(seconds) for tolerance, seconds in times.items()},
        "num_evals": traced.solution.num_evals,
        "seconds": number(traced.seconds[-1]),
        "last_residual": number(float(relative[-1].quantile(0.5))),
        "last_absolute_residual": number(float(traced.absolute[-1].quantile(0.5))),
        "best_residual": number(float(best.quantile(0.5))),
        "worst_best_residual": number(float(best.max())),
        "relative_median": numbers(relative.quantile(0.5, dim=1)),
        "relative_min": numbers(relative.amin(dim=1)),
        "relative_max": numbers(relative.amax(dim=1)),
        "absolute_median": numbers(traced.absolute.quantile(0.5, dim=1)),
    }


def measure(run: Trained, lengths: Iterable[int], num_evals: int) -> list[dict[str, Any]]:
    """Return one record for each length, that of the first piece first."""
    piece_len, records = run.config.equilibrium.piece_len, []
    for length in [*([] if piece_len is None else [piece_len]), *lengths]:
        f, z0 = prepare(run.network.cell, run.model.embedding(run.tokens[:, :length]), memory=run.memory)
        f(f(z0))
        solvers = {
            name: {"solver": str(solver)} | describe(trace(f, z0, solver))
            for name, solver in solvers_of(run.config, num_evals).items()
        }
        records.append({"T": length, "first_piece": not records and piece_len is not None, "solvers": solvers})
    return records


def draw(result: dict[str, Any]) -> Figure:
    """Return a figure with a row for each run and a column for each length; first pieces have a column of their own."""
    runs: Sequence[dict[str, Any]] = result["runs"]
    pieces = any(record["first_piece"] for run in runs for record in run["lengths"])
    columns = [*([None] if pieces else []), *result["lengths"]]
    figure = Figure(figsize=(max(7.0, 3.4 * len(columns) + 0.6), 3.2 * len(runs) + 1.4), layout="constrained")
    grid, first, lines = figure.add_gridspec(len(runs), len(columns)), None, {}
    for row, run in enumerate(runs):
        for index, record in enumerate(run["lengths"]):
            column = columns.index(None if record["first_piece"] else record["T"])
            axes = figure.add_subplot(grid[row, column], sharex=first, sharey=first)
            first = first or axes
            axes.set_title(f"{'first piece, ' if record['first_piece'] else ''}T = {record['T']}")
            lines |= _draw_one(axes, record, run["depth"])
            if index == 0:
                axes.set_ylabel(f"{run['name']}\nrelative residual")
            if row == len(runs) - 1:
                axes.set_xlabel("evaluations of f")
    assert first is not None
    first.set_yscale("log")
    first.set_xlim(0, result["num_evals"])
    title = "median; band: best to worst sequence"
    free = [row for row, run in enumerate(runs) if pieces and not run["lengths"][0]["first_piece"]]
    if free:  # runs that are not solved in pieces leave room in the first column
        axes = figure.add_subplot(grid[free[0], 0])
        axes.axis("off")
        axes.legend(lines.values(), lines.keys(), title=title, loc="center")
    else:
        ncols = 2 if len(columns) < 3 else 3
        figure.legend(lines.values(), lines.keys(), title=title, loc="outside lower center", ncols=ncols)
    return figure


def _draw_one(axes: Any, record: dict[str, Any], depth: int) -> dict[str, Line2D]:
    lines = {}
    for name, solved in record["solvers"].items():
        low, middle, high = (
            [math.nan if value is None else value for value in solved[f"relative_{part}"]]
            for part in ("min", "median", "max")
        )
        steps = range(1, len(middle) + 1)
        style = "--" if "window" in name else "-"  # until it is full, the window hides the full history
        (lines[name],) = axes.plot(steps, middle, style)
        axes.fill_between(steps, low, high, color=lines[name].get_color(), alpha=0.13, linewidth=0)
    if depth:
        lines["layers of the stack in training"] = axes.axvline(depth, color="0.3", linestyle=":")
    return lines


def table(result: dict[str, Any]) -> str:
    """Return a row for each run, length and solver."""
    ends = ("last_residual", "best_residual", "last_absolute_residual", "seconds")
    columns = ["run", "T", "solver", *(f"evaluations to {tolerance:g}" for tolerance in TOLERANCES)]
    rows = []
    for run in result["runs"]:
        for record in run["lengths"]:
            length = f"{record['T']} (first piece)" if record["first_piece"] else record["T"]
            for name, solved in record["solvers"].items():
                reached = ["-" if count is None else f"{count:g}" for count in solved["evaluations_to"].values()]
                rows.append([run["name"], length, name, *reached, *(solved[key] for key in ends)])
    return markdown([*columns, *(key.replace("_", " ") for key in ends)], rows)


@torch.no_grad()
def main() -> None:
    benchmark = Benchmark("convergence", __doc__, draw)
    options = benchmark.parser
    options.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of trained runs")
    options.add_argument("--lengths", type=int, nargs="+", default=[100, 200, 400, 800], help="positions, T")
    options.add_argument("--batch_size", type=int, default=8, help="number of sequences")
    options.add_argument("--num_evals", type=int, default=100, help="largest number of evaluations of f")
    arguments = benchmark.parse()
    if min(*arguments.lengths, arguments.batch_size, arguments.num_evals - 1) < 1:
        options.error("--lengths and --batch_size must be >= 1, --num_evals >= 2")
    benchmark.check_names(arguments.runs)
    arguments.lengths = lengths = sorted(set(arguments.lengths))
    runs = []
    for path in arguments.runs:
        run = open_run(benchmark, path, batch_size=arguments.batch_size, longest=lengths[-1])
        print(f"{path.name}: solving", file=sys.stderr)
        about = {
            "name": path.name,
            "depth": run.config.model.depth,
            "model": str(run.config.model.layer),
            "seed": run.config.train.seed,
            "validation": run.validation,
            "memory_len": run.network.cell.memory_length(),
            "piece_len": run.config.equilibrium.piece_len,
        }
        runs.append(about | {"lengths": measure(run, lengths, arguments.num_evals)})
    sizes = {"lengths": lengths, "batch_size": arguments.batch_size, "num_evals": arguments.num_evals, "rtol": RTOL}
    result = sizes | {"runs": runs}
    benchmark.report(result, table(result))


if __name__ == "__main__":
    main()
