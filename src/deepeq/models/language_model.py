"""A language model: embedding, network, softmax."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deepeq.deq import Unrolled
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
        ValueError: a field is out of range, or two fields contradict each other.
    """

    # None stands for the default: with an object there, the parsing library would lend its options to another class.
    layer: LayerConfig | None = None
    """What is repeated or solved for: `TransformerConfig` (the default), `TrellisConfig`, `TCNConfig` or
    `RecurrentConfig` of `deepeq.models`."""
    depth: int = 0
    """Number of layers of an explicit network; 0 for the equilibrium of the layer."""
    tied: bool = True
    """Whether the layers of an explicit network share their weights and are injected the input."""
    checkpoint: bool = False
    """Whether an explicit network computes its layers twice instead of keeping what they computed."""
    auxiliary_every: int = 0
    """An explicit tied network also predicts from every so many layers, in training; 0 for none."""
    auxiliary_weight: float = 0.05
    """Weight of the mean loss of those predictions."""
    input_dropout: float = 0.0
    """Share of the channels of the embeddings that is dropped, the same ones at all positions."""
    output_dropout: float = 0.0
    """Share of the channels before the softmax that is dropped, the same ones at all positions."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    """Embedding and softmax."""

    def __post_init__(self) -> None:
        if self.layer is None:
            object.__setattr__(self, "layer", TransformerConfig())
        problems = check_ranges(
            self,
            {"depth": 0, "auxiliary_every": 0},
            ("input_dropout", "output_dropout"),
            positive=("auxiliary_weight",),
        )
        if self.auxiliary_every and self.auxiliary_every >= self.depth > 0:
            problems.append(f"auxiliary_every={self.auxiliary_every!r} must be < depth={self.depth!r}, or 0 for none")
        name = type(self.layer).__name__
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
        if problems:
            raise ValueError("; ".join(f"model.{problem}" for problem in problems))

    @property
    def widths(self) -> tuple[int, int]:
        """Channels that the network takes and gives."""
        assert self.layer is not None
        return self.layer.widths


class ModelOutput(NamedTuple):
    """Prediction for a segment."""

    memory: Any  # for the next segment, without gradients
    nll: Tensor | None  # (B, T) nats a token, if targets were given
    logits: Tensor | None  # (B, T, V) log-probabilities, if they were not
    solution: Solution | None  # of a tied network
    auxiliary_nll: Tensor | None  # () mean over the intermediate predictions
    jacobian_penalty: Tensor | None  # ()


class LanguageModel(nn.Module):
    """Embedding, a network, and a softmax that is tied to the embedding if the configuration says so.

    `network` is a `TiedNetwork` for equilibria and tied stacks.

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
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def num_params(self) -> int:
        """Parameters, each counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_params_non_embedding(self) -> int:
        """Parameters of the network alone, without embedding and softmax."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def forward(
        self,
        tokens: Tensor,
        memory: Any = None,
        targets: Tensor | None = None,
        *,
        penalty_generator: Generators | None = None,
    ) -> ModelOutput:
        """Predict the token after each of `tokens` `(B, T)`.

        Args:
            tokens: Token ids.
            memory: Of the segment before.
            targets: The tokens that follow, `(B, T)`; their losses are cheaper than the probabilities of all tokens.
            penalty_generator: Source of the random vectors of `jacobian_penalty`, which is computed if it is given.
        """
        output = self._run_network(tokens, memory, penalty_generator)
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
        """An empty memory for `predict`, with which one more position costs little more than attention to the others.

        None where the memory that the network returns does that already, or where it keeps none.

        Args:
            batch_size: Number of texts.
            length: Positions to keep; None for as many as in evaluation.
        """
        if not isinstance(self.network, TiedNetwork):
            return None
        return self.network.cell.start_memory(batch_size, length=length)

    def predict(self, tokens: Tensor, memory: Any = None) -> ModelOutput:
        """Predict the token after the last of `tokens` `(B, T)` alone: `logits` are `(B, 1, V)`."""
        output = self._run_network(tokens, memory)
        logits = self.softmax.log_probs(self.output_dropout(output.value[:, -1:]))
        return ModelOutput(_detached(output.memory), None, logits, output.solution, None, None)

    def _run_network(self, tokens: Tensor, memory: Any, penalty_generator: Generators | None = None) -> NetworkOutput:
        x = self.embedding(tokens)
        # Under autocast a projection gives sixteen bits, too few for states and memories.
        x = self.input_dropout(x.to(torch.promote_types(x.dtype, torch.float32)))
        if isinstance(self.network, TiedNetwork):
            return self.network(x, memory, penalty_generator=penalty_generator)
        return self.network(x, memory)


def _detached(memory: Any) -> Any:
    # Without gradients there is nothing to detach, and walking through a memory takes time in decoding.
    return pytree.tree_map_only(Tensor, Tensor.detach, memory) if torch.is_grad_enabled() else memory


def make_network(config: ModelConfig) -> TiedNetwork | LayerStack | TCN | Recurrent:
    """The network of a configuration; an equilibrium gets the default solver and adjoint."""
    layer = config.layer
    if isinstance(layer, TCNConfig):
        return TCN(layer, config.depth)
    if isinstance(layer, RecurrentConfig):
        return Recurrent(layer, config.depth)
    if not config.tied:
        assert isinstance(layer, TransformerConfig)
        return LayerStack(layer, config.depth, checkpoint=config.checkpoint)
    assert isinstance(layer, CellConfig)
    network = TiedNetwork(layer.build())
    if config.depth:
        network.core = Unrolled(
            network.cell, config.depth, checkpoint=config.checkpoint, keep_every=config.auxiliary_every
        )
    return network
