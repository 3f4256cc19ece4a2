"""What a run measures: averages over processes, quality on a text, and the evaluation of a trained model."""

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from torch import Tensor

from deepeq.cell import prepare
from deepeq.data import Batches, Split
from deepeq.deq import Equilibrium, How, Pieces, Stack
from deepeq.models import LanguageModel, TiedNetwork, TransformerConfig
from deepeq.solution import Solution
from deepeq.solvers import Solver
from deepeq.stability import spectral_radius
from deepeq.train.config import RunConfig
from deepeq.train.distributed import gathered
from deepeq.train.pretrained import open_model


def quality_metrics(unit: str, nll: float, *, bytes_per_token: float | None = None) -> dict[str, float]:
    """Return what the field reports for a mean negative log-likelihood.

    Args:
        unit: What one token is: `character`, `word`, `bpe` or `symbol`.
        nll: Nats per token.
        bytes_per_token: UTF-8 bytes of the text divided by its tokens, for byte-pair tokens.

    Returns:
        `bits_per_character`, `perplexity` (and `bits_per_byte`), or `loss`.
    """
    if unit == "symbol":
        return {"loss": nll}
    if unit == "character":
        return {"bits_per_character": nll / math.log(2)}
    perplexity = {"perplexity": math.exp(min(nll, 700.0))}
    return (
        perplexity if bytes_per_token is None else perplexity | {"bits_per_byte": nll / math.log(2) / bytes_per_token}
    )


