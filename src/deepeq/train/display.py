"""Live progress on stderr: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


class Display:
    """Progress of a number of steps, as a context manager."""

    def __init__(self, num_steps: int, *, enabled: bool = True) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not enabled)
        self._num_steps = num_steps
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.description}"), console=self.console, transient=True)
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
        """Show what is measured now."""
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
    """A bar for the preparation of data: what is being done, and the share of it that is done, from 0 to 1."""
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=share)

        yield show
