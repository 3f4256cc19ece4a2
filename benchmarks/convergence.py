"""How does the residual of trained cells fall with the evaluations of f, by stacking the cell and by each solver?

    deepeq bench convergence --out DIR --runs RUN_DIR [RUN_DIR ...] [--lengths 100 200 400 800]

Figure 2, right, and figure 4 of the paper. The runs are equilibrium models and weight-tied stacks of text; a dotted
line marks the number of layers that a stack was trained with. The sequences begin at evenly spaced places of the
validation text, the same ones for every length T. Each has the memory that its model has there, after reading as many
tokens before it as the memory holds, in segments and with the solver (or the layers) of the run's own evaluation. All
solvers get the same map f, zeros to start from, and a tolerance that few samples reach (a sample that does keeps its
last residual). An evaluation is one call of f for the whole batch; the first one sees the zeros.

`evaluations_to` is the median over the sequences of the first evaluation whose residual is within a tolerance, null
where half of them have none. A residual is that of the state at an evaluation, not of the best one so far, so that
oscillation shows; `best_residual` is that of the best state, which a solve returns. Relative residuals are
||f(z) - z|| / ||f(z)|| of a whole sequence. A run that solves its segments in pieces (`equilibrium.subsequence_len`)
is measured on whole ones too, as if it did not, and on its first piece. Seconds are of one solve after two evaluations
to warm up; they include the measurement of two norms an evaluation, not what comes before the first one (embedding,
memory, keys and values).
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _report import command, markdown, origin, parser, write
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

import deepeq
from deepeq.data import Corpus
from deepeq.models import LanguageModel, TiedNetwork
from deepeq.norms import two_norm
from deepeq.packing import Packing
from deepeq.solvers import Solver
from deepeq.train import RunFolder
from deepeq.train.config import EquilibriumConfig, RunConfig
from deepeq.train.metrics import quality, read_metrics

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
RTOL = 1e-6  # where a sample stops: below all of TOLERANCES, and within reach of float32
DAMPING = 0.5


class Trained(NamedTuple):
    """A run."""

    name: str
    config: RunConfig
    model: LanguageModel
    network: TiedNetwork
    validation: dict[str, float]  # perplexity or bits per character of the checkpoint
    tokens: Tensor  # (B, longest T)
    memory: Any


class Trace(NamedTuple):
    """One solve."""

    relative: Tensor  # (evaluations, B)
    absolute: Tensor  # (evaluations, B)
    seconds: list[float]  # from the start to the end of each evaluation
    solution: deepeq.Solution


def open_run(path: Path, *, batch_size: int, longest: int) -> Trained:
    """The model of a run, with sequences of validation text and the memory before them."""
    folder = RunFolder(path)
    try:
        config, _, model = folder.load_model()
        corpus = folder.load_corpus(config)
    except (OSError, ValueError) as error:
        raise SystemExit(f"convergence: {error}") from error
    if not isinstance(model.network, TiedNetwork) or not isinstance(corpus, Corpus):
        raise SystemExit(
            f"convergence: {path} must be the run of an equilibrium or of a weight-tied stack (model.tied) on text"
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    segment_len = config.train.eval_segment_len or config.train.segment_len
    num_before = segment_len * max(1, math.ceil((model.network.cell.memory_length() or 0) / segment_len))
    needed = num_before + longest
    available = len(corpus.valid) // batch_size - 1
    if available < needed:
        raise SystemExit(
            f"convergence: the validation text of {path} gives {batch_size} sequences of {available} tokens, and "
            f"T = {longest} after {num_before} tokens of memory needs {needed}: give smaller --lengths or a smaller "
            "--batch_size"
        )
    stream = corpus.stream("valid", batch_size=batch_size, segment_len=needed)
    tokens = stream.segment(0)[0].to(model.device)
    memory = None
    for start in range(0, num_before, segment_len):
        memory = model.network(model.embedding(tokens[:, start : start + segment_len]), memory).memory
    nll = [row["nll"] for row in read_metrics(folder.metrics) if row["split"] == "valid"]
    validation = quality(corpus.level, min(nll)) if nll else {}  # none yet in a run that has just begun
    return Trained(path.name, config, model, model.network, validation, tokens[:, num_before:], memory)


def solvers_of(config: RunConfig, num_evals: int) -> dict[str, Solver]:
    """By the name in the legend."""
    limits: dict[str, Any] = {"rtol": RTOL, "max_steps": num_evals}
    recipe = config.equilibrium.evaluation
    if not isinstance(recipe, deepeq.Broyden):  # of a stack, or of a run that evaluates with another method
        recipe = EquilibriumConfig().with_defaults().evaluation
    assert isinstance(recipe, deepeq.Broyden)
    return {
        "stacking, z <- f(z)": deepeq.FixedPointIteration(**limits),
        f"stacking, damped by {DAMPING:g}": deepeq.FixedPointIteration(damping=DAMPING, **limits),
        "Anderson": deepeq.Anderson(**limits),
        "Broyden, full history": deepeq.Broyden(history_size=num_evals, **limits),
        "Broyden, window of the recipe": deepeq.Broyden(history_size=recipe.history_size, **limits),
    }


def trace(f: Callable[[Any], Any], z0: Any, solver: Solver) -> Trace:
    """A solve, with what its own trace lacks."""
    packing, absolute, seconds = Packing(z0), [], []

    def recorded(z: Any) -> Any:
        fz = f(z)
        absolute.append(two_norm(packing.pack(fz) - packing.pack(z)))
        if absolute[-1].is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return fz

    start = time.perf_counter()
    try:
        with torch.no_grad():
            solution = deepeq.fixed_point(recorded, z0, solver=solver, on_failure="ignore", verify=False)
    except deepeq.ConvergenceError as error:  # a non-finite value: what came before it is a result too
        solution = error.solution
    return Trace(solution.residual_history.cpu(), torch.stack(absolute).cpu(), seconds, solution)


def evaluations_to(relative: Tensor, tolerance: float) -> float:
    """The first evaluation within a tolerance, `inf` if there is none; the median over samples."""
    reached = relative <= tolerance  # (evaluations, B)
    first = torch.where(reached.any(dim=0), reached.int().argmax(dim=0) + 1.0, torch.inf)
    return statistics.median(first.tolist())


def describe(traced: Trace) -> dict[str, Any]:
    """What is kept of a solve."""
    counts = {f"{tolerance:g}": evaluations_to(traced.relative, tolerance) for tolerance in TOLERANCES}
    return {
        "outcome": traced.solution.result.name.lower(),
        "evaluations_to": {tolerance: number(count) for tolerance, count in counts.items()},
        "seconds_to": {
            tolerance: number(traced.seconds[math.ceil(count) - 1]) if count < math.inf else None
            for tolerance, count in counts.items()
        },
        "num_evals": traced.solution.num_evals,
        "seconds": number(traced.seconds[-1]),
        "last_residual": number(float(traced.relative[-1].quantile(0.5))),
        "last_absolute_residual": number(float(traced.absolute[-1].quantile(0.5))),
        "best_residual": number(float(traced.solution.relative_residual.quantile(0.5))),
        "worst_best_residual": number(float(traced.solution.relative_residual.max())),
        "relative_median": numbers(traced.relative.quantile(0.5, dim=1)),
        "relative_min": numbers(traced.relative.amin(dim=1)),
        "relative_max": numbers(traced.relative.amax(dim=1)),
        "absolute_median": numbers(traced.absolute.quantile(0.5, dim=1)),
    }


def number(value: float) -> float | None:
    """Four digits, and what JSON can hold."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def numbers(values: Tensor) -> list[float | None]:
    return [number(value) for value in values.tolist()]


