"""A model in numbers: what a configuration costs, counted without allocating it, and the card of a trained model."""

import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from deepeq import __version__
from deepeq.cell import prepare
from deepeq.data import corpus_title, known_vocab_size, load_corpus
from deepeq.files import write_atomically
from deepeq.models import LanguageModel, RecurrentConfig, TCNConfig, TiedNetwork, TransformerConfig, TrellisConfig
from deepeq.train.config import RunConfig
from deepeq.train.pretrained import CARD, TrainedModel

_FLOAT32 = 4  # bytes; solver algebra is never narrower
_NAMES = {TransformerConfig: "Transformer", TrellisConfig: "TrellisNet", TCNConfig: "TCN"}
_METRICS = {
    "bits_per_character": "bits per character",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "loss": "loss in nats per position",
}
_SOLVES = {
    "forward_steps": "steps per solve",
    "forward_residual": "worst residual",
    "forward_unconverged": "fraction unconverged",
}
_RESULT = {
    "num_steps": "optimizer steps",
    "train_seconds": "seconds",
    "peak_memory_mb": "peak memory in MiB",
    "num_threads": "threads",
    "seed": "seed",
    "device": "device",
    "torch_version": "torch",
}
_TEMPLATE = Path(__file__).with_name("card.md.jinja")


def describe_model(config: RunConfig, *, vocab_size: int | None = None) -> dict[str, Any]:
    """Return sizes and costs of the model of a run, as plain numbers.

    One evaluation is one call of `f` for one sequence: on `solve_len` positions, those of a segment or of a piece of
    it, after a full training memory. For an explicit network it is the whole network on a segment, after the memory
    that it then has. `flops_per_evaluation` counts multiplications and additions of matrix products.
    `bytes_per_evaluation` is what operators read and write in float32 if nothing stays in a cache. Attention counts as
    its separate products and softmax, so a fused kernel moves less. Histories are the vectors that a solver may keep
    for one sequence.

    Args:
        config: The run.
        vocab_size: Number of tokens; None for that of the corpus, which is read if its size is not published.
    """
    if vocab_size is None:
        vocab_size = known_vocab_size(config.data) or load_corpus(config.data).vocab_size
    solve_len = min(config.train.segment_len, config.equilibrium.piece_len or config.train.segment_len)
    with torch.device("meta"):
        model = LanguageModel(vocab_size, config.model)
        x = torch.empty(1, solve_len, config.model.widths[0])
    result: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_params": model.num_params,
        "num_params_embedding": model.num_params - model.num_params_non_embedding,
        "num_params_non_embedding": model.num_params_non_embedding,
        "segment_len": config.train.segment_len,
    }
    network, memory = model.network, _memory(model, x)
    if not isinstance(network, TiedNetwork) or config.model.depth:
        return result | {"depth": config.model.depth} | _costs(lambda x: network(x, memory), x)
    f, z0 = prepare(network.cell, x, memory=memory)
    state_size = sum(leaf.numel() for leaf in pytree.tree_leaves(z0))
    result |= {"solve_len": solve_len, "state_size": state_size, "state_bytes": _FLOAT32 * state_size}
    result |= _costs(f, z0)
    for name in ("solver", "backward_solver", "eval_solver"):
        solver = getattr(config.equilibrium, name)
        if solver is not None:  # an adjoint other than the exact one has no backward solve
            result[f"{name}_history_bytes"] = _FLOAT32 * state_size * solver.num_stored
    return result


