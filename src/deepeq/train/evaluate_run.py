"""A run, or a pretrained model, evaluated otherwise than while it was trained."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from deepeq.data import Batches, Split, Vocabulary, load_corpus
from deepeq.models import LanguageModel, TransformerCell
from deepeq.solvers import Solver
from deepeq.train.evaluation import evaluate
from deepeq.train.hub import open_model
from deepeq.train.metrics import quality
from deepeq.train.pretrained import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is evaluated and how; None stands for what the run did.

    Raises:
        ValueError: a field is out of range.
    """

    split: Split = "test"
    """Text to evaluate on."""
    batch_size: int | None = None
    """Streams side by side; default `train.eval_batch_size`."""
    segment_len: int | None = None
    """Tokens of a stream in one call; default `train.eval_segment_len`."""
    memory_len: int | None = None
    """Earlier positions that attention sees beyond the segment, in tokens; 0 for none."""
    solver: Solver | None = None
    """Solver of the equilibria, with its own tolerances; default `equilibrium.evaluation`."""
    rtol: float | None = None
    """Relative tolerance in the place of the solver's."""
    atol: float | None = None
    """Absolute tolerance in the place of the solver's."""
    max_steps: int | None = None
    """Most steps of a solve in the place of the solver's."""
    subsequence_len: int | None = None
    """Most positions that are solved together; 0 for a whole segment."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a CUDA device if there is one."""

    def __post_init__(self) -> None:
        problems = []
        for name, least in (("batch_size", 1), ("segment_len", 1), ("memory_len", 0), ("subsequence_len", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"{name}={value!r} must be >= {least}")
        if self.device == "cuda" and not torch.cuda.is_available():
            problems.append("device='cuda' finds no CUDA device; use 'auto' or 'cpu'")
        if problems:
            raise ValueError("; ".join(problems))


def evaluate_run(path: Path, options: EvaluationOptions) -> dict[str, Any]:
    """Quality of the best checkpoint of a run, or of a pretrained model, on a split of its text.

    Returns:
        What `evaluate` measured, `quality`, `num_params`, and what was used: the solver with its fields (None for an
        explicit network), lengths, batch size, device, seconds.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: a file in it is damaged, its text is not at hand or has changed, or an option does not fit it.
        FloatingPointError: the loss is not finite.
        ConvergenceError: an equilibrium is not finite.
    """
    config, vocabulary, model = open_model(path)
    config = _with_options(config, options, path)
    batches = _batches(config, vocabulary, options.split, path)
    memory_len = _memory_len(model, options.memory_len, batches, path)
    config.prepare(model).to(_device(options.device))
    start = time.perf_counter()
    values = evaluate(model, batches)
    seconds = time.perf_counter() - start
    solver = config.evaluation
    return {
        "split": options.split,
        **quality(config.level, values["nll"]),
        **values,
        "num_params": model.num_params,
        "solver": None if solver is None else {"name": type(solver).__name__, **asdict(solver)},
        "subsequence_len": config.subsequence_len,
        "memory_len": memory_len,
        "segment_len": config.eval_segment_len,
        "batch_size": config.eval_batch_size,
        "device": str(model.device),
        "seconds": round(seconds, 3),
    }


def _with_options(config: PretrainedConfig, options: EvaluationOptions, path: Path) -> PretrainedConfig:
    given = {name: getattr(options, name) for name in ("solver", "rtol", "atol", "max_steps", "subsequence_len")}
    given = {name: value for name, value in given.items() if value is not None}
    if config.evaluation is None and given:
        raise ValueError(
            f"{', '.join(given)} cannot be chosen: {path} is an explicit network of depth {config.model.depth}, which "
            "looks for no equilibrium; leave them out"
        )
    solver = given.pop("solver", config.evaluation)
    pieces = given.pop("subsequence_len", config.subsequence_len)
    return replace(
        config,
        evaluation=None if solver is None else replace(solver, **given),
        subsequence_len=pieces or None,
        eval_batch_size=config.eval_batch_size if options.batch_size is None else options.batch_size,
        eval_segment_len=config.eval_segment_len if options.segment_len is None else options.segment_len,
    )


def _batches(config: PretrainedConfig, vocabulary: Vocabulary | None, split: Split, path: Path) -> Batches:
    if config.data is None:
        raise ValueError(f"{path} was trained on text that only its owner has; evaluate the run that it comes from")
    corpus = load_corpus(config.data)
    if corpus.vocabulary != vocabulary:
        raise ValueError(f"the text that {path} was trained on has changed; its vocabulary is another now")
    return corpus.stream(split, batch_size=config.eval_batch_size, segment_len=config.eval_segment_len)


def _memory_len(model: LanguageModel, wanted: int | None, batches: Batches, path: Path) -> int | None:
    """Give the Transformers of a model in evaluation mode a length of memory; return that which they have."""
    cells = [module for module in model.modules() if isinstance(module, TransformerCell)]
    if wanted is not None:
        if not cells:
            raise ValueError(f"memory_len={wanted!r} is of Transformers, and {path} has none; leave it out")
        if not batches.continuous:
            raise ValueError(
                f"memory_len={wanted!r} changes nothing for {path}: it reads sequences that have nothing before them; "
                "leave it out"
            )
        for cell in cells:
            cell.config = replace(cell.config, eval_memory_len=wanted)
    return cells[0].memory_length() if cells and batches.continuous else None


def _device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    available = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(available if name == "auto" else name)
