"""Quantities of a run: averaged over tokens, written as JSON lines."""

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
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
    """Running weighted means and maxima; they stay on the device until they are asked for.

    With a Fabric they are those of all its processes together, which have to add the same names and to ask at the same
    time. Weights are counts of tokens or rows, so that a mean does not depend on how a batch is dealt out.
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        self._fabric = fabric
        self._sums: dict[str, tuple[Tensor, float]] = {}
        self._maxima: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Begin anew."""
        self._sums, self._maxima = {}, {}

    def state(self) -> dict[str, Any]:
        """What JSON can hold, for `restore` to go on from."""
        sums, maxima = self._reduced()
        return {"sums": sums, "maxima": maxima}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        # It is the sum over all processes: the first one takes it, for the others there is nothing to add.
        own = self._fabric is None or self._fabric.is_global_zero
        for name, (total, weight) in state["sums"].items():
            self._sums[name] = (torch.tensor(total if own else 0.0, dtype=torch.float64), weight if own else 0.0)
        self._maxima = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["maxima"].items()}

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
        num_rows = len(solution.num_steps)
        self.add(f"{prefix}_steps", solution.num_steps.double().mean(), num_rows)
        self.add_max(f"{prefix}_residual", solution.relative_residual.max())
        self.add(f"{prefix}_unconverged", (~solution.converged).double().mean(), num_rows)

    def compute(self) -> dict[str, float]:
        """All of them by name."""
        sums, maxima = self._reduced()
        return {name: total / weight for name, (total, weight) in sums.items()} | maxima

    def weight(self, name: str) -> float:
        """The sum of the weights of a mean."""
        return self._reduced()[0][name][1]

    def _reduced(self) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
        """Sums with their weights, and maxima, over all processes."""
        sums = torch.tensor([(float(total), weight) for total, weight in self._sums.values()], dtype=torch.float64)
        maxima = torch.tensor([float(value) for value in self._maxima.values()], dtype=torch.float64)
        if self._fabric is not None and self._fabric.world_size > 1:
            device = self._fabric.device
            sums = self._fabric.all_reduce(sums.to(device), reduce_op="sum")
            maxima = self._fabric.all_reduce(maxima.to(device), reduce_op="max")
        assert isinstance(sums, Tensor)
        assert isinstance(maxima, Tensor)
        pairs = [(total, weight) for total, weight in sums.tolist()]
        return dict(zip(self._sums, pairs, strict=True)), dict(zip(self._maxima, maxima.tolist(), strict=True))


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each with `split` and `step`.

    When a run resumes at `step`, lines of later steps, left by a run that was killed past its last checkpoint, are
    dropped, and those of the test text, which is evaluated once more.
    """

    def __init__(self, path: Path, *, step: int, enabled: bool = True) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        """The rows of training and validation so far."""
        if enabled:
            rows = read_metrics(path) if path.exists() and step else []
            self.rows = [row for row in rows if row["step"] <= step and row["split"] != "test"]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, which has `split` and `step`."""
        if row["split"] != "test":
            self.rows.append(row)
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # that of a full disk names no file
            raise OSError(f"{self._path} cannot be written: {error.strerror}") from error


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
