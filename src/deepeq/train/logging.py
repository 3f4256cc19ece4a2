"""What a run reports: metrics as JSON lines, curves, progress on the terminal, and warnings before it goes wrong."""

import json
import math
import threading
import uuid
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger

# This import brings no wandb: the logger imports it at its first use, because that takes time and few have it.
from lightning.pytorch.loggers.wandb import WandbLogger
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from deepeq.files import write_atomically
from deepeq.train.config import RunConfig
from deepeq.train.recipe import to_plain

UNCONVERGED_FRACTION = 0.1
"""Smallest fraction of unconverged solves that is worth a warning."""
UNCONVERGED_GROWTH = 2.0
"""Factor by which this fraction must exceed its median so far, and the fraction of the last warning."""
UNCONVERGED_MOST = 0.5
"""Mean of this fraction, without the first `MIN_ROWS` rows with a solver, that is worth a warning of its own."""
RADIUS_GROWTH = 1.5
"""Factor by which a spectral radius above 1 must exceed the smallest one so far, and that of the last warning."""
MIN_ROWS = 5
"""Number of training rows with a solver that are needed to tell what is usual."""

Direction = Literal["forward", "backward"]

_CAUSES = {
    "forward": "the map has become harder to solve",
    "backward": "the linear system of the backward pass has become harder to solve, so gradients are less exact",
}
_EFFECTS = {"forward": "the model is trained at states that are no equilibria", "backward": "gradients are inexact"}
_SOLVERS = {"forward": "solver", "backward": "backward_solver"}
_REMEDIES = (
    "raise equilibrium.jacobian_weight (where there is no piece_len), lower optimizer.lr or raise "
    "equilibrium.pretrain_fraction"
)


class MetricsFile(Logger):
    """`metrics.jsonl`: one JSON object per line, each with `split` and `step`.

    When a run resumes at `step`, lines of later steps, left by a run that was killed after its last checkpoint, are
    dropped, and so are those of the test text, which is evaluated again.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self._path = path
        rows = read_metrics(path) if path.exists() and step else []
        self.rows = [row for row in rows if row["step"] <= step and row["split"] != "test"]
        """The rows so far."""
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: hyper-parameters are in `config.yaml`."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append a row of values, which are all named `SPLIT/NAME`."""
        split = next(iter(metrics)).partition("/")[0]
        row = {"split": split, "step": step} | {name.partition("/")[2]: value for name, value in metrics.items()}
        self.rows.append(row)
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # the error of a full disk names no file
            raise OSError(f"{self._path} cannot be written: {error.strerror}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; a last line that was cut short is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not text, or a line before the last is not what `MetricsFile` writes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is {path.parent} the folder of a run?")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; the file is damaged") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("split"), str) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):
            raise ValueError(f"line {number} of {path} is not a JSON object with split and step; the file is damaged")
    return rows


@contextmanager
def open_loggers(config: RunConfig, folder: Path, step: int) -> Iterator[list[Logger]]:
    """Yield the loggers of the process that writes: `metrics.jsonl` first, TensorBoard, and Weights & Biases if asked.

    What was logged at `step` was logged before its checkpoint, and stays; what came later is hidden. Weights & Biases
    continues the run of the earlier process, whose id lies in the folder.

    Args:
        config: The run; `train.wandb_project` names the project.
        folder: The run folder.
        step: The step that the run continues from; 0 for a new run.

    Raises:
        ValueError: A project is named, but wandb is not installed.
    """
    loggers: list[Logger] = [MetricsFile(folder / "metrics.jsonl", step=step)]
    loggers.append(_TensorBoard(root_dir=folder, name="", version="", purge_step=step + 1))
    project = config.train.wandb_project
    if project is not None:
        name, run_id = folder.resolve().name, _wandb_id(folder, step)
        try:
            loggers.append(_Wandb(project=project, name=name, save_dir=folder, id=run_id, config=to_plain(config)))
        except ModuleNotFoundError as error:
            raise ValueError(
                f"train.wandb_project={project!r} needs the package wandb: pip install wandb, or leave it out"
            ) from error
    status = "failed"
    try:
        with _quiet_writers():
            yield loggers
        status = "success"
    finally:
        for logger in loggers:
            logger.finalize(status)


@contextmanager
def _quiet_writers() -> Iterator[None]:
    """Print no traceback of a thread that could not write: TensorBoard raises its error again at the next call."""
    usual = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            usual(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual


class _TensorBoard(TensorBoardLogger):
    @property
    def log_dir(self) -> str:
        # The base class would replace `$NAME` and `~` in the name of the folder.
        return self.root_dir

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        try:
            super().log_metrics(metrics, step)
        except ValueError as error:  # what the base class makes of any error
            if isinstance(error.__cause__, OSError):
                raise OSError(f"the curves in {self.root_dir} cannot be written: {error.__cause__}") from error
            raise


class _Wandb(WandbLogger):
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            # Otherwise the next run of this process would be written to this one.
            self._experiment.finish()


def _wandb_id(folder: Path, step: int) -> str:
    path = folder / "wandb_id.txt"
    if step and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:8]
    write_atomically(path, run_id)
    return run_id


class _TwoLines(Progress):
    """The bar, and the newest metrics in a line below it, where they cannot push the times off the screen."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.description, no_wrap=True, overflow="ellipsis")


class Display:
    """Progress of a number of steps on stderr, as a context manager: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, num_steps: int, *, enabled: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True, quiet=not enabled)
        self._num_steps = num_steps
        columns = ("step", MofNCompleteColumn(), TaskProgressColumn(), TimeRemainingColumn(), "left,")
        columns += (TimeElapsedColumn(), "elapsed", BarColumn(bar_width=20))
        self._progress = _TwoLines(*columns, console=self.console, transient=True)
        self._task = self._progress.add_task("", total=num_steps)

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.console.quiet:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def metrics(self, step: int, text: str) -> None:
        """Show the newest metrics."""
        self._progress.update(self._task, description=text)
        if not self.console.is_terminal:
            self.console.print(f"step {step}/{self._num_steps}  {text}", markup=False)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False)

    def table(self, title: str, rows: dict[str, str]) -> None:
        """Print a table of two columns."""
        table = Table(title=Text(title), show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, Text(value))  # not markup: the name of a folder may hold brackets
        self.console.print(table)


