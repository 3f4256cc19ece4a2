"""The cores that one model wears in the phases of a run."""

from collections.abc import Callable
from typing import Any, NamedTuple

from deepeq.adjoint import ImplicitAdjoint
from deepeq.deq import DEQ, Unrolled
from deepeq.models import LanguageModel, TiedNetwork
from deepeq.solution import Solution
from deepeq.subsequences import Subsequences
from deepeq.train.config import EquilibriumConfig, RunConfig


class Cores(NamedTuple):
    """What a `TiedNetwork` applies its cell with, by phase."""

    warm_up: Unrolled
    train: DEQ
    evaluation: DEQ
    warm_up_steps: int  # optimizer steps of the first phase

    @classmethod
    def of(cls, model: LanguageModel, config: RunConfig, backward: Callable[[Solution], None]) -> "Cores | None":
        """The cores of a run, whose backward solves are reported to a callback; None for an explicit network."""
        network, equilibrium = model.network, config.equilibrium
        if config.model.depth:
            return None
        assert isinstance(network, TiedNetwork)
        assert equilibrium.backward is not None
        adjoint = ImplicitAdjoint(solver=equilibrium.backward, on_failure="ignore", callback=backward)
        return cls(
            Unrolled(network.cell, equilibrium.warm_up_depth),
            _in_pieces(_layer(network, solver=equilibrium.solver, adjoint=adjoint), equilibrium),
            evaluation_core(network, equilibrium),
            equilibrium.warm_up_steps(config.train.steps),
        )


def evaluation_core(network: TiedNetwork, config: EquilibriumConfig) -> DEQ:
    """The core of evaluation and generation."""
    return _in_pieces(_layer(network, solver=config.evaluation), config)


def _layer(network: TiedNetwork, **rules: Any) -> DEQ:
    """Return a layer whose failures are counted by the metrics, for samples that are known to be independent."""
    return DEQ(network.cell, on_failure="ignore", verify=False, **rules)


def _in_pieces(layer: DEQ, config: EquilibriumConfig) -> DEQ:
    return layer if config.subsequence_len is None else Subsequences(layer, config.subsequence_len)