def measure(run: Trained, lengths: Iterable[int], num_evals: int) -> list[dict[str, Any]]:
    """One record a length."""
    piece_len, records = run.config.equilibrium.subsequence_len, []
    for length in [*([] if piece_len is None else [piece_len]), *lengths]:
        f, z0 = run.network.core.prepare(run.model.embedding(run.tokens[:, :length]), memory=run.memory)
        f(f(z0))
        solvers = {
            name: {"solver": str(solver)} | describe(trace(f, z0, solver))
            for name, solver in solvers_of(run.config, num_evals).items()
        }
        records.append({"T": length, "first_piece": len(records) == 0 and piece_len is not None, "solvers": solvers})
    return records


def draw(result: dict[str, Any]) -> Figure:
    """A row a run, a column a length; the first pieces have a column of their own before the others."""
    runs: Sequence[dict[str, Any]] = result["runs"]
    columns = result["lengths"]
    if any(record["first_piece"] for run in runs for record in run["lengths"]):
        columns = [None, *columns]
    size = max(6.4, 2.9 * len(columns) + 0.6), 2.7 * len(runs) + 1.0
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(len(runs), len(columns))
    lines: dict[str, Line2D] = {}
    first = None
    for row, run in enumerate(runs):
        for index, record in enumerate(run["lengths"]):
            column = columns.index(None if record["first_piece"] else record["T"])
            axes = figure.add_subplot(grid[row, column], sharex=first, sharey=first)
            first = first or axes
            title = f"first piece, T = {record['T']}" if record["first_piece"] else f"T = {record['T']}"
            axes.set_title(title, fontsize=10)
            axes.grid(alpha=0.3)
            lines |= _draw_one(axes, record, run["depth"])
            if index == 0:
                axes.set_ylabel(f"{run['name']}\nrelative residual")
            if row == len(runs) - 1:
                axes.set_xlabel("evaluations of f")
    assert first is not None
    first.set_yscale("log")
    first.set_xlim(0, result["num_evals"])
    title = "median; band: best to worst sequence"
    figure.legend(
        lines.values(), lines.keys(), title=title, loc="outside lower center", ncols=2 if len(columns) < 3 else 3
    )
    return figure


