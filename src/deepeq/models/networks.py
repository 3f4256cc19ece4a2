"""The networks between embedding and softmax: one cell as an equilibrium or a tied stack, or layers of their own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from deepeq.deq import DEQ, Unrolled
from deepeq.models.cell import SequenceCell
from deepeq.models.key_values import KeyValues, join_key_values
from deepeq.models.transformer import TransformerCell, TransformerConfig
from deepeq.solution import Solution
from deepeq.stability import Generators, jacobian_penalty
from deepeq.subsequences import Subsequences


class NetworkOutput(NamedTuple):
    """Features of a segment."""

    value: Tensor  # (B, T, d_output)
    memory: Any  # for the next segment; gradients pass
    solution: Solution | None = None
    intermediate: tuple[Tensor, ...] = ()  # (B, T, d_output) each
    jacobian_penalty: Tensor | None = None


class TiedNetwork(nn.Module):
    """One cell, applied by its `core`: a `DEQ`, perhaps in `Subsequences`, or an `Unrolled` stack.

    The core may be replaced at any time by another around the same cell: the parameters are the cell's.
    """

    core: DEQ | Unrolled

    def __init__(self, cell: SequenceCell) -> None:
        super().__init__()
        # Samples are independent, and a solve that stops at its limit is counted by whoever trains.
        self.core = DEQ(cell, on_failure="ignore", verify=False)

    @property
    def cell(self) -> SequenceCell:
        """The cell that `core` applies."""
        assert isinstance(self.core.cell, SequenceCell)
        return self.core.cell

    def forward(self, x: Tensor, memory: Any = None, *, penalty_generator: Generators | None = None) -> NetworkOutput:
        """Features and memory for inputs `(B, T, d_input)`; with a generator, the Jacobian penalty at them too."""
        core, cell, penalty = self.core, self.cell, None
        # Where a stack starts decides what it returns.
        z0 = cell.guess(x, memory) if isinstance(core, DEQ) else None
        if isinstance(core, Subsequences):
            if penalty_generator is not None:
                raise ValueError("the Jacobian penalty is of one map, and Subsequences solve several: leave one out")
            solution = core(x, z0, memory)
        else:
            f, z0 = core.prepare(x, z0, memory)
            solution = core.solve(f, z0)
            if penalty_generator is not None:
                penalty = jacobian_penalty(f, solution.value, generator=penalty_generator)
        memory = cell.extend_memory(memory, x, solution.value, length=cell.memory_length())
        return NetworkOutput(
            cell.output(solution.value),
            memory,
            solution,
            tuple(cell.output(z) for z in solution.kept),
            penalty,
        )


def join_memories(memories: Sequence[Any]) -> Any:
    """The memory of several batches as one batch, of the samples in their order; None where their lengths differ.

    Those of `SequenceCell.start_memory` may differ in length.
    """
    if isinstance(memories[0], KeyValues):
        return join_key_values(memories)
    shapes = {tuple(leaf.shape[1:] for leaf in pytree.tree_leaves(memory) if leaf is not None) for memory in memories}
    if memories[0] is None or len(shapes) > 1:
        return None
    return pytree.tree_map(lambda *parts: torch.cat(parts), *memories)


class LayerStack(nn.Module):
    """Transformer-XL: `depth` layers with weights of their own, each with the memory of what it read (Dai et al. 2019).

    Args:
        config: Of each layer.
        depth: Number of layers.
        checkpoint: Keep only the inputs of the layers between forward and backward, and compute the layers twice.
    """

    def __init__(self, config: TransformerConfig, depth: int, *, checkpoint: bool = False) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth={depth!r} of LayerStack must be >= 1")
        self.checkpoint = checkpoint
        self.cells = nn.ModuleList(TransformerCell(config, injected=False) for _ in range(depth))
        self.norm = nn.LayerNorm(config.d_model) if config.norm == "pre" else nn.Identity()

    def forward(self, x: Tensor, memory: Any = None) -> NetworkOutput:
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
