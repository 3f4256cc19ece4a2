"""What a configuration costs, counted without allocating the model."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from deepeq.data import known_vocab_size, load_corpus
from deepeq.models import LanguageModel, TiedNetwork
from deepeq.train.config import RunConfig

_FLOAT32 = 4  # bytes; solver algebra is never narrower


def describe_model(config: RunConfig, *, vocab_size: int | None = None) -> dict[str, Any]:
    """Sizes and costs of the model of a run, as plain numbers.

    One evaluation is one call of `f` for one sample: on `solve_len` positions, those of a segment or of the pieces it
    is solved in, after a full training memory. Of an explicit network it is the whole network on a segment, after the
    memory that it then has. `flops_per_evaluation` counts multiplications and additions of matrix products;
    `bytes_per_evaluation` is what operators read and write in float32 if nothing stays in a cache, with attention as
    its separate products and softmax, so more than a fused kernel moves. Histories are the vectors that a solver may
    keep for one sample.

    Args:
        config: The run.
        vocab_size: Number of tokens; None for that of the corpus, which is read if its size is not published.
    """
    if vocab_size is None:
        vocab_size = known_vocab_size(config.data) or load_corpus(config.data).vocab_size
    solve_len = min(config.train.segment_len, config.equilibrium.subsequence_len or config.train.segment_len)
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
    f, z0 = network.core.prepare(x, memory=memory)
    state_size = sum(leaf.numel() for leaf in pytree.tree_leaves(z0))
    result |= {"solve_len": solve_len, "state_size": state_size, "state_bytes": _FLOAT32 * state_size}
    result |= _costs(f, z0)
    for name in ("solver", "backward", "evaluation"):
        solver = getattr(config.equilibrium, name)
        result[f"{name}_history_bytes"] = _FLOAT32 * state_size * solver.num_stored
    return result


@torch.no_grad()
def _memory(model: LanguageModel, x: Tensor) -> Any:
    """What a network carries from earlier segments in training; the model is left in evaluation."""
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
