"""What all examples share: the command line, the record that they write, and the style of their figures.

    arguments = parse("digits", __doc__)  # arguments.fast, .seeds, .out
    rows = [Row("DEQ", count(model), seeds=[0, 1], reached=[97.0, 96.8], seconds=[20.0, 21.0])]  # the equilibrium first
    rows += [Row("explicit network of the same size", count(other), seeds, reached, seconds)]
    figure, (left, right) = panels(2)  # ordinary matplotlib axes in the common style, with the colors of COLORS
    save(arguments, rows, figure, metric="test accuracy (%)", target=96.0, note="Where the equilibrium does not pay.")

`save` writes `OUT/digits.json` and `OUT/digits.png`, and prints a table. The gallery page reads the JSON: `name`,
`metric`, `better` ("higher" or "lower"), `target`, `met`, `rows` (the fields of `Row`, `mean` and `total_seconds`),
`note`, `details`, and the origin of the numbers (`command`, `date`, `commit`, `hardware`, `threads`, `torch`).
"""

import argparse
import json
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.style
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6")  # of the style; the equilibrium takes the first
LARGE = {"font.size": 15, "axes.labelsize": 15, "axes.titlesize": 18, "legend.fontsize": 15, "lines.linewidth": 2.5}


@dataclass
class Row:
    """One model, and what it reached with each seed in how many seconds of training and evaluation."""

    model: str
    parameters: int | None
    seeds: list[int]
    reached: list[float]
    seconds: list[float]


def parse(name: str, description: str | None, seeds: tuple[int, ...] = (0, 1, 2)) -> argparse.Namespace:
    """Return the arguments of the example `name`: `fast`, `seeds` and `out`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a run of seconds, which shows only that the script works")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="one run for each; --fast: the first")
    parser.add_argument("--out", type=Path, help="folder of the results; examples/results, or runs/examples if --fast")
    arguments = parser.parse_args()
    arguments.out = arguments.out or ROOT / ("runs/examples" if arguments.fast else "examples/results")
    arguments.name, arguments.seeds = name, arguments.seeds[:1] if arguments.fast else arguments.seeds
    torch.set_flush_denormal(True)  # a CPU is slow with numbers that are too small for the normal format
    return arguments


def panels(columns: int = 1, rows: int = 1, width: float = 6.5, height: float = 4.8) -> tuple[Figure, Any]:
    """Return a figure and its axes, `width` x `height` inches each; one of them, or an array of several."""
    matplotlib.style.use(["deepeq.style", LARGE])
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns)


def count(model: torch.nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def save(arguments: argparse.Namespace, rows: list[Row], figure: Figure, **fields: Any) -> None:
    """Write the JSON and the figure, and print a table.

    The mean of the first row is compared with the target. Required fields are `metric`, `target` and `note`; `better`
    is "higher" unless it is given, and `details` holds anything else that belongs into the record.
    """
    fields = {"better": "higher", "details": {}} | fields
    table = [asdict(row) | {"mean": mean(row.reached), "total_seconds": sum(row.seconds)} for row in rows]
    reached, target = table[0]["mean"], fields["target"]
    fields["met"] = reached >= target if fields["better"] == "higher" else reached <= target
    record = {"name": arguments.name} | _origin(arguments) | fields | {"rows": table}
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (arguments.out / f"{arguments.name}.json").write_text(text, encoding="utf-8")
    figure.savefig(arguments.out / f"{arguments.name}.png", dpi=120)
    print(f"{fields['metric']}, {fields['better']} is better, target {target:g}")
    for row in table:
        print(f"{row['mean']:10.4g}  {row['model']} ({row['parameters']} parameters, {row['total_seconds']:.1f} s)")


def _origin(arguments: argparse.Namespace) -> dict[str, Any]:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    hardware = f"{names[0]} x {len(names)}" if names else platform.processor()
    words = ["python", f"examples/{arguments.name}.py", *["--fast"] * arguments.fast, "--seeds", *arguments.seeds]
    origin = {"command": " ".join(map(str, words)), "date": time.strftime("%Y-%m-%d"), "commit": commit}
    return origin | {"hardware": hardware, "threads": torch.get_num_threads(), "torch": torch.__version__}
