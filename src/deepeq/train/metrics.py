"""Quantities of a run: averaged over tokens, written as JSON lines."""

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepeq.data.files import write_atomically
from deepeq.solution import Solution


def quality(level: str, nll: float) -> dict[str, float]:
    """What the field reports for a mean negative log-likelihood in nats: bits per character, perplexity, or itself."""
    if level == "symbol":
        return {"loss": nll}
    if level == "character":
        return {"bits_per_character": nll / math.log(2)}
    return {"perplexity": math.exp(min(nll, 700.0))}


class Averages:
    """Running weighted means and maxima; they stay on the device until they are asked for."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {"sums": {}, "maxima": {}}
        self._sums: dict[str, tuple[Tensor, float]] = {
            name: (torch.tensor(total, dtype=torch.float64), weight) for name, (total, weight) in state["sums"].items()
        }
        self._maxima: dict[str, Tensor] = {name: torch.tensor(value) for name, value in state["maxima"].items()}

    def state(self) -> dict[str, Any]:
        """What JSON can hold, for the constructor to go on from."""
        sums = {name: (float(total), weight) for name, (total, weight) in self._sums.items()}
        return {"sums": sums, "maxima": {name: float(value) for name, value in self._maxima.items()}}

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Count a scalar with a weight."""
        total, weights = self._sums.get(name, (torch.zeros_like(value, dtype=torch.float64), 0.0))
        self._sums[name] = (total.to(value.device) + value.detach().double() * weight, weights + weight)

    def add_max(self, name: str, value: Tensor) -> None:
        """Keep the largest of scalars."""
        value = value.detach()
        if name in self._maxima:
            value = torch.maximum(self._maxima[name].to(value.device), value)
        self._maxima[name] = value

    def add_solution(self, prefix: str, solution: Solution) -> None:
        """Count the mean steps, the worst residual and the share of unconverged samples of a solve."""
        self.add(f"{prefix}_steps", solution.num_steps.double().mean())
        self.add_max(f"{prefix}_residual", solution.residual.max())
        self.add(f"{prefix}_unconverged", (~solution.converged).double().mean())

    def compute(self) -> dict[str, float]:
        """All of them by name."""
        means = {name: float(total) / weights for name, (total, weights) in self._sums.items()}
        return means | {name: float(value) for name, value in self._maxima.items()}


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each with `split` and `step`.

    When a run resumes at `step`, lines of later steps, left by a run that was killed past its last checkpoint, are
    dropped, and those of the test text, which is evaluated once more.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        rows = read_metrics(path) if path.exists() and step else []
        kept = [row for row in rows if row["step"] <= step and row["split"] != "test"]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._path = path

    def write(self, split: str, step: int, values: dict[str, Any]) -> None:
        """Append a line."""
        with self._path.open("a") as file:
            file.write(json.dumps({"split": split, "step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut short is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not text, or a line before the last is not what `MetricsFile` writes.
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
            raise ValueError(f"line {number} of {path} is no JSON object with split and step; the file is damaged")
    return rows


def describe(values: dict[str, Any]) -> str:
    """One line for people."""
    names = {"bits_per_character": "bits/character", "perplexity": "perplexity"}
    parts = [f"{values[name]:.3f} {label}" for name, label in names.items() if name in values]
    parts.insert(0, f"loss {values['nll']:.4g}")
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    for prefix in ("forward", "backward"):
        if f"{prefix}_steps" in values and not values.get("warm_up"):
            parts.append(
                f"{prefix} {values[f'{prefix}_steps']:.1f} steps, residual {values[f'{prefix}_residual']:.0e}, "
                f"{values[f'{prefix}_unconverged']:.0%} unconverged"
            )
    return "; ".join(parts)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory that was in use, in MiB: of the device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
