"""What every benchmark leaves behind: NAME.json with its origin, NAME.md with a table, NAME.png with a figure."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser that knows `--out`; other options are the benchmark's."""
    made = argparse.ArgumentParser(
        prog=f"deepeq bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, required=True, help=f"folder for {name}.json, {name}.md, {name}.png")
    return made


def command(name: str, arguments: argparse.Namespace, *, hidden: Sequence[str] = ()) -> str:
    """The command line that repeats this run, with every argument that has a value; folders are named by their use."""
    words = ["deepeq", "bench", name, "--out", "OUT"]
    for option, value in vars(arguments).items():
        if option == "out" or option in hidden or value is None or value is False or value == []:
            continue
        words.append(f"--{option}")
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list | tuple) else [value])]
    return " ".join(words)


def origin(command_line: str) -> dict[str, Any]:
    """Where the numbers come from."""
    on_gpu = torch.cuda.is_available()
    return {
        "command": command_line,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{processor()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """The name and number of the processors."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; floats with four digits."""
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(out: Path, name: str, result: dict[str, Any], *, table: str, figure: Figure) -> None:
    """Write the three files, and show the table."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}.md").write_text(table)
    figure.savefig(out / f"{name}.png", dpi=120)
    print(table, file=sys.stderr)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