@contextmanager
def preparation() -> Iterator[Callable[[str, float], None]]:
    """Yield a bar for the preparation of data, called with what is being done and the fraction that is done."""
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, fraction: float) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=fraction)

        yield show


def describe(values: Mapping[str, Any]) -> str:
    """Return metrics as one line for people."""
    names = {"bits_per_character": "bits/character", "perplexity": "perplexity", "bits_per_byte": "bits/byte"}
    parts = [f"{values[name]:.3f} {label}" for name, label in names.items() if name in values]
    parts.insert(0, f"loss {values['nll']:.4g}")
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    for prefix in ("forward", "backward"):
        if f"{prefix}_steps" in values and not values.get("pretraining"):
            parts.append(
                f"{prefix} {values[f'{prefix}_steps']:.1f} steps, residual {values[f'{prefix}_residual']:.0e}, "
                f"{values[f'{prefix}_unconverged']:.0%} unconverged"
            )
    return "; ".join(parts)


def diagnostics(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what the newest of the rows of `metrics.jsonl` gives reason to fear, one sentence each.

    The rows tell everything that came before, so a resumed run warns as an uninterrupted one does.
    """
    if not rows:
        return []
    newest, found = rows[-1], []
    if newest["split"] == "train" and not newest.get("pretraining"):
        found = [rule(rows, way) for way in ("forward", "backward") for rule in (_unconverged, _mostly_unconverged)]
    elif newest["split"] == "valid":
        found = [_radius(rows)]
    return [sentence for sentence in found if sentence is not None]


def _unconverged(rows: Sequence[dict[str, Any]], direction: Direction) -> str | None:
    name = f"{direction}_unconverged"
    newest = rows[-1].get(name)
    if newest is None or newest < UNCONVERGED_FRACTION:
        return None
    values = [row[name] for row in _solved(rows, name)]
    usual = _last_alarm(values, _medians(values), least=UNCONVERGED_FRACTION, growth=UNCONVERGED_GROWTH)
    if usual is None:
        return None
    return (
        f"step {rows[-1]['step']}: {newest:.0%} of the {direction} solves stopped at their step limit, where "
        f"{usual:.1%} was usual: {_CAUSES[direction]}; {_REMEDIES}, or give the solver more: {_more(direction)}"
    )


def _mostly_unconverged(rows: Sequence[dict[str, Any]], direction: Direction) -> str | None:
    name = f"{direction}_unconverged"
    later = _solved(rows, name)[MIN_ROWS:]
    means = [total / count for count, total in enumerate(accumulate(row[name] for row in later), start=1)]
    if not means or means[-1] <= UNCONVERGED_MOST or max(means[:-1], default=0.0) > UNCONVERGED_MOST:
        return None
    return (
        f"step {rows[-1]['step']}: {means[-1]:.0%} of the {direction} solves of late stopped at their step limit, so "
        f"{_EFFECTS[direction]}; {_more(direction)}, or {_REMEDIES}"
    )


def _solved(rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return the training rows with a solver that have a value of this name."""
    return [row for row in rows if row["split"] == "train" and not row.get("pretraining") and name in row]


def _more(direction: Direction) -> str:
    solver = f"equilibrium.{_SOLVERS[direction]}"
    return f"raise {solver}.max_steps or loosen {solver}.rtol (or atol, where that is set)"


def _radius(rows: Sequence[dict[str, Any]]) -> str | None:
    name = "spectral_radius"
    newest, radii, shallow = rows[-1].get(name), [], False
    if newest is None or not newest > 1.0:
        return None
    for row in rows:
        if row["split"] == "train":
            shallow = bool(row.get("pretraining"))
        elif row["split"] == "valid" and name in row and not shallow:
            radii.append(row[name])
    if shallow:  # training has not asked for an equilibrium yet
        return None
    least = _last_alarm(radii, _minima(radii), least=1.0, growth=RADIUS_GROWTH)
    if least is None:
        return None
    return (
        f"step {rows[-1]['step']}: the spectral radius of the map at its equilibrium is {newest:.2f}, up from "
        f"{least:.2f}: above 1, stacking the cell does not converge, and solvers need ever more steps; {_REMEDIES}"
    )


def _last_alarm(values: Sequence[float], usual: Iterable[float], *, least: float, growth: float) -> float | None:
    """Return what was usual before the last of the values, if that value raises an alarm, else None."""
    warned, before = 0.0, None
    for value, normal in zip(values, usual, strict=True):
        before = None
        if value >= least and value >= growth * normal and value >= growth * warned:
            warned, before = value, normal
    return before


def _medians(values: Sequence[float]) -> Iterator[float]:
    """Yield the median of the values before each one; infinite while they are too few."""
    earlier: list[float] = []
    for value in values:
        count = len(earlier)
        # Of a sorted list: statistics.median would sort it again at every row.
        yield (earlier[(count - 1) // 2] + earlier[count // 2]) / 2 if count >= MIN_ROWS else math.inf
        insort(earlier, value)


def _minima(values: Sequence[float]) -> Iterator[float]:
    """Yield the smallest of the values before each one; infinite before the first."""
    least = math.inf
    for value in values:
        yield least
        least = min(least, value)
