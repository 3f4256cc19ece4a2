"""A language model around one equilibrium."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear

from deepeq.deq import DEQ, Unrolled
from deepeq.models.transformer import Memory, TransformerCell, TransformerConfig
from deepeq.solution import Solution


class ModelOutput(NamedTuple):
    """Prediction for a segment."""

    logits: Tensor  # (B, T, V)
    memory: Memory | None  # for the next segment
    solution: Solution


class LanguageModel(nn.Module):
    """Embedding, equilibrium of a `TransformerCell`, and a softmax tied to the embedding.

    `core` is a `DEQ` or an `Unrolled` stack of the same cell, and may be replaced by the other at any time: the
    parameters are the cell's. The embedding starts from `N(0, init_std^2)` as the cell does.

    Args:
        vocab_size: Number of tokens.
        config: Sizes of the cell.
    """

    core: DEQ | Unrolled

    def __init__(self, vocab_size: int, config: TransformerConfig) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, config.d_model))
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.core = DEQ(TransformerCell(config))
        nn.init.normal_(self.embedding, std=config.init_std)

    @property
    def cell(self) -> TransformerCell:
        """The cell that `core` applies."""
        assert isinstance(self.core.cell, TransformerCell)
        return self.core.cell

    @property
    def num_params(self) -> int:
        """Parameters, each counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def embed(self, tokens: Tensor) -> Tensor:
        """Inputs of the cell, `(B, T, D)`, for tokens `(B, T)`."""
        return embedding(tokens, self.embedding) * self.embedding.shape[1] ** 0.5

    def forward(self, tokens: Tensor, memory: Memory | None = None) -> ModelOutput:
        x = self.embed(tokens)
        solution = self.core(x, memory=memory)
        logits = linear(solution.value, self.embedding, self.bias)
        return ModelOutput(logits, self.cell.extend_memory(memory, x, solution.value), solution)


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats a token, of logits `(B, T, V)` for targets `(B, T)`."""
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
