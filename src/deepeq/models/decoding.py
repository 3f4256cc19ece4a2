"""The key-value cache: what decoding with a Transformer keeps of earlier positions.

Letters: B batch, T segment, M memory, C capacity of a table, H heads, K head channels, D model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from deepeq.nn import single_query_attention


class PositionKeys(NamedTuple):
    """Keys of the relative distances `C - 1 ... 0`, and the terms of a single query's logits that depend on them."""

    key: Tensor  # (H, C, K)
    bias: Tensor  # (H, 1, C) logits that depend on the distance alone
    own: Tensor  # (3 H K) added to query, key and value of the query's own position

    @classmethod
    def of(cls, key: Tensor, content_bias: Tensor, position_bias: Tensor) -> "PositionKeys":
        """Return the table of a layer of relative attention.

        Args:
            key: Keys of the positions, `(H, C, K)`.
            content_bias: Bias of the query towards contents, `(H, 1, K)`.
            position_bias: Bias of the query towards positions, `(H, 1, K)`.
        """
        key = key.contiguous()
        bias = ((position_bias - content_bias) * key).sum(dim=2) * key.shape[2] ** -0.5
        own = torch.stack([content_bias.squeeze(1), key[:, -1], torch.zeros_like(key[:, -1])])  # (3, H, K)
        return cls(key, bias.unsqueeze(1), own.flatten())

    @property
    def capacity(self) -> int:
        """Number of distances."""
        return self.key.shape[1]


class EarlierPositions(NamedTuple):
    """What a single query reads of the positions before it; keys hold their positions, and the query its bias."""

    key: Tensor  # (B H, M, K)
    value: Tensor  # (B H, M, K)
    bias: Tensor  # (B H, 1, M)
    own_bias: Tensor  # (B H, 1, 1)

    def attend(self, qkv: Tensor, num_heads: int) -> Tensor:
        """Return what the next position attends to, `(B, 1, H K)`, for its `qkv` `(B, 1, 3 H K)`."""
        qkv = qkv.view(len(qkv), 3, num_heads, 1, -1).transpose(0, 1).flatten(1, 2)  # (3, B H, 1, K)
        attended = single_query_attention(
            *qkv.unbind(0),
            earlier_key=self.key,
            earlier_value=self.value,
            earlier_bias=self.bias,
            bias=self.own_bias,
        )
        return attended.view(len(attended) // num_heads, 1, -1)

    def take(self, rows: Tensor, num_heads: int) -> "EarlierPositions":
        """Return those of some sequences of the batch."""
        return EarlierPositions(*(part.unflatten(0, (-1, num_heads))[rows].flatten(0, 1) for part in self))


class KeyValues(NamedTuple):
    """Keys and values of the positions before the segment, each computed once, with their inputs and equilibria.

    The equilibrium at a position does not depend on later positions, so an entry never changes. Appending a position
    copies the tensors of the earlier ones, which costs less than one evaluation of attention over them.
    """

    key: Tensor  # (B, H, M, K)
    value: Tensor  # (B, H, M, K)
    x: Tensor  # (B, M, D)
    z: Tensor  # (B, M, D)
    positions: PositionKeys
    empty: Tensor | None  # (B,) number of slots on the left that hold no position; None where all slots hold one
    limit: int  # largest number of positions that are kept

    @property
    def length(self) -> int:
        """Number of slots, the empty ones included."""
        return self.key.shape[2]

    def nearest(self, x: Tensor) -> Tensor | None:
        """Return the equilibrium `(B, 1, D)` of the earlier position most similar to the next one.

        The similarity is the inner product of the inputs plus that of the preceding equilibria.

        Args:
            x: Inputs of the next position, `(B, 1, D)`.

        Returns:
            None where there are no earlier positions.
        """
        if self.length < 2:
            return self.z if self.length else None
        similarity = x @ self.x[:, 1:].mT + self.z[:, -1:] @ self.z[:, :-1].mT  # (B, 1, M - 1)
        hidden = self.mask(num_queries=0)
        if hidden is not None:
            similarity = similarity + hidden[:, 0, :, 1:]
        return self.z[:, 1:].take_along_dim(similarity.argmax(dim=2).unsqueeze(2), dim=1)

    def mask(self, *, num_queries: int) -> Tensor | None:
        """Return the additive mask `(B, 1, 1, M + T)` for a segment, `-inf` at empty slots; None if none are empty."""
        if self.empty is None:
            return None
        slots = torch.arange(self.length + num_queries, device=self.key.device)
        hidden = slots < self.empty.unsqueeze(1)  # (B, M + T)
        return torch.zeros_like(hidden, dtype=self.key.dtype).masked_fill(hidden, -torch.inf)[:, None, None]

    def for_one_query(self) -> EarlierPositions:
        """Return what the query of the next position reads."""
        num_keys, hidden = self.length + 1, self.mask(num_queries=1)
        bias = self.positions.bias[:, :, -num_keys:]  # (H, 1, S)
        bias = (bias if hidden is None else bias + hidden).expand(len(self.x), -1, -1, -1).flatten(0, 1)  # (B H, 1, S)
        earlier_bias, own_bias = bias.split([self.length, 1], dim=2)
        return EarlierPositions(
            (self.key + self.positions.key[:, -num_keys:-1]).flatten(0, 1),
            self.value.flatten(0, 1),
            earlier_bias,
            own_bias,
        )

    def extended(
        self, key: Tensor, value: Tensor, x: Tensor, z: Tensor, *, length: int | None, positions: PositionKeys
    ) -> "KeyValues":
        """Return these positions followed by a segment's.

        Args:
            key: Keys of the segment, `(B, H, T, K)`.
            value: Values of the segment, `(B, H, T, K)`.
            x: Inputs of the segment, `(B, T, D)`.
            z: Equilibria of the segment, `(B, T, D)`.
            length: Number of last positions to keep; None for all.
            positions: The table of distances, at least one larger than what is kept.
        """
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
    """Return one memory for the sequences of several, with empty slots on the left of the shorter ones."""
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
