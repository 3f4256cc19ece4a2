"""The trellis network of the paper as a cell: a causal convolution with the gates of an LSTM.

Letters: B batch, T segment, M history, E input channels, H hidden channels, k kernel size, s dilation.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deepeq.models.cell import CellConfig, SequenceCell, check_ranges
from deepeq.nn import VariationalDropout, regularize_weight

State = tuple[Tensor, Tensor]


class TrellisMemory(NamedTuple):
    """The last `(k - 1) s` positions before the segment."""

    x: Tensor  # (B, M, E)
    h: Tensor  # (B, M, H)
    c: Tensor  # (B, M, H)


class TrellisWeights(NamedTuple):
    """The matrices of one solve, normalized and with entries dropped where the configuration says so."""

    injection: Tensor  # (4 H, k E)
    convolution: Tensor  # (4 H, k H)


class TrellisInjection(NamedTuple):
    """Everything that one solve needs besides `z`."""

    gates: Tensor  # (B, T, 4 H) convolved inputs
    h: Tensor  # (B, M, H) history
    c: Tensor  # (B, M, H) history
    weight: Tensor  # (4 H, k H)
    mask: Tensor | None  # (B, 1, H)


@dataclass(frozen=True, kw_only=True)
class TrellisConfig(CellConfig):
    """Hyper-parameters of a `TrellisCell`.

    Raises:
        ValueError: A field is out of range.
    """

    d_input: int = 128
    """Channels of the input."""
    d_hidden: int = 384
    """Channels of `h` and of `c`, including the output's."""
    d_output: int = 128
    """Number of last channels of `h` that are the output."""
    kernel_size: int = 2
    """Number of positions that a convolution reads."""
    dilation: int = 1
    """Distance between these positions."""
    weight_norm: bool = True
    """Whether the rows of both convolutions are normalized, once per solve."""
    hidden_dropout: float = 0.0
    """Fraction of the channels of `h` that the hidden convolution does not read, the same channels at all positions."""
    weight_dropout: float = 0.0
    """Fraction of the weights of both convolutions that is dropped in a solve."""
    init_std: float = 0.05
    """Standard deviation of the initial weights; 0.05 in the paper, section 5."""

    def __post_init__(self) -> None:
        problems = check_ranges(
            self,
            {"d_input": 1, "d_hidden": 1, "d_output": 1, "kernel_size": 2, "dilation": 1},
            ("hidden_dropout", "weight_dropout"),
            positive=("init_std",),
        )
        if self.d_output > self.d_hidden:
            problems.append(f"d_output={self.d_output!r} must be <= d_hidden={self.d_hidden!r}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def widths(self) -> tuple[int, int]:
        return self.d_input, self.d_output

    def build(self) -> "TrellisCell":
        """Return a cell of these sizes with random weights."""
        return TrellisCell(self)


class TrellisCell(SequenceCell):
    """Trellis network with input injection (Bai et al. 2019, section 4; Bai, Kolter, Koltun 2019, ICLR).

    The state is `z = (h, c)`. The gates `[i, o, g, f] = Conv(h) + Conv(x)` come from causal convolutions of kernel size
    `k` and dilation `s`, which look back into the history of earlier segments, or into zeros without one:

        c'_t = sigma(f_t) c_{t-s} + sigma(i_t) tanh(g_t)
        h'_t = sigma(o_t) tanh(c'_t)

    Args:
        config: Its hyper-parameters.
    """

    def __init__(self, config: TrellisConfig) -> None:
        super().__init__()
        self.config = config
        taps, num_gates = config.kernel_size, 4 * config.d_hidden
        self.injection = nn.Linear(taps * config.d_input, num_gates)
        self.convolution = nn.Linear(taps * config.d_hidden, num_gates, bias=False)
        for layer in (self.injection, self.convolution):
            nn.init.normal_(layer.weight, std=config.init_std)
        nn.init.zeros_(self.injection.bias)
        self.hidden_dropout = VariationalDropout(config.hidden_dropout)
        for layer in (self.injection, self.convolution):
            regularize_weight(layer, weight_norm=config.weight_norm, dropout=config.weight_dropout)

    @property
    def history_len(self) -> int:
        """Number of positions of earlier segments that the convolutions read, `(k - 1) s`."""
        return (self.config.kernel_size - 1) * self.config.dilation

    def initial_state(self, x: Tensor) -> State:
        """Return two tensors of zeros, `(B, T, H)`."""
        h = x.new_zeros(*x.shape[:2], self.config.d_hidden)
        return h, h

    def shared_weights(self) -> TrellisWeights:
        """Return both matrices, in training with randomly dropped entries."""
        return TrellisWeights(self.injection.weight, self.convolution.weight)

    def inject(
        self, x: Tensor, memory: TrellisMemory | None = None, weights: TrellisWeights | None = None
    ) -> TrellisInjection:
        """Return the part of the gates that the input gives, the history, and the weights.

        Args:
            x: Inputs, `(B, T, E)`.
            memory: The history; None for zeros.
            weights: Weights from `shared_weights`, if several solves share them.
        """
        weights = weights or self.shared_weights()
        if memory is None:
            memory = self._zeros(x)
        mask = self.hidden_dropout.mask(memory.h)
        history = memory.h if mask is None else memory.h * mask
        taps = self._taps(torch.cat([memory.x, x], dim=1))
        gates = linear(taps, weights.injection, self.injection.bias)  # (B, T, 4 H)
        return TrellisInjection(gates, history, memory.c, weights.convolution, mask)

    def forward(self, z: State, injection: TrellisInjection) -> State:
        """Return the next state, two tensors `(B, T, H)`."""
        h, c = z
        seen = h if injection.mask is None else h * injection.mask
        taps = self._taps(torch.cat([injection.h, seen], dim=1))
        i, o, g, f = (linear(taps, injection.weight) + injection.gates).chunk(4, dim=-1)  # (B, T, H) each
        earlier = torch.cat([injection.c[:, -self.config.dilation :], c], dim=1)[:, : c.shape[1]]  # (B, T, H)
        c = torch.sigmoid(f) * earlier + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def take(self, injection: TrellisInjection, rows: Tensor) -> TrellisInjection:
        """Return the injection of some sequences of the batch; the weight belongs to all of them."""
        return injection._replace(
            gates=injection.gates[rows],
            h=injection.h[rows],
            c=injection.c[rows],
            mask=None if injection.mask is None else injection.mask[rows],
        )

    def output(self, z: State) -> Tensor:
        """Return the last channels of `h`, `(B, T, d_output)`."""
        return z[0][..., -self.config.d_output :]

    def extend_memory(
        self, memory: TrellisMemory | None, x: Tensor, z: State, *, length: int | None = None
    ) -> TrellisMemory:
        """Return the last `(k - 1) s` positions of the memory and this segment.

        Args:
            memory: The memory of this segment, or None.
            x: Inputs of this segment, `(B, T, E)`.
            z: Equilibria of this segment.
            length: Not used: the convolutions read `(k - 1) s` positions and no more.
        """
        earlier, last = memory or self._zeros(x), slice(-self.history_len, None)
        # Cut before joining, because a view would keep the storage of a whole segment.
        pairs = zip(earlier, (x, *z), strict=True)
        return TrellisMemory(*(torch.cat([old[:, last], new[:, last]], dim=1)[:, last] for old, new in pairs))

    def _zeros(self, x: Tensor) -> TrellisMemory:
        h = x.new_zeros(x.shape[0], self.history_len, self.config.d_hidden)
        return TrellisMemory(x.new_zeros(x.shape[0], self.history_len, x.shape[2]), h, h)

    def _taps(self, padded: Tensor) -> Tensor:
        length, dilation = padded.shape[1] - self.history_len, self.config.dilation
        starts = range(0, self.history_len + 1, dilation)
        return torch.cat([padded[:, start : start + length] for start in starts], dim=-1)  # (B, T, k C)
