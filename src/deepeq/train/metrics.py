"""Quantities of a run: averaged over tokens, written as JSON lines."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deepeq.solution import Solution


def quality(level: Literal["character", "word"], nll: float) -> dict[str, float]:
    """What the field reports for a mean negative log-likelihood in nats: bits per character, or perplexity."""
    if level == "character":
        return {"bits_per_character": nll / math.log(2)}
    return {"perplexity": math.exp(min(nll, 700.0))}


class Averages:
    """Running weighted means and maxima; they stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, float]] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Count a scalar with a weight."""
        total, weights = self._sums.get(name, (torch.zeros_like(value, dtype=torch.float64), 0.0))
        self._sums[name] = (total + value.detach().double() * weight, weights + weight)

    def add_max(self, name: str, value: Tensor) -> None:
        """Keep the largest of scalars."""
        value = value.detach()
        self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

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

    Lines of steps after `step`, left by a run that was killed past its last checkpoint, are dropped when it resumes.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= step] if path.exists() and step else []
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._path = path

    def write(self, split: str, step: int, values: dict[str, Any]) -> None:
        """Append a line."""
        with self._path.open("a") as file:
            file.write(json.dumps({"split": split, "step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut short is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is {path.parent} the folder of a run?")
    lines, rows = path.read_text().splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is not JSON; the file is damaged") from error
    return rows
