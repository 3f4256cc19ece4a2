"""Quality of a model on a text, with the memory carried along."""

import math
from typing import Any

import torch

from deepeq.data import SegmentStream
from deepeq.models import LanguageModel, nll
from deepeq.train.metrics import Averages


@torch.no_grad()
def evaluate(model: LanguageModel, stream: SegmentStream) -> dict[str, Any]:
    """Mean `nll` in nats a token, `num_tokens`, and how the equilibria were found, over a whole stream.

    The model is used as it is: with its own `core` and memory length.

    Raises:
        FloatingPointError: the loss is not finite.
        ConvergenceError: an equilibrium is not finite.
    """
    averages, memory = Averages(), None
    for tokens, targets in stream:
        tokens, targets = tokens.to(model.embedding.device), targets.to(model.embedding.device)
        logits, memory, solution = model(tokens, memory)
        averages.add("nll", nll(logits, targets), targets.numel())
        averages.add_solution("forward", solution)
    result = averages.compute()
    if not math.isfinite(result["nll"]):
        raise FloatingPointError(f"the loss of the model on this text is {result['nll']}; its parameters are damaged")
    return result | {"num_tokens": stream.num_tokens}
