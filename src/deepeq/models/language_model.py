"""A language model: embedding, network, softmax."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deepeq.deq import Equilibrium, How, Stack
from deepeq.models.baselines import TCN, Recurrent, RecurrentConfig, TCNConfig
from deepeq.models.cell import CellConfig, LayerConfig, check_ranges
from deepeq.models.networks import LayerStack, NetworkOutput, TiedNetwork
from deepeq.models.transformer import TransformerConfig
from deepeq.nn import AdaptiveEmbedding, AdaptiveSoftmax, VariationalDropout, VocabularyConfig
from deepeq.solution import Solution
from deepeq.stability import Generators


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hyper-parameters of a `LanguageModel`.

    Raises:
        ValueError: A field is out of range, or two fields contradict each other.
    """

    # None, because jsonargparse carries a default's init_args to the class that a user chooses.
    layer: LayerConfig | None = None
    """The layer that is repeated or solved for: `TransformerConfig` (the default), `TrellisConfig`, `TCNConfig` or
    `RecurrentConfig` of `deepeq.models`."""
    depth: int = 0
    """Number of layers of an explicit network; 0 for the equilibrium of the layer."""
    tied: bool = True
    """Whether the layers of an explicit network share their weights and read the input."""
    checkpoint: bool = False
    """Whether an explicit network computes its layers twice instead of keeping their activations."""
    auxiliary_every: int = 0
    """In training, an explicit tied network also predicts from every `auxiliary_every`-th layer; 0 for none."""
    auxiliary_weight: float = 0.05
    """Weight of the mean loss of these predictions."""
    input_dropout: float = 0.0
    """Fraction of the channels of the embeddings that is dropped, the same channels at all positions."""
    output_dropout: float = 0.0
    """Fraction of the channels before the softmax that is dropped, the same channels at all positions."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    """Embedding and softmax."""

    def __post_init__(self) -> None:
        if self.layer is None:
            object.__setattr__(self, "layer", TransformerConfig())
        counts, fractions = {"depth": 0, "auxiliary_every": 0}, ("input_dropout", "output_dropout")
        problems = check_ranges(self, counts, fractions, positive=("auxiliary_weight",)) + self._contradictions()
        if problems:
            raise ValueError("; ".join(f"model.{problem}" for problem in problems))

    def _contradictions(self) -> list[str]:
        problems, name = [], type(self.layer).__name__
        if self.auxiliary_every and self.auxiliary_every >= self.depth > 0:
            problems.append(f"auxiliary_every={self.auxiliary_every!r} must be < depth={self.depth!r}, or 0 for none")
        if not isinstance(self.layer, CellConfig) and (self.depth == 0 or self.tied or self.checkpoint):
            problems.append(
                f"layer={name} is an explicit network: set depth >= 1, tied to False and checkpoint to False"
            )
        elif self.depth == 0 and not (self.tied and not self.checkpoint and not self.auxiliary_every):
            problems.append("depth=0 is an equilibrium: leave tied, checkpoint and auxiliary_every out, or set a depth")
        elif not self.tied and isinstance(self.layer, CellConfig) and not isinstance(self.layer, TransformerConfig):
            problems.append(f"tied=False needs layer=TransformerConfig, got {name}, whose layers are tied by design")
        if not self.tied and self.auxiliary_every:
            problems.append(f"auxiliary_every={self.auxiliary_every!r} needs tied=True")
        return problems

    @property
    def widths(self) -> tuple[int, int]:
        """Number of input channels and of output channels of the network."""
        assert self.layer is not None
        return self.layer.widths

    def how(self) -> How | None:
        """Return how a cell is solved where a call does not say otherwise; None for networks without a tied cell."""
        if self.depth == 0:
            # Sequences of a batch are independent, so no check is needed; training counts unconverged solves itself.
            return Equilibrium(on_failure="ignore", verify=False)
        if not self.tied:
            return None
        return Stack(depth=self.depth, checkpoint=self.checkpoint, keep_every=self.auxiliary_every)


class ModelOutput(NamedTuple):
    """Prediction for a segment."""

    memory: Any  # for the next segment, detached
    nll: Tensor | None  # (B, T) nats per token, if targets were given
    logits: Tensor | None  # (B, T, V) log-probabilities, if they were not
    solution: Solution | None  # of a tied network
    auxiliary_nll: Tensor | None  # () mean over the intermediate predictions
    jacobian_penalty: Tensor | None  # ()


class LanguageModel(nn.Module):
    """Embedding, a network, and a softmax, which is tied to the embedding if the configuration says so.

    `network` is a `TiedNetwork` for equilibria and tied stacks. How its cell is solved is an argument of each call.

    Args:
        vocab_size: Number of tokens.
        config: Its hyper-parameters.
    """

    def __init__(self, vocab_size: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d_input, d_output = config.widths
        self.embedding = AdaptiveEmbedding(vocab_size, d_input, config.vocabulary)
        self.input_dropout = VariationalDropout(config.input_dropout)
        self.network = make_network(config)
        self.output_dropout = VariationalDropout(config.output_dropout)
        self.softmax = AdaptiveSoftmax(vocab_size, d_output, config.vocabulary, self.embedding)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def num_params(self) -> int:
        """Number of parameters, each counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_params_non_embedding(self) -> int:
        """Number of parameters of the network alone, without embedding and softmax."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def forward(
        self,
        tokens: Tensor,
        memory: Any = None,
        targets: Tensor | None = None,
        *,
        how: How | None = None,
        penalty_generator: Generators | None = None,
    ) -> ModelOutput:
        """Predict the token after each token of a segment.

        Args:
            tokens: Token ids, `(B, T)`.
            memory: The memory of the segment before, or None.
            targets: The tokens that follow, `(B, T)`; their losses are cheaper than the probabilities of all tokens.
            how: How the cell is solved in this call; None for the model's own way.
            penalty_generator: Source of the random vectors of `jacobian_penalty`, which is computed if it is given.

        Raises:
            ValueError: A `how` or a `penalty_generator` is given to a network without a tied cell.
        """
        output = self._run_network(tokens, memory, how, penalty_generator)
        hidden, auxiliary = self.output_dropout(output.value), None
        if targets is not None and output.intermediate and self.training:
            losses = [self.softmax(self.output_dropout(value), targets).mean() for value in output.intermediate]
            auxiliary = torch.stack(losses).mean()
        return ModelOutput(
            _detached(output.memory),
            None if targets is None else self.softmax(hidden, targets),
            None if targets is not None else self.softmax.log_probs(hidden),
            output.solution,
            auxiliary,
            output.jacobian_penalty,
        )

    def start_memory(self, batch_size: int, *, length: int | None = None) -> Any:
        """Return an empty memory for `predict`, with which a new position costs little more than attention.

        It is None where the memory that the network returns does that already, or where the network has no memory.

        Args:
            batch_size: Number of texts.
            length: Number of positions to keep; None for as many as in evaluation.
        """
        if not isinstance(self.network, TiedNetwork):
            return None
        return self.network.cell.start_memory(batch_size, length=length)

    def predict(self, tokens: Tensor, memory: Any = None, *, how: How | None = None) -> ModelOutput:
        """Predict only the token after the last of `tokens` `(B, T)`; `logits` are `(B, 1, V)`.

        Args:
            tokens: Token ids, `(B, T)`.
            memory: The memory of the segment before, or None.
            how: How the cell is solved in this call; None for the model's own way.
        """
        output = self._run_network(tokens, memory, how)
        logits = self.softmax.log_probs(self.output_dropout(output.value[:, -1:]))
        return ModelOutput(_detached(output.memory), None, logits, output.solution, None, None)

    def _run_network(
        self, tokens: Tensor, memory: Any, how: How | None, penalty_generator: Generators | None = None
    ) -> NetworkOutput:
        x = self.embedding(tokens)
        # Under autocast a projection gives 16 bits, which are too few for states and memories.
        x = self.input_dropout(x.to(torch.promote_types(x.dtype, torch.float32)))
        if isinstance(self.network, TiedNetwork):
            return self.network(x, memory, how=how, penalty_generator=penalty_generator)
        for name, value in (("how", how), ("penalty_generator", penalty_generator)):
            if value is not None:
                raise ValueError(
                    f"{name} was given, but {type(self.network).__name__} has no tied cell to solve for; leave it out"
                )
        return self.network(x, memory)


def _detached(memory: Any) -> Any:
    # Without gradients there is nothing to detach, and walking through a memory takes time in decoding.
    return pytree.tree_map_only(Tensor, Tensor.detach, memory) if torch.is_grad_enabled() else memory


def make_network(config: ModelConfig) -> TiedNetwork | LayerStack | TCN | Recurrent:
    """Return the network of a configuration, with random weights."""
    layer = config.layer
    if isinstance(layer, TCNConfig):
        return TCN(layer, config.depth)
    if isinstance(layer, RecurrentConfig):
        return Recurrent(layer, config.depth)
    how = config.how()
    if how is None:
        assert isinstance(layer, TransformerConfig)
        return LayerStack(layer, config.depth, checkpoint=config.checkpoint)
    assert isinstance(layer, CellConfig)
    return TiedNetwork(layer.build(), how)