def _draw_one(axes: Any, record: dict[str, Any], depth: int) -> dict[str, Line2D]:
    lines = {}
    for name, solved in record["solvers"].items():
        steps = range(1, solved["num_evals"] + 1)
        low, middle, high = (
            [math.nan if value is None else value for value in solved[f"relative_{part}"]]
            for part in ("min", "median", "max")
        )
        style = "--" if "window" in name else "-"  # until it is full, the window hides the full history
        (lines[name],) = axes.plot(steps, middle, style, linewidth=1.3)
        axes.fill_between(steps, low, high, color=lines[name].get_color(), alpha=0.13, linewidth=0)
    if depth:
        lines["layers of the stack in training"] = axes.axvline(depth, color="0.3", linestyle=":")
    return lines


def table(result: dict[str, Any]) -> str:
    columns = ["run", "T", "solver", *(f"evaluations to {tolerance:g}" for tolerance in TOLERANCES)]
    columns += ["last residual", "best residual", "last absolute residual", "seconds"]
    rows = []
    for run in result["runs"]:
        for record in run["lengths"]:
            length = f"{record['T']} (first piece)" if record["first_piece"] else record["T"]
            for name, solved in record["solvers"].items():
                reached = ["-" if count is None else f"{count:g}" for count in solved["evaluations_to"].values()]
                ends = [solved[key] for key in ("last_residual", "best_residual", "last_absolute_residual", "seconds")]
                rows.append([run["name"], length, name, *reached, *ends])
    return markdown(columns, rows)


@torch.no_grad()
def main() -> None:
    options = parser("convergence", __doc__ or "")
    options.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of trained runs")
    options.add_argument("--lengths", type=int, nargs="+", default=[100, 200, 400, 800], help="positions, T")
    options.add_argument("--batch_size", type=int, default=8, help="sequences")
    options.add_argument("--num_evals", type=int, default=100, help="most evaluations of f")
    arguments = options.parse_args()
    if min(*arguments.lengths, arguments.batch_size, arguments.num_evals - 1) < 1:
        options.error("--lengths and --batch_size must be >= 1, --num_evals >= 2")
    names = [path.name for path in arguments.runs]
    if len(set(names)) < len(names):
        options.error(f"--runs must be folders of different names, got {', '.join(names)}")
    torch.set_flush_denormal(True)  # as training does
    lengths = sorted(set(arguments.lengths))
    runs = []
    for path in arguments.runs:
        run = open_run(path, batch_size=arguments.batch_size, longest=lengths[-1])
        print(f"{run.name}: solving", file=sys.stderr)
        about = {
            "name": run.name,
            "depth": run.config.model.depth,
            "model": str(run.config.model.layer),
            "seed": run.config.train.seed,
            "validation": run.validation,
            "memory_len": run.network.cell.memory_length(),
            "subsequence_len": run.config.equilibrium.subsequence_len,
        }
        runs.append(about | {"lengths": measure(run, lengths, arguments.num_evals)})
    arguments.lengths = lengths
    line = command("convergence", arguments, hidden=("runs",)) + f" --runs {' '.join(names)}"
    sizes = {"lengths": lengths, "batch_size": arguments.batch_size, "num_evals": arguments.num_evals, "rtol": RTOL}
    result = origin(line) | sizes | {"runs": runs}
    write(arguments.out, "convergence", result, table=table(result), figure=draw(result))


if __name__ == "__main__":
    main()
