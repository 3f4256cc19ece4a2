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

    One evaluation is one call of `f` on a segment of `train.segment_len` tokens of one sample, after a full training
    memory; of an explicit network it is the whole network. `flops_per_evaluation` counts multiplications and
    additions of matrix products; `bytes_per_evaluation` is what its operators read and write in float32 if nothing
    stays in a cache. Histories are the vectors that a solver may keep for one sample of a segment.

    Args:
        config: The run.
        vocab_size: Number of tokens; None for that of the corpus, which is read if its size is not published.
    """
    vocab_size = vocab_size or known_vocab_size(config.data) or load_corpus(config.data).vocab_size
    with torch.device("meta"):
        model = LanguageModel(vocab_size, config.model).eval()
        x = torch.empty(1, config.train.segment_len, config.model.widths[0])
    result: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_params": model.num_params,
        "num_params_embedding": model.num_params - model.num_params_non_embedding,
        "num_params_non_embedding": model.num_params_non_embedding,
        "segment_len": config.train.segment_len,
    }
    network = model.network
    if not isinstance(network, TiedNetwork) or config.model.depth:
        return result | {"depth": config.model.depth} | _costs(network, x)
    f, z0 = network.core.prepare(x, memory=_full_memory(network, x))
    state_size = sum(leaf.numel() for leaf in pytree.tree_leaves(z0))
    result |= {"state_size": state_size, "state_bytes": _FLOAT32 * state_size} | _costs(f, z0)
    for name in ("solver", "backward", "evaluation"):
        solver = getattr(config.equilibrium, name)
        result[f"{name}_history_bytes"] = _FLOAT32 * state_size * solver.num_stored
    return result


def _full_memory(network: TiedNetwork, x: Tensor) -> Any:
    cell = network.cell
    length = cell.train().memory_length()
    cell.eval()
    earlier = x.new_empty(1, max(x.shape[1], length or 0), x.shape[2])
    return cell.extend_memory(None, earlier, cell.initial_state(earlier), length=length)


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
        if not func.is_view:
            for leaf in pytree.tree_leaves((args, kwargs, result)):
                if isinstance(leaf, Tensor):
                    self.num_bytes += leaf.element_size() * math.prod(leaf.shape)
        return result
