"""What decoding with a Transformer keeps of the positions before the next one.

Letters: B batch, T segment, M memory, C capacity of a table, H heads, K head channels, D model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class PositionKeys(NamedTuple):
    """Keys of the relative distances `C - 1 ... 0`, and what else of them a single query needs."""

    key: Tensor  # (H, C, K)
    bias: Tensor  # (H, 1, C) logits that depend on the distance alone
    own: Tensor  # (3 H K) added to query, key and value of the query's own position

    @property
    def capacity(self) -> int:
        """Number of distances."""
        return self.key.shape[1]


class KeyValues(NamedTuple):
    """Keys and values of the positions before the segment, each computed once, with inputs and equilibria.

    The equilibrium at a position does not depend on later ones, so that nothing of it ever changes. A new position
    copies the tensors of the earlier ones, which costs less than one evaluation of attention over them.
    """

    key: Tensor  # (B, H, M, K)
    value: Tensor  # (B, H, M, K)
    x: Tensor  # (B, M, D)
    z: Tensor  # (B, M, D)
    positions: PositionKeys
    empty: Tensor | None  # (B,) slots on the left that hold no position; None where all hold one
    limit: int  # most positions that are kept

    @property
    def length(self) -> int:
        """Slots, the empty ones included."""
        return self.key.shape[2]

    def nearest(self, x: Tensor) -> Tensor | None:
        """The equilibrium `(B, 1, D)` of the earlier position most like the next one, whose inputs are `(B, 1, D)`.

        Alike are the inputs and the equilibria before them, by their inner products. None without earlier positions.
        """
        if self.length < 2:
            return self.z if self.length else None
        likeness = x @ self.x[:, 1:].mT + self.z[:, -1:] @ self.z[:, :-1].mT  # (B, 1, M - 1)
        hidden = self.mask(num_queries=0)
        if hidden is not None:
            likeness = likeness + hidden[:, 0, :, 1:]
        return self.z[:, 1:].take_along_dim(likeness.argmax(dim=2).unsqueeze(2), dim=1)

    def mask(self, *, num_queries: int) -> Tensor | None:
        """Additive mask `(B, 1, 1, M + T)` for a segment: `-inf` at empty slots; None where there are none."""
        if self.empty is None:
            return None
        slots = torch.arange(self.length + num_queries, device=self.key.device)
        hidden = slots < self.empty.unsqueeze(1)  # (B, M + T)
        return torch.zeros_like(hidden, dtype=self.key.dtype).masked_fill(hidden, -torch.inf)[:, None, None]

    def extended(
        self, key: Tensor, value: Tensor, x: Tensor, z: Tensor, *, length: int | None, positions: PositionKeys
    ) -> "KeyValues":
        """The last `length` positions (None: all) of these and a segment."""
        dropped = 0 if length is None else max(0, self.length + x.shape[1] - length)

        def joined(earlier: Tensor, new: Tensor) -> Tensor:
            both = torch.cat([earlier, new], dim=-2)
            return both[..., dropped:, :] if dropped else both

        return KeyValues(
            joined(self.key, key),
            joined(self.value, value),
            joined(self.x, x),
            joined(self.z, z),
            positions,
            None if self.empty is None else (self.empty - dropped).clamp(min=0),
            self.limit,
        )


def join_key_values(memories: Sequence[KeyValues]) -> KeyValues:
    """One memory for the samples of several, with empty slots on the left of the shorter ones."""
    slots = max(memory.length for memory in memories)
    missing = [slots - memory.length for memory in memories]

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(part, (0, 0, count, 0)) for part, count in zip(parts, missing, strict=True)])

    empty = None
    if any(missing) or any(memory.empty is not None for memory in memories):
        counts = [
            count + (memory.x.new_zeros(len(memory.x), dtype=torch.int64) if memory.empty is None else memory.empty)
            for memory, count in zip(memories, missing, strict=True)
        ]
        empty = torch.cat(counts)  # (B,)
    return KeyValues(
        joined([memory.key for memory in memories]),
        joined([memory.value for memory in memories]),
        joined([memory.x for memory in memories]),
        joined([memory.z for memory in memories]),
        max((memory.positions for memory in memories), key=lambda positions: positions.capacity),
        empty,
        max(memory.limit for memory in memories),
    )