class Averages:
    """Running weighted means and maxima, which stay on the device until they are asked for.

    With a Fabric they are those of all its processes together, which must add the same names and ask at the same time.
    Weights are numbers of tokens or rows, so a mean does not depend on how a batch is dealt out.
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        self._fabric = fabric
        self._sums: dict[str, tuple[Tensor, float]] = {}
        self._maxima: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._sums, self._maxima = {}, {}

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON can hold it."""
        sums, maxima = self._reduced()
        return {"sums": sums, "maxima": maxima}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        # The state is the sum over all processes: the first one takes it, and the others have nothing to add.
        own = self._fabric is None or self._fabric.is_global_zero
        for name, (total, weight) in state["sums"].items():
            self._sums[name] = (torch.tensor(total if own else 0.0, dtype=torch.float64), weight if own else 0.0)
        self._maxima = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["maxima"].items()}

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Add a scalar to a mean.

        Args:
            name: Name of the mean.
            value: The scalar.
            weight: Its weight in the mean.
        """
        total, weights = self._sums.get(name, (torch.zeros_like(value, dtype=torch.float64), 0.0))
        self._sums[name] = (total.to(value.device) + value.detach().double() * weight, weights + weight)

    def add_max(self, name: str, value: Tensor) -> None:
        """Keep the largest of several scalars."""
        value = value.detach()
        if name in self._maxima:
            value = torch.maximum(self._maxima[name].to(value.device), value)
        self._maxima[name] = value

    def add_solution(self, prefix: str, solution: Solution) -> None:
        """Add the mean steps, the worst residual and the fraction of unconverged problems of a solve."""
        num_rows = len(solution.num_steps)
        self.add(f"{prefix}_steps", solution.num_steps.double().mean(), num_rows)
        self.add_max(f"{prefix}_residual", solution.relative_residual.max())
        self.add(f"{prefix}_unconverged", (~solution.converged).double().mean(), num_rows)

    def compute(self) -> dict[str, float]:
        """Return all means and maxima by name."""
        sums, maxima = self._reduced()
        return {name: total / weight for name, (total, weight) in sums.items()} | maxima

    def weight(self, name: str) -> float:
        """Return the sum of the weights of a mean."""
        return self._reduced()[0][name][1]

    def _reduced(self) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
        """Return sums with their weights, and maxima, over all processes."""
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


@torch.no_grad()
def evaluate(
    model: LanguageModel, batches: Batches, *, how: How | None = None, fabric: Fabric | None = None
) -> dict[str, Any]:
    """Return the mean `nll` in nats per token, `num_tokens`, and how equilibria were found, over one pass.

    The model stays in its mode, so call `model.eval()` before.

    Args:
        model: The model.
        batches: The text; with a `fabric`, the rows of this process.
        how: How the cell is solved; None for the model's own way.
        fabric: The processes whose results are averaged.

    Raises:
        FloatingPointError: The loss is not finite.
        ConvergenceError: An equilibrium is not finite.
    """
    averages, memory = Averages(fabric), None
    network = model.network
    solves = isinstance(network, TiedNetwork) and not isinstance(how or network.how, Stack)
    for tokens, targets in batches:
        tokens, targets = tokens.to(model.device), targets.to(model.device)
        output = model(tokens, memory, targets, how=how)
        memory = output.memory if batches.continuous else None
        averages.add("nll", output.nll.mean(), targets.numel())
        if solves:
            averages.add_solution("forward", output.solution)
    result = averages.compute()
    if not math.isfinite(result["nll"]):
        raise FloatingPointError(f"the loss of the model on this text is {result['nll']}; its parameters are damaged")
    return result | {"num_tokens": round(averages.weight("nll"))}


@torch.no_grad()
def measure_spectral_radius(model: LanguageModel, batches: Batches, how: How, *, num_rows: int = 4) -> float:
    """Return the mean spectral radius of `df/dz` at the equilibria of the first segment, without a memory.

    All processes call this with the same batches.

    Args:
        model: The model.
        batches: The text, with the rows of all processes.
        how: How equilibria are found. With `Pieces`, only the first piece is measured.
        num_rows: Number of rows of the segment that are measured.
    """
    network = model.network
    assert isinstance(network, TiedNetwork)
    tokens = batches.segment(0)[0][:num_rows].to(model.device)
    if isinstance(how, Pieces):
        tokens, how = tokens[:, : how.length], how.equilibrium
    assert isinstance(how, Equilibrium)
    with gathered(model):
        f, z0 = prepare(network.cell, model.embedding(tokens))
        # Its own random numbers, so that a measurement changes nothing in the run.
        generator = torch.Generator(model.device).manual_seed(0)
        radius = spectral_radius(f, how.solve(f, z0).value, num_steps=30, generator=generator).mean()
    return float(radius)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is evaluated, and how; None stands for what the run did.

    Raises:
        ValueError: A field is out of range.
    """

    split: Split = "test"
    """Text to evaluate on."""
    batch_size: int | None = None
    """Number of streams side by side; default `train.eval_batch_size`."""
    segment_len: int | None = None
    """Number of tokens of a stream in one call; default `train.eval_segment_len`."""
    memory_len: int | None = None
    """Number of positions before the segment that attention sees; 0 for none."""
    solver: Solver | None = None
    """Solver of the equilibria, with its own tolerances; default `equilibrium.eval_solver`."""
    rtol: float | None = None
    """Relative tolerance instead of the solver's."""
    atol: float | None = None
    """Absolute tolerance instead of the solver's."""
    max_steps: int | None = None
    """Step limit instead of the solver's."""
    piece_len: int | None = None
    """Largest number of positions that are solved together; 0 for a whole segment."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; `auto` takes a CUDA device if there is one."""

    def __post_init__(self) -> None:
        problems = []
        for name, least in (("batch_size", 1), ("segment_len", 1), ("memory_len", 0), ("piece_len", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"{name}={value!r} must be a whole number >= {least}")
        if self.device == "cuda" and not torch.cuda.is_available():
            problems.append("device='cuda' finds no CUDA device; use 'auto' or 'cpu'")
        if problems:
            raise ValueError("; ".join(problems))


def evaluate_run(source: str | Path, options: EvaluationOptions) -> dict[str, Any]:
    """Return the quality of a trained model on a split of its text.

    Args:
        source: A run folder, a model folder, or the name of a repository on the hub.
        options: What is evaluated, and how.

    Returns:
        What `evaluate` measured, `quality_metrics`, `num_params`, and what was used: the solver with its fields (None
        for an explicit network), lengths, batch size, device, seconds.

    Raises:
        FileNotFoundError: There is no model.
        ValueError: A file is damaged, the text is not at hand or has changed, or an option does not fit the model.
        FloatingPointError: The loss is not finite.
        ConvergenceError: An equilibrium is not finite.
    """
    trained = open_model(source, memory_len=options.memory_len)
    config = _with_options(trained.config, options, source)
    corpus, length, train = trained.load_corpus(), config.eval_segment_len, config.train
    batches = corpus.stream(options.split, batch_size=train.eval_batch_size, segment_len=length)
    if options.memory_len is not None and not batches.continuous:
        raise ValueError(
            f"memory_len={options.memory_len!r} changes nothing for {source}: it reads sequences that have nothing "
            "before them; leave it out"
        )
    available = "cuda" if torch.cuda.is_available() else "cpu"
    model = trained.model.to(available if options.device == "auto" else options.device)
    start = time.perf_counter()
    values = evaluate(model, batches, how=config.evaluation_how())
    seconds = time.perf_counter() - start
    layer, solver = config.model.layer, config.equilibrium.eval_solver
    memory_len = None
    if isinstance(layer, TransformerConfig) and batches.continuous:
        memory_len = layer.memory_len if layer.eval_memory_len is None else layer.eval_memory_len
    return {
        "split": options.split,
        **quality_metrics(corpus.unit, values["nll"], bytes_per_token=corpus.bytes_per_token(options.split)),
        **values,
        "num_params": model.num_params,
        "solver": None if solver is None else {"name": type(solver).__name__, **asdict(solver)},
        "piece_len": config.equilibrium.piece_len,
        "memory_len": memory_len,
        "segment_len": length,
        "batch_size": train.eval_batch_size,
        "device": str(model.device),
        "seconds": round(seconds, 3),
    }


def _with_options(config: RunConfig, options: EvaluationOptions, source: str | Path) -> RunConfig:
    names = ("solver", "rtol", "atol", "max_steps", "piece_len")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if config.model.depth and given:
        raise ValueError(
            f"{', '.join(given)} cannot be chosen: {source} is an explicit network of depth {config.model.depth}, "
            "which looks for no equilibrium; leave them out"
        )
    if given:
        solver = given.pop("solver", config.equilibrium.eval_solver)
        piece_len = given.pop("piece_len", config.equilibrium.piece_len) or None
        # The Jacobian penalty belongs to training, and excludes pieces.
        unused: dict[str, Any] = {"jacobian_weight": 0.0, "jacobian_schedule": None}
        equilibrium = replace(config.equilibrium, eval_solver=replace(solver, **given), piece_len=piece_len, **unused)
        config = replace(config, equilibrium=equilibrium)
    train = config.train
    batch_size = train.eval_batch_size if options.batch_size is None else options.batch_size
    length = config.eval_segment_len if options.segment_len is None else options.segment_len
    return replace(config, train=replace(train, eval_batch_size=batch_size, eval_segment_len=length))
