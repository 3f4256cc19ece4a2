"""The Transformer block of the paper, as a cell, with the memory and the positions of Transformer-XL.

Letters: B batch, T segment, M memory, S = M + T keys, D model, H heads, K head channels, F feed-forward.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deepeq.models.cell import CellConfig, SequenceCell, check_ranges
from deepeq.models.decoding import EarlierPositions, KeyValues, PositionKeys
from deepeq.nn import (
    VariationalDropout,
    causal_mask,
    regularize_weight,
    relative_attention,
    sinusoidal_positions,
    variational_mask,
)


class Memory(NamedTuple):
    """Positions before the segment: their inputs and their equilibria."""

    x: Tensor  # (B, M, D); (B, M, 0) where a cell has no injection
    z: Tensor  # (B, M, D)


class Weights(NamedTuple):
    """The matrices of one solve, normalized where the configuration says so."""

    qkv: Tensor  # (3 H K, D)
    output: Tensor  # (D, H K)
    inner: Tensor  # (F, D)
    outer: Tensor  # (D, F)


class Masks(NamedTuple):
    """Dropout masks of one solve; None for no dropout."""

    attended: Tensor | None  # (B, 1, D)
    inner: Tensor | None  # (B, 1, F)
    outer: Tensor | None  # (B, 1, D)
    value: Tensor | None  # (B, H, T, 1)


class TransformerInjection(NamedTuple):
    """Everything that one solve needs besides `z`."""

    qkv: Tensor | None  # (B, T, 3 H K) injected into queries, keys and values
    memory_key: Tensor  # (B, H, M, K)
    memory_value: Tensor  # (B, H, M, K)
    position: Tensor  # (H, S, K) keys of the relative distances
    mask: Tensor  # (T, S), or (B, 1, T, S)
    weights: Weights
    dropped: Masks


class StepInjection(NamedTuple):
    """Everything that the solve for one position after `KeyValues` needs besides `z`."""

    qkv: Tensor  # (B, 1, 3 H K)
    earlier: EarlierPositions
    weights: Weights
    dropped: Masks = Masks(None, None, None, None)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(CellConfig):
    """Hyper-parameters of a `TransformerCell`.

    Raises:
        ValueError: A field is out of range, or `d_model` is odd or not a multiple of `num_heads`.
    """

    d_model: int = 128
    """Channels of the state."""
    num_heads: int = 4
    """Attention heads."""
    head_dim: int | None = None
    """Channels of one head; None for `d_model / num_heads`."""
    d_inner: int = 512
    """Channels inside the position-wise feed-forward network."""
    memory_len: int = 64
    """Number of positions before the segment that attention sees in training; 0 for none."""
    eval_memory_len: int | None = None
    """Number of positions before the segment that attention sees in evaluation; None for `memory_len`."""
    window: int | None = None
    """Number of positions that attention sees, the query's own included; None for all."""
    norm: Literal["post", "pre"] = "post"
    """Place of the layer normalization: `post` is after each residual sum, as in the paper. `pre` is at the start of
    each residual branch; the result is then normalized too, so that an equilibrium exists."""
    weight_norm: bool = False
    """Whether the rows of the four matrices that act on the state are normalized, once per solve."""
    hidden_dropout: float = 0.0
    """Fraction of the channels that is dropped after attention, and inside and after the feed-forward network."""
    attention_dropout: float = 0.0
    """Fraction of the keys that each head ignores, the same keys for all queries."""
    init_std: float = 0.05
    """Standard deviation of the initial weights; 0.05 in the paper, section 5."""

    def __post_init__(self) -> None:
        least = {"d_model": 2, "memory_len": 0, "eval_memory_len": 0}
        least |= dict.fromkeys(("num_heads", "head_dim", "d_inner", "window"), 1)
        problems = check_ranges(self, least, ("hidden_dropout", "attention_dropout"), positive=("init_std",))
        if not problems and self.d_model % 2:
            problems.append(f"d_model={self.d_model!r} must be even: half of the position encoding is sines")
        if not problems and self.head_dim is None and self.d_model % self.num_heads:
            problems.append(
                f"d_model={self.d_model!r} must be a multiple of num_heads={self.num_heads!r}, or head_dim be given"
            )
        if self.norm not in ("post", "pre"):
            problems.append(f"norm={self.norm!r} must be 'post' or 'pre'")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def widths(self) -> tuple[int, int]:
        return self.d_model, self.d_model

    @property
    def d_heads(self) -> int:
        """Number of channels of all heads together."""
        return self.num_heads * (self.head_dim or self.d_model // self.num_heads)

    def build(self) -> "TransformerCell":
        """Return a cell of these sizes with random weights."""
        return TransformerCell(self)


class TransformerCell(SequenceCell):
    """Transformer block with input injection (Bai et al. 2019, section 4).

    Attention reads the memory `[x, z*]` of earlier positions and the segment itself, with relative positions. With
    `LN_post` the identity for `norm="pre"`, and `LN_pre` the identity for `norm="post"`:

        h = LN_post(z + W_o Attention(W_qkv LN_pre(z) + W_x x))
        f(z; x) = LN(h + W_2 relu(W_1 LN_pre(h)))

    Both kinds have the last normalization. Without it, the map for `norm="pre"` would be `z` plus something bounded:
    its relative residual falls to zero while `z` runs away.

    Args:
        config: Its hyper-parameters.
        injected: Whether the input is injected. Without injection only the shape of `x` is used, and the cell is a
            layer of Transformer-XL, whose result is not normalized with `norm="pre"`.
    """

    def __init__(self, config: TransformerConfig, *, injected: bool = True) -> None:
        super().__init__()
        self.config = config
        d_model, d_heads = config.d_model, config.d_heads
        self.qkv = nn.Linear(d_model, 3 * d_heads, bias=False)
        self.injection = nn.Linear(d_model, 3 * d_heads, bias=False) if injected else None
        self.position = nn.Linear(d_model, d_heads, bias=False)
        self.output_projection = nn.Linear(d_heads, d_model, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(config.num_heads, 1, d_heads // config.num_heads))
        self.position_bias = nn.Parameter(torch.zeros(config.num_heads, 1, d_heads // config.num_heads))
        self.attention_norm = nn.LayerNorm(d_model)
        self.inner = nn.Linear(d_model, config.d_inner)
        self.outer = nn.Linear(config.d_inner, d_model)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.output_norm = nn.LayerNorm(d_model) if config.norm == "pre" and injected else None
        self.hidden_dropout = VariationalDropout(config.hidden_dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in (self.qkv, self.output_projection, self.inner, self.outer):
            regularize_weight(module, weight_norm=config.weight_norm, dropout=0.0)

    def memory_length(self) -> int | None:
        """Return `memory_len` in training, and `eval_memory_len` in evaluation if it is set."""
        in_training = self.training or self.config.eval_memory_len is None
        return self.config.memory_len if in_training else self.config.eval_memory_len

    def start_memory(self, batch_size: int, *, length: int | None = None) -> KeyValues | None:
        """Return keys and values of no position yet; None for a cell without injection, or if none shall be kept."""
        limit = self._visible(self.memory_length() if length is None else length)
        if self.injection is None or not limit:
            return None
        none = self.injection.weight.new_empty(batch_size, 0, self.config.d_model)
        key, value = self._keys_and_values(none, none, self.qkv.weight)
        return KeyValues(key, value, none, none, self._position_table(1, like=none), empty=None, limit=limit)

    def guess(self, x: Tensor, memory: Memory | KeyValues | None) -> Tensor | None:
        """Return, for one position after `KeyValues`, the equilibrium of the earlier position most similar to it."""
        return memory.nearest(x) if isinstance(memory, KeyValues) and x.shape[1] == 1 else None

    def shared_weights(self) -> Weights:
        """Return the matrices that act on the state."""
        return Weights(self.qkv.weight, self.output_projection.weight, self.inner.weight, self.outer.weight)

    def inject(
        self, x: Tensor, memory: Memory | KeyValues | None = None, weights: Weights | None = None
    ) -> TransformerInjection | StepInjection:
        """Return what attention needs besides `z`.

        Args:
            x: Inputs, `(B, T, D)`.
            memory: Earlier positions, any number of them.
            weights: Weights from `shared_weights`, if several solves share them.
        """
        num_queries, empty = x.shape[1], None
        weights = weights or self.shared_weights()
        if not isinstance(memory, KeyValues):
            memory = memory or Memory(x[:, :0], x[:, :0])
            memory_key, memory_value = self._keys_and_values(memory.x, memory.z, weights.qkv)
        elif num_queries == 1 and not self.training:
            assert self.injection is not None
            return StepInjection(self.injection(x) + memory.positions.own, memory.for_one_query(), weights)
        else:
            memory_key, memory_value, empty = memory.key, memory.value, memory.mask(num_queries=num_queries)
        num_keys = memory_key.shape[2] + num_queries
        masks, value_mask = self._masks(x, num_keys)
        if value_mask is not None:
            memory_value = memory_value * value_mask[:, :, : memory_value.shape[2]]
        mask = causal_mask(num_queries, num_keys, window=self.config.window, like=x)
        return TransformerInjection(
            None if self.injection is None else self.injection(x),
            memory_key,
            memory_value,
            self._position_keys(num_keys, like=x),
            mask if empty is None else mask + empty,  # (B, 1, T, S)
            weights,
            masks,
        )

    def forward(self, z: Tensor, injection: TransformerInjection | StepInjection) -> Tensor:
        """Return the next state, `(B, T, D)`."""
        weights, masks = injection.weights, injection.dropped
        attended = linear(self._attend(z, injection), weights.output)
        h = self._post(self.attention_norm, z + _drop(attended, masks.attended))  # (B, T, D)
        inner = linear(self._pre(self.feed_forward_norm, h), weights.inner, self.inner.bias).relu()
        outer = linear(_drop(inner, masks.inner), weights.outer, self.outer.bias)
        h = self._post(self.feed_forward_norm, h + _drop(outer, masks.outer))
        return h if self.output_norm is None else self.output_norm(h)

    def take(
        self, injection: TransformerInjection | StepInjection, rows: Tensor
    ) -> TransformerInjection | StepInjection:
        """Return the injection of some sequences of the batch."""
        if isinstance(injection, StepInjection):
            earlier = injection.earlier.take(rows, self.config.num_heads)
            return injection._replace(qkv=injection.qkv[rows], earlier=earlier)
        return injection._replace(
            qkv=None if injection.qkv is None else injection.qkv[rows],
            memory_key=injection.memory_key[rows],
            memory_value=injection.memory_value[rows],
            mask=injection.mask[rows] if injection.mask.ndim == 4 else injection.mask,
            dropped=Masks(*(None if mask is None else mask[rows] for mask in injection.dropped)),
        )

    def extend_memory(
        self, memory: Memory | KeyValues | None, x: Tensor, z: Tensor, *, length: int | None = None
    ) -> Memory | KeyValues | None:
        """Return the last positions of the memory and this segment; None where attention sees no earlier position.

        Args:
            memory: The memory of this segment. `KeyValues` stay `KeyValues`, and keep the number of positions that they
                were started for.
            x: Inputs of this segment, `(B, T, D)`.
            z: Equilibria of this segment, `(B, T, D)`.
            length: Number of positions to keep; None for all that `window` sees.
        """
        if isinstance(memory, KeyValues):
            length = self._visible(None if length is None else memory.limit)
            key, value = self._keys_and_values(x, z, self.qkv.weight)
            positions, num_keys = memory.positions, memory.length + x.shape[1] + 1  # with the next position
            if positions.capacity < num_keys:
                positions = self._position_table(max(num_keys, 2 * positions.capacity), like=x)
            return memory.extended(key, value, x, z, length=length, positions=positions)
        length = self._visible(length)
        if length == 0:
            return None
        if self.injection is None:
            x = x[..., :0]
        if memory is not None:
            x, z = torch.cat([memory.x, x], dim=1), torch.cat([memory.z, z], dim=1)
        last = slice(None if length is None else -length, None)
        return Memory(x[:, last], z[:, last])

    def _visible(self, length: int | None) -> int | None:
        """Return the smaller of a number of earlier positions and what `window` sees of them; None for all."""
        seen = None if self.config.window is None else self.config.window - 1
        return min((count for count in (length, seen) if count is not None), default=None)

    def _keys_and_values(self, x: Tensor, z: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of positions with inputs `x` and states `z`, `(B, H, M, K)` each."""
        rows = slice(self.config.d_heads, None)  # queries are not needed
        both = linear(self._pre(self.attention_norm, z), qkv[rows])
        if self.injection is not None:
            both = both + linear(x, self.injection.weight[rows])
        key, value = (self._split_heads(part) for part in both.chunk(2, dim=-1))
        return key, value

    def _position_keys(self, num_positions: int, *, like: Tensor) -> Tensor:
        """Return the keys of the distances `num_positions - 1 ... 0`, `(H, S, K)`."""
        keys = self.position(sinusoidal_positions(num_positions, self.config.d_model, like=like))
        return keys.unflatten(-1, (self.config.num_heads, -1)).transpose(0, 1)  # (H, S, K)

    def _position_table(self, capacity: int, *, like: Tensor) -> PositionKeys:
        return PositionKeys.of(self._position_keys(capacity, like=like), self.content_bias, self.position_bias)

    def _attend(self, z: Tensor, injection: TransformerInjection | StepInjection) -> Tensor:
        qkv = linear(self._pre(self.attention_norm, z), injection.weights.qkv)
        if injection.qkv is not None:
            qkv = qkv + injection.qkv
        if isinstance(injection, StepInjection):
            return injection.earlier.attend(qkv, self.config.num_heads)
        query, key, value = (self._split_heads(part) for part in qkv.chunk(3, dim=-1))
        attended = relative_attention(
            query,
            torch.cat([injection.memory_key, key], dim=2),  # (B, H, S, K)
            torch.cat([injection.memory_value, _drop(value, injection.dropped.value)], dim=2),  # (B, H, S, K)
            position=injection.position,
            content_bias=self.content_bias,
            position_bias=self.position_bias,
            mask=injection.mask,
        )
        return attended.transpose(1, 2).flatten(2)  # (B, T, H K)

    def _masks(self, x: Tensor, num_keys: int) -> tuple[Masks, Tensor | None]:
        value = None
        if self.training and self.config.attention_dropout:
            shape = (x.shape[0], self.config.num_heads, num_keys, 1)
            value = variational_mask(shape, self.config.attention_dropout, like=x)
        inner = self.hidden_dropout.mask(x.new_empty(x.shape[0], 1, self.config.d_inner))
        masks = Masks(
            self.hidden_dropout.mask(x),
            inner,
            self.hidden_dropout.mask(x),
            None if value is None else value[:, :, num_keys - x.shape[1] :],
        )
        return masks, value

    def _pre(self, norm: nn.LayerNorm, h: Tensor) -> Tensor:
        return norm(h) if self.config.norm == "pre" else h

    def _post(self, norm: nn.LayerNorm, h: Tensor) -> Tensor:
        return norm(h) if self.config.norm == "post" else h

    def _split_heads(self, x: Tensor) -> Tensor:
        heads = self.config.num_heads
        return x.view(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)  # (B, H, T, K)


def _drop(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
