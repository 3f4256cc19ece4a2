"""Quality of a model on a text, with the memory carried along."""

import math
from typing import Any

import torch

from deepeq.data import Batches
from deepeq.deq import Unrolled
from deepeq.models import LanguageModel, TiedNetwork
from deepeq.train.metrics import Averages


@torch.no_grad()
def evaluate(model: LanguageModel, batches: Batches) -> dict[str, Any]:
    """Mean `nll` in nats a token, `num_tokens`, and how equilibria were found, over one pass.

    The model is used as it is: with its own core, and in its own mode, so call `model.eval()` before.

    Raises:
        FloatingPointError: the loss is not finite.
        ConvergenceError: an equilibrium is not finite.
    """
    averages, memory = Averages(), None
    for tokens, targets in batches:
        tokens, targets = tokens.to(model.device), targets.to(model.device)
        output = model(tokens, memory, targets)
        memory = output.memory if batches.continuous else None
        averages.add("nll", output.nll.mean(), targets.numel())
        if solves(model):
            averages.add_solution("forward", output.solution)
    result = averages.compute()
    if not math.isfinite(result["nll"]):
        raise FloatingPointError(f"the loss of the model on this text is {result['nll']}; its parameters are damaged")
    return result | {"num_tokens": batches.num_tokens}


def solves(model: LanguageModel) -> bool:
    """Whether the model, as it is now, looks for equilibria."""
    return isinstance(model.network, TiedNetwork) and not isinstance(model.network.core, Unrolled)
