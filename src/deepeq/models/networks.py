"""The networks between embedding and softmax: one cell, solved in any way, or layers with weights of their own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from deepeq.cell import prepare
from deepeq.checks import check_count
from deepeq.deq import How, Pieces, Stack
from deepeq.models.cell import SequenceCell
from deepeq.models.decoding import KeyValues, join_key_values
from deepeq.models.transformer import TransformerCell, TransformerConfig
from deepeq.solution import Solution
from deepeq.stability import Generators, jacobian_penalty


class NetworkOutput(NamedTuple):
    """Features of a segment."""

    value: Tensor  # (B, T, d_output)
    memory: Any  # for the next segment; not detached
    solution: Solution | None = None
    intermediate: tuple[Tensor, ...] = ()  # (B, T, d_output) each
    jacobian_penalty: Tensor | None = None


class TiedNetwork(nn.Module):
    """One cell, solved as an equilibrium, as an equilibrium in pieces, or as a stack of tied layers.

    Args:
        cell: The cell.
        how: How its state is found where a call does not say otherwise.
    """

    def __init__(self, cell: SequenceCell, how: How) -> None:
        super().__init__()
        self.cell, self.how = cell, how

    def forward(
        self, x: Tensor, memory: Any = None, *, how: How | None = None, penalty_generator: Generators | None = None
    ) -> NetworkOutput:
        """Return features and the memory for the next segment.

        Args:
            x: Inputs, `(B, T, d_input)`.
            memory: The memory of the segment before, or None.
            how: How the state is found in this call; None for the network's own way.
            penalty_generator: Source of the random vectors of `jacobian_penalty`, which is computed if it is given.

        Raises:
            ValueError: The Jacobian penalty is asked for together with `Pieces`.
        """
        how, cell, penalty = how or self.how, self.cell, None
        # A guess moves an equilibrium's first state; the first state of a stack decides its result.
        z0 = None if isinstance(how, Stack) else cell.guess(x, memory)
        if penalty_generator is None:
            solution = how(cell, x, z0, memory)
        elif isinstance(how, Pieces):
            raise ValueError(
                "penalty_generator was given, but the Jacobian penalty is of one map, and Pieces solve several: leave "
                "one of them out"
            )
        else:
            f, z0 = prepare(cell, x, z0, memory)
            solution = how.solve(f, z0)
            penalty = jacobian_penalty(f, solution.value, generator=penalty_generator)
        memory = cell.extend_memory(memory, x, solution.value, length=cell.memory_length())
        return NetworkOutput(
            cell.output(solution.value), memory, solution, tuple(cell.output(z) for z in solution.kept), penalty
        )


def join_memories(memories: Sequence[Any]) -> Any:
    """Return the memory of several batches as one batch, with the sequences in their order.

    Only memories of `SequenceCell.start_memory` may differ in length; others give None then.
    """
    if isinstance(memories[0], KeyValues):
        return join_key_values(memories)
    shapes = {tuple(leaf.shape[1:] for leaf in pytree.tree_leaves(memory) if leaf is not None) for memory in memories}
    if memories[0] is None or len(shapes) > 1:
        return None
    return pytree.tree_map(lambda *parts: torch.cat(parts), *memories)


class LayerStack(nn.Module):
    """Transformer-XL: `depth` layers, each with its own weights and a memory of its inputs (Dai et al. 2019).

    Args:
        config: Hyper-parameters of each layer.
        depth: Number of layers.
        checkpoint: Keep only the inputs of the layers between forward and backward, and compute the layers twice.

    Raises:
        ValueError: `depth` is below 1.
    """

    def __init__(self, config: TransformerConfig, depth: int, *, checkpoint: bool = False) -> None:
        super().__init__()
        check_count("depth", depth, least=1, owner=self)
        self.checkpoint = checkpoint
        self.cells = nn.ModuleList(TransformerCell(config, injected=False) for _ in range(depth))
        self.norm = nn.LayerNorm(config.d_model) if config.norm == "pre" else nn.Identity()

    def forward(self, x: Tensor, memory: Any = None) -> NetworkOutput:
        """Return features `(B, T, d_model)` and the memory for the next segment."""
        memories = [None] * len(self.cells) if memory is None else memory
        z, extended = x, []
        for cell, earlier in zip(self.cells, memories, strict=True):
            assert isinstance(cell, TransformerCell)
            extended.append(cell.extend_memory(earlier, z, z, length=cell.memory_length()))
            if self.checkpoint and torch.is_grad_enabled():
                z = checkpoint(_layer, cell, z, earlier, use_reentrant=False)
            else:
                z = _layer(cell, z, earlier)
        return NetworkOutput(self.norm(z), None if extended[0] is None else tuple(extended))


def _layer(cell: TransformerCell, z: Tensor, memory: Any) -> Tensor:
    return cell(z, cell.inject(z, memory))