def write_card(
    folder: Path,
    trained: TrainedModel,
    *,
    valid: dict[str, Any],
    test: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
) -> None:
    """Write the model card of a model folder, in Markdown with metadata for the hub.

    Args:
        folder: The model folder.
        trained: The model.
        valid: What `evaluate` measured on the validation text, and the quality there.
        test: The same on the test text; None if it was not evaluated yet.
        result: The result of the run; None if it has not ended.
    """
    config, test, result = trained.config, test or {}, result or {}
    columns = {name: label for name, label in _METRICS.items() if name in valid} | {"num_tokens": "tokens"}
    metric = next(iter(columns))
    unit = "byte-pair token" if trained.unit == "bpe" else trained.unit
    facts = {
        "parameters": trained.model.num_params,
        "of these, in the network": trained.model.num_params_non_embedding,
        "vocabulary": f"{trained.vocab_size:,} {unit}s",
        "layer": f"`{config.model.layer}`",
        "data": _dataset(trained)[1],
    }
    card = ModelCard.from_template(
        _card_data(trained, metric, test.get(metric)),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=_title(config),
        trained=trained,
        unit=unit,
        config=config,
        paper="[Bai, Kolter, Koltun, NeurIPS 2019](https://arxiv.org/abs/1909.01377)",
        version=__version__,
        columns=columns if config.model.depth else columns | _SOLVES,
        rows={"validation": valid, "test": test},
        baseline=result.get(f"baseline_{metric}"),
        guess="guessing without memory" if trained.unit == "symbol" else "a unigram model",
        facts=facts | {label: result.get(name) for name, label in _RESULT.items()},
        shown=_shown,
    )
    write_atomically(folder / CARD, str(card))


def _card_data(trained: TrainedModel, metric: str, value: float | None) -> ModelCardData:
    """Return what the hub reads of a card."""
    kind, name = _dataset(trained)
    evaluated = EvalResult(
        task_type="text-generation",
        dataset_type=kind,
        dataset_name=name,
        dataset_split="test",
        metric_type=metric,
        metric_name=_METRICS[metric],
        metric_value=value,
    )
    network = "explicit-network" if trained.config.model.depth else "deep-equilibrium-model"
    return ModelCardData(
        library_name="deepeq",
        pipeline_tag=None if trained.unit == "symbol" else "text-generation",
        tags=[network, "model_hub_mixin", "pytorch_model_hub_mixin"],  # the hub finds models of its mixin by two
        model_name=_title(trained.config),
        eval_results=None if value is None else [evaluated],
    )


def _dataset(trained: TrainedModel) -> tuple[str, str]:
    """Return the type and the name of the data; of a text that only its owner has, they tell nothing."""
    data = trained.data
    return ("own", "text of its owner") if data is None or data.is_private else (data.corpus, corpus_title(data))


def _title(config: RunConfig) -> str:
    layer, depth = config.model.layer, config.model.depth
    name = layer.kind.upper() if isinstance(layer, RecurrentConfig) else _NAMES.get(type(layer), type(layer).__name__)
    if depth == 0:
        return f"DEQ-{name} language model"
    tied = "tied " if config.model.tied else ""
    return f"{name} language model of {depth} {tied}layer{'s' * (depth > 1)}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else "not recorded"


@torch.no_grad()
def _memory(model: LanguageModel, x: Tensor) -> Any:
    """Return what a network carries from earlier segments in training; the model is left in evaluation mode."""
    layer = model.config.layer
    earlier = x.new_empty(1, max(x.shape[1], getattr(layer, "memory_len", 0)), x.shape[2])
    network = model.network.train()
    if isinstance(network, TiedNetwork):
        cell = network.cell
        memory = cell.extend_memory(None, earlier, cell.initial_state(earlier), length=cell.memory_length())
    else:
        memory = network(earlier).memory
    model.eval()
    return memory


@torch.no_grad()
def _costs(f: Any, z: Any) -> dict[str, int]:
    with FlopCounterMode(display=False) as flops, _TrafficCounter() as traffic:
        f(z)
    return {"flops_per_evaluation": flops.get_total_flops(), "bytes_per_evaluation": traffic.num_bytes}


class _TrafficCounter(TorchDispatchMode):
    """Counts the bytes of the arguments and results of every operator that computes something."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket is not torch.ops.aten._unsafe_view:
            for leaf in pytree.tree_leaves((args, kwargs, result)):
                if isinstance(leaf, Tensor):
                    self.num_bytes += leaf.element_size() * math.prod(leaf.shape)
        return result
