"""The explicit networks of table 1 of the paper: temporal convolutions, LSTM and GRU.

Letters: B batch, T segment, L depth, E input channels, H hidden channels, k kernel size, s dilation.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from deepeq.checks import check_count
from deepeq.models.cell import LayerConfig, check_ranges
from deepeq.models.networks import NetworkOutput

RecurrentMemory = Tensor | tuple[Tensor, Tensor]


class BlockMemory(NamedTuple):
    """The last `(k - 1) s` inputs of both convolutions of a block."""

    first: Tensor  # (B, (k - 1) s, E) in the first block, (B, (k - 1) s, H) in the others
    second: Tensor  # (B, (k - 1) s, H)


@dataclass(frozen=True, kw_only=True)
class TCNConfig(LayerConfig):
    """Hyper-parameters of the blocks of a `TCN`.

    Raises:
        ValueError: A field is out of range.
    """

    d_input: int = 128
    """Channels of the input."""
    d_hidden: int = 128
    """Channels of every block and of the output."""
    kernel_size: int = 8
    """Number of positions that a convolution reads."""
    dropout: float = 0.0
    """Fraction of the channels that is dropped after each convolution, the same channels at all positions."""

    def __post_init__(self) -> None:
        problems = check_ranges(self, {"d_input": 1, "d_hidden": 1, "kernel_size": 2}, ("dropout",))
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def widths(self) -> tuple[int, int]:
        return self.d_input, self.d_hidden


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(LayerConfig):
    """Hyper-parameters of the layers of a `Recurrent` network.

    Raises:
        ValueError: A field is out of range.
    """

    d_input: int = 128
    """Channels of the input."""
    d_hidden: int = 128
    """Channels of the state of every layer and of the output."""
    kind: Literal["lstm", "gru"] = "lstm"
    """Long short-term memory, or gated recurrent units."""
    dropout: float = 0.0
    """Fraction of the entries that is dropped after each layer."""

    def __post_init__(self) -> None:
        problems = check_ranges(self, {"d_input": 1, "d_hidden": 1}, ("dropout",))
        if self.kind not in ("lstm", "gru"):
            problems.append(f"kind={self.kind!r} must be 'lstm' or 'gru'")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def widths(self) -> tuple[int, int]:
        return self.d_input, self.d_hidden


class TCN(nn.Module):
    """Temporal convolutional network: `depth` residual blocks, dilated by 1, 2, 4, ... (Bai, Kolter, Koltun 2018).

    Called as `network(x, memory=None)` for `x` `(B, T, E)`. The value is `(B, T, H)`. The memory holds a `BlockMemory`
    for each block and is not detached: with it, the next segment gives what the two segments would give as one. Without
    a memory, every convolution reads zeros before the first position.

    Args:
        config: Hyper-parameters of each block.
        depth: Number of blocks.

    Raises:
        ValueError: `depth` is not a whole number >= 1.

    References:
        Bai, Kolter, Koltun (2018), An empirical evaluation of generic convolutional and recurrent networks for sequence
        modeling, arXiv:1803.01271, section 3.
    """

    def __init__(self, config: TCNConfig, depth: int) -> None:
        super().__init__()
        check_count("depth", depth, least=1, owner=self)
        self.config = config
        widths = [config.d_input] + [config.d_hidden] * (depth - 1)
        self.blocks = nn.ModuleList(_Block(config, width, dilation=2**i) for i, width in enumerate(widths))

    @property
    def receptive_field(self) -> int:
        """Number of positions that an output depends on, its own included: `1 + 2 (k - 1) (2^L - 1)`."""
        return 1 + 2 * (self.config.kernel_size - 1) * (2 ** len(self.blocks) - 1)

    def forward(self, x: Tensor, memory: tuple[BlockMemory, ...] | None = None) -> NetworkOutput:
        """Return features `(B, T, H)` and the memory for the next segment."""
        memories = [None] * len(self.blocks) if memory is None else memory
        extended = []
        for block, earlier in zip(self.blocks, memories, strict=True):
            x, later = block(x, earlier)
            extended.append(later)
        return NetworkOutput(x, tuple(extended))


class Recurrent(nn.Module):
    """LSTM or GRU of `depth` layers.

    Called as `network(x, memory=None)` for `x` `(B, T, E)`. The value is `(B, T, H)`. The memory holds the last states
    `h` `(B, L, H)` of the layers, or for the LSTM the pair `(h, c)`, and is not detached. Without a memory, the first
    states are zeros.

    Args:
        config: Hyper-parameters of each layer.
        depth: Number of layers.

    Raises:
        ValueError: `depth` is not a whole number >= 1.
    """

    def __init__(self, config: RecurrentConfig, depth: int) -> None:
        super().__init__()
        check_count("depth", depth, least=1, owner=self)
        self.config = config
        network = nn.LSTM if config.kind == "lstm" else nn.GRU
        # torch drops entries between layers only, and warns where there is one layer.
        between = config.dropout if depth > 1 else 0.0
        self.layers = network(config.d_input, config.d_hidden, depth, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: RecurrentMemory | None = None) -> NetworkOutput:
        """Return features `(B, T, H)` and the memory for the next segment."""
        hidden, last = self.layers(x, None if memory is None else _swap_layers_and_batch(memory))
        return NetworkOutput(self.dropout(hidden), _swap_layers_and_batch(last))


class _Block(nn.Module):
    """`relu(skip(x) + g(x))`, where `g` is causal convolution, ReLU and dropout of channels, twice."""

    def __init__(self, config: TCNConfig, d_input: int, *, dilation: int) -> None:
        super().__init__()
        self.first = _CausalConvolution(d_input, config.d_hidden, kernel_size=config.kernel_size, dilation=dilation)
        self.second = _CausalConvolution(
            config.d_hidden, config.d_hidden, kernel_size=config.kernel_size, dilation=dilation
        )
        self.dropout = nn.Dropout1d(config.dropout)
        # A convolution that reads one position is a linear map of its channels.
        self.skip = nn.Identity() if d_input == config.d_hidden else nn.Linear(d_input, config.d_hidden)

    def forward(self, x: Tensor, memory: BlockMemory | None = None) -> tuple[Tensor, BlockMemory]:
        h, first = self.first(x, None if memory is None else memory.first)
        h = self._drop(h.relu())
        h, second = self.second(h, None if memory is None else memory.second)
        h = self._drop(h.relu())
        return (self.skip(x) + h).relu(), BlockMemory(first, second)

    def _drop(self, h: Tensor) -> Tensor:
        return self.dropout(h.transpose(1, 2)).transpose(1, 2)  # (B, T, H)


class _CausalConvolution(nn.Module):
    """Weight-normalized dilated convolution of a position and those before it, channels last."""

    def __init__(self, d_input: int, d_output: int, *, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.reach = (kernel_size - 1) * dilation
        self.convolution = weight_norm(nn.Conv1d(d_input, d_output, kernel_size, dilation=dilation))

    def forward(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return outputs `(B, T, D)`, and the last inputs `(B, (k - 1) s, C)` of memory and segment."""
        if memory is None:
            memory = x.new_zeros(x.shape[0], self.reach, x.shape[2])
        padded = torch.cat([memory, x], dim=1)  # (B, (k - 1) s + T, C)
        y = self.convolution(padded.transpose(1, 2)).transpose(1, 2)  # (B, T, D)
        return y, padded[:, -self.reach :]


def _swap_layers_and_batch(state: RecurrentMemory) -> RecurrentMemory:
    if isinstance(state, Tensor):
        return state.transpose(0, 1).contiguous()  # (L, B, H) <-> (B, L, H)
    h, c = state
    return h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()  # (L, B, H) <-> (B, L, H)
