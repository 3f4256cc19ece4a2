"""Quality of a model on a text, with the memory carried along."""

import math
from typing import Any

import torch
from lightning.fabric import Fabric

from deepeq.data import Batches
from deepeq.deq import Unrolled
from deepeq.models import LanguageModel, TiedNetwork
from deepeq.stability import spectral_radius
from deepeq.subsequences import Subsequences
from deepeq.train.devices import gathered
from deepeq.train.metrics import Averages


@torch.no_grad()
def evaluate(model: LanguageModel, batches: Batches, *, fabric: Fabric | None = None) -> dict[str, Any]:
    """Mean `nll` in nats a token, `num_tokens`, and how equilibria were found, over one pass.

    The model is used as it is: with its own core, and in its own mode, so call `model.eval()` before. With a `fabric`,
    the batches are the share of this process, and the result is that of all.

    Raises:
        FloatingPointError: the loss is not finite.
        ConvergenceError: an equilibrium is not finite.
    """
    averages, memory = Averages(fabric), None
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
    return result | {"num_tokens": round(averages.weight("nll"))}


@torch.no_grad()
def measure_spectral_radius(model: LanguageModel, batches: Batches, *, num_rows: int = 4) -> float:
    """Mean spectral radius of `df/dz` at the equilibria of the first rows of the first segment, without a memory.

    The model wears its core of evaluation. Of an equilibrium found in pieces, the first piece is looked at. Of several
    processes, all call this, with the same batches.
    """
    network = model.network
    assert isinstance(network, TiedNetwork)
    tokens = batches.segment(0)[0][:num_rows].to(model.device)
    if isinstance(network.core, Subsequences):
        tokens = tokens[:, : network.core.length]
    with gathered(model):
        f, z0 = network.core.prepare(model.embedding(tokens))
        # Random numbers of its own, so that a look at the model changes nothing in the run.
        generator = torch.Generator(model.device).manual_seed(0)
        radius = spectral_radius(f, network.core.solve(f, z0).value, num_steps=30, generator=generator).mean()
    return float(radius)


def solves(model: LanguageModel) -> bool:
    """Whether the model, as it is now, looks for equilibria."""
    return isinstance(model.network, TiedNetwork) and not isinstance(model.network.core, Unrolled)
