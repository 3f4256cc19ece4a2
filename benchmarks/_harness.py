"""What all benchmarks share: command line, opening a run, timing, memory, and the files that they write."""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NoReturn, TypeVar

import matplotlib.style
import torch
from matplotlib.figure import Figure

from deepeq.data import Corpus
from deepeq.train import TrainedModel, open_model

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"

Key = TypeVar("Key")


class Benchmark:
    """One benchmark: its command line, and the files NAME.json, NAME.md and NAME.png that it writes.

    Args:
        name: Name of the script, without `.py`.
        description: Documentation of the script, which `--help` prints.
        draw: Returns the figure of the content of NAME.json; None for a benchmark without one.
    """

    def __init__(
        self, name: str, description: str | None, draw: Callable[[dict[str, Any]], Figure] | None = None
    ) -> None:
        self.name, self._draw = name, draw
        self.parser = argparse.ArgumentParser(
            prog=f"python benchmarks/{name}.py",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.parser.add_argument("--out", type=Path, required=True, help=f"folder for {name}.json and its table")

    def parse(self) -> argparse.Namespace:
        """Return the arguments, and set denormal numbers to zero as training does.

        `--out DIR --redraw` draws the figure of the results in DIR again, and ends the script.
        """
        if self._draw is not None and "--redraw" in sys.argv:
            parser = argparse.ArgumentParser()
            parser.add_argument("--out", type=Path, required=True)
            parser.add_argument("--redraw", action="store_true")
            self._save_figure(parser.parse_args().out)
            raise SystemExit(0)
        self.arguments = self.parser.parse_args()
        torch.set_flush_denormal(True)
        return self.arguments

    def stop(self, message: object) -> NoReturn:
        """End the script with a sentence."""
        raise SystemExit(f"{self.name}: {message}")

    def open_text_model(self, source: Path) -> tuple[TrainedModel, Corpus]:
        """Return the trained model of a run on text, on the GPU if there is one, with its corpus.

        Args:
            source: The run folder, or a model folder.

        Raises:
            SystemExit: There is no such model, or it was not trained on text.
        """
        try:
            trained = open_model(source)
            corpus = trained.load_corpus()
        except (OSError, ValueError) as error:
            self.stop(error)
        if not isinstance(corpus, Corpus):
            self.stop(f"{source} must be the run of a model of text")
        trained.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return trained, corpus

    def check_names(self, runs: Sequence[Path]) -> None:
        """End the script where two run folders have the same name, by which the result tells them apart."""
        names = [path.name for path in runs]
        if len(set(names)) < len(names):
            self.parser.error(f"--runs must be folders of different names, got {', '.join(names)}")

    def report(self, result: Mapping[str, Any], table: str) -> None:
        """Write the files, and show the table on stderr.

        Args:
            result: What was measured; the origin of the numbers is added.
            table: The content of NAME.md.
        """
        out: Path = self.arguments.out
        out.mkdir(parents=True, exist_ok=True)
        content = origin(command(self.name, self.arguments)) | dict(result)
        (out / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (out / f"{self.name}.md").write_text(table, encoding="utf-8")
        self._save_figure(out)
        print(table, file=sys.stderr)

    def _save_figure(self, out: Path) -> None:
        """Draw what the file holds, so that the figure can be drawn again without measuring anything."""
        if self._draw is not None:
            content = json.loads((out / f"{self.name}.json").read_text(encoding="utf-8"))
            with matplotlib.style.context("deepeq.style"):
                self._draw(content).savefig(out / f"{self.name}.png")


def command(name: str, arguments: argparse.Namespace) -> str:
    """Return the command that repeats a run, with every argument that has a value.

    Folders are shown by their last part. Left out are the folder of the results and what does not change them.
    """
    words = ["python", f"benchmarks/{name}.py", "--out", "OUT"]
    for option, value in vars(arguments).items():
        if option in ("out", "minutes") or value is None or value is False or value == []:
            continue
        words.append(f"--{option}")
        values = value if isinstance(value, list | tuple) else [value]
        words += [] if value is True else [each.name if isinstance(each, Path) else str(each) for each in values]
    return " ".join(words)


def origin(command_line: str) -> dict[str, Any]:
    """Return where numbers come from: command, date, commit, hardware, threads and versions."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    on_gpu, threads = torch.cuda.is_available(), torch.get_num_threads()
    on_threads = "1 thread" if threads == 1 else f"{threads} threads"
    return {
        "command": command_line,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or None,
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{_processor()}, {on_threads}",
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def in_turns(calls: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, list[float]]:
    """Return the seconds of each call in each round, after a round that warms up.

    The calls take turns, so that a change of the machine's speed hits all of them.
    """
    seconds = [{name: seconds_of(call) for name, call in calls.items()} for _ in range(rounds + 1)]
    return {name: [each[name] for each in seconds[1:]] for name in calls}


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes, until the GPU has finished it too."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ratio(some: Sequence[float], others: Sequence[float]) -> float:
    """Return the median ratio of times that were taken in turns."""
    return median(a / b for a, b in zip(some, others, strict=True))


def resident_bytes(*, peak: bool) -> int:
    """Return the resident memory of this process, now or at its peak, from /proc.

    Unlike `getrusage`, this leaves out the process that started this one.
    """
    field = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def in_own_process(script: str, *words: str, **environment: str) -> Any:
    """Return the JSON that a script prints in a process of its own, whose memory is that of this work alone.

    Args:
        script: File of the script.
        words: Its arguments besides `--out`.
        environment: More environment variables.
    """
    line = [sys.executable, script, "--out", os.devnull, *words]
    done = subprocess.run(line, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def number(value: float, digits: int = 4) -> float | None:
    """Return a number with a few digits, or None where JSON cannot hold it."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown; floats have four digits."""
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()
