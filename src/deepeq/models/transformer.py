"""The weight-tied Transformer block of the paper, as a cell.

Letters: B batch, T segment, M memory, S = M + T keys, D model, H heads, K head channels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deepeq.nn import causal_mask, relative_attention, sinusoidal_positions


class Memory(NamedTuple):
    """Positions before the segment: what was injected there, and the equilibria that were found."""

    x: Tensor  # (B, M, D)
    z: Tensor  # (B, M, D)


class TransformerInjection(NamedTuple):
    """All that one solve needs besides `z`."""

    qkv: Tensor  # (B, T, 3 D) injected into queries, keys and values
    memory_key: Tensor  # (B, H, M, K)
    memory_value: Tensor  # (B, H, M, K)
    position: Tensor  # (H, S, K) keys of the relative distances
    mask: Tensor  # (T, S)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a `TransformerCell`.

    Raises:
        ValueError: a size is out of range, or `d_model` is no even multiple of `num_heads`.
    """

    d_model: int = 128
    """Channels of the state."""
    num_heads: int = 4
    """Attention heads; they divide `d_model`."""
    d_inner: int = 512
    """Channels inside the position-wise feed-forward part."""
    memory_len: int = 64
    """Earlier positions that attention sees beyond the segment, in tokens; 0 for none."""
    init_std: float = 0.05
    """Standard deviation of the first weights; 0.05 in the paper, section 5."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)!r} must be >= {least}"
            for name, least in (("d_model", 2), ("num_heads", 1), ("d_inner", 1), ("memory_len", 0))
            if getattr(self, name) < least
        ]
        if not problems and (self.d_model % self.num_heads or self.d_model % 2):
            problems.append(f"d_model={self.d_model!r} must be even and a multiple of num_heads={self.num_heads!r}")
        if not self.init_std > 0.0:
            problems.append(f"init_std={self.init_std!r} must be > 0")
        if problems:
            raise ValueError("; ".join(problems))


class TransformerCell(nn.Module):
    """Post-layer-norm block with input injection (Bai et al. 2019, section 4).

    `f(z; x) = LN(h + FFN(h))` with `h = LN(z + W_o Attention(W_qkv z + W_x x))`, relative positions, and attention
    over the memory `[x, z*]` of earlier positions besides the segment itself. Causal. Keys and values of the memory,
    position keys and the injection are computed once per solve, by `inject`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        d_model, num_heads = config.d_model, config.num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.injection = nn.Linear(d_model, 3 * d_model, bias=False)
        self.position = nn.Linear(d_model, d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(num_heads, 1, d_model // num_heads))
        self.position_bias = nn.Parameter(torch.zeros(num_heads, 1, d_model // num_heads))
        self.attention_norm = nn.LayerNorm(d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, config.d_inner), nn.ReLU(), nn.Linear(config.d_inner, d_model)
        )
        self.feed_forward_norm = nn.LayerNorm(d_model)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def initial_state(self, x: Tensor) -> Tensor:
        """Zeros, `(B, T, D)`."""
        return torch.zeros_like(x)

    def inject(self, x: Tensor, memory: Memory | None = None) -> TransformerInjection:
        """What attention needs besides `z`, for inputs `x` `(B, T, D)` and a memory of any length."""
        num_queries, d_model = x.shape[1:]
        if memory is None:
            memory = Memory(x[:, :0], x[:, :0])
        num_keys = memory.z.shape[1] + num_queries
        # The query rows of both weights are not needed for the memory.
        rows = slice(d_model, None)
        earlier = linear(memory.z, self.qkv.weight[rows]) + linear(memory.x, self.injection.weight[rows])
        memory_key, memory_value = (self._split_heads(part) for part in earlier.chunk(2, dim=-1))
        position = self.position(sinusoidal_positions(num_keys, d_model, like=x))
        position = position.unflatten(-1, (self.config.num_heads, -1)).transpose(0, 1)  # (H, S, K)
        mask = causal_mask(num_queries, num_keys, like=x)
        return TransformerInjection(self.injection(x), memory_key, memory_value, position, mask)

    def forward(self, z: Tensor, injection: TransformerInjection) -> Tensor:
        query, key, value = (self._split_heads(part) for part in (self.qkv(z) + injection.qkv).chunk(3, dim=-1))
        attended = relative_attention(
            query,
            torch.cat([injection.memory_key, key], dim=2),  # (B, H, S, K)
            torch.cat([injection.memory_value, value], dim=2),  # (B, H, S, K)
            position=injection.position,
            content_bias=self.content_bias,
            position_bias=self.position_bias,
            mask=injection.mask,
        )
        h = self.attention_norm(z + self.output(attended.transpose(1, 2).flatten(2)))  # (B, T, D)
        return self.feed_forward_norm(h + self.feed_forward(h))

    def extend_memory(self, memory: Memory | None, x: Tensor, z_star: Tensor) -> Memory | None:
        """The last `memory_len` positions of the memory and this segment, without gradients; None if that is zero."""
        if self.config.memory_len == 0:
            return None
        if memory is not None:
            x, z_star = torch.cat([memory.x, x], dim=1), torch.cat([memory.z, z_star], dim=1)
        last = slice(-self.config.memory_len, None)
        return Memory(x[:, last].detach(), z_star[:, last].detach())

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)  # (B, H, T, K)
