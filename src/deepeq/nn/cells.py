"""Ready-made cells: dense, convolutional, and with attention.

All of them compute `f(z; x) = N(u(x) + B(z))` or a variant of it, in which `u` is a normalized linear function of the
input, `B` a small network without a skip connection, and `N` a normalization. Three choices make solvers converge:

- The input is injected once and normalized, so that its scale does not matter.
- The last weights of `B` are small at first. The state is then close to `N(u)`, and the map is a contraction.
- The normalization is outside the sum. It keeps the state bounded, so that an equilibrium exists, and it makes the
  Jacobian depend on the directions of the weights of `B` more than on their size: training that increases the weights
  does not increase the Jacobian in proportion.
"""

import math
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from deepeq.checks import check_choice, check_count
from deepeq.nn.dropout import variational_mask
from deepeq.nn.relative_attention import sinusoidal_positions


class CellInjection(NamedTuple):
    """What a ready-made cell needs besides the state in one solve."""

    u: Tensor
    """The normalized linear function of the input, with the shape of the state."""
    mask: Tensor | None
    """Dropout mask of the hidden channels, or None."""


class _ReadyCell(nn.Module):
    """What the ready-made cells share: checks, the injection, and the mask."""

    width: int
    hidden: int
    dropout: float
    channel_dim: int
    """Dimension of the channels, in the input and in the state."""
    num_dims: int
    """Number of dimensions of the input, and of the state."""
    layout: str
    """Shape of the input in words, for errors."""
    injection: nn.Module
    injection_norm: nn.Module

    def _set(self, d_in: int, width: int, hidden: int | None, gain: float, dropout: float) -> None:
        for name, value in (("d_in", d_in), ("width", width), ("hidden", hidden)):
            if value is not None:
                check_count(name, value, least=1, owner=self)
        if not isinstance(gain, int | float) or not 0.0 < gain < math.inf:
            raise ValueError(f"gain={gain!r} of {type(self).__name__} must be a number > 0")
        if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout!r} of {type(self).__name__} must lie in [0, 1); 0 means none")
        self.d_in, self.width, self.hidden = d_in, width, hidden or width
        self.gain, self.dropout = gain, dropout

    def _start_small(self, layer: nn.Module) -> None:
        """Draw the weights of the last layer of a branch, with a standard deviation of `gain / sqrt(fan_in)`."""
        weight = layer.get_parameter("weight")
        nn.init.normal_(weight, std=self.gain * weight[0].numel() ** -0.5)

    def inject(self, x: Tensor, memory: None = None) -> CellInjection:
        """Return the normalized injection, and the dropout mask of this solve.

        Args:
            x: The input of the layer.
            memory: None; these cells keep no memory.

        Raises:
            TypeError: `x` is not a tensor of floating-point numbers.
            ValueError: `x` has another shape than the cell was built for, or a memory is given.
        """
        name = type(self).__name__
        if memory is not None:
            raise ValueError(f"memory was given, but {name} keeps none; write a cell with inject(x, memory) to use one")
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a tensor of floating-point numbers {self.layout}, got {kind}")
        if x.ndim != self.num_dims or x.shape[self.channel_dim] != self.d_in:
            raise ValueError(f"x of {name} must be {self.layout} with D={self.d_in}, got {tuple(x.shape)}")
        u = self.injection_norm(self.injection(x))
        mask = None
        if self.training and self.dropout:
            shape = [x.shape[0]] + [1] * (x.ndim - 1)
            shape[self.channel_dim] = self.hidden
            mask = variational_mask(shape, self.dropout, like=u)
        return CellInjection(u, mask)

    def initial_state(self, x: Tensor) -> Tensor:
        """Return zeros with the shape of the state, that of the input with `width` channels."""
        shape = list(x.shape)
        shape[self.channel_dim] = self.width
        return x.new_zeros(shape)

    def take(self, injection: CellInjection, rows: Tensor) -> CellInjection:
        """Return the injection of some of the problems of a batch."""
        return CellInjection(injection.u[rows], None if injection.mask is None else injection.mask[rows])

    def extra_repr(self) -> str:
        return f"gain={self.gain}, dropout={self.dropout}"


class DenseCell(_ReadyCell):
    """A cell of vectors: `f(z; x) = LN(u + W_2 relu(W_1 z))`, with `u = LN(U x)`; the linear maps have biases.

    Args:
        d_in: Number of components of an input; inputs are `(B, D)`.
        width: Number of components of the state.
        hidden: Number of hidden units; default `width`.
        gain: The initial values of `W_2` have the standard deviation `gain / sqrt(hidden)`. Small values make the first
            equilibria easy to find, and keep solves short in training.
        dropout: Fraction of the hidden units that is dropped in training. One mask is drawn for each solve.

    Raises:
        ValueError: An argument is out of range.
    """

    channel_dim, num_dims, layout = 1, 2, "(B, D)"

    def __init__(
        self, d_in: int, width: int, *, hidden: int | None = None, gain: float = 0.3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self._set(d_in, width, hidden, gain, dropout)
        self.injection, self.injection_norm = nn.Linear(d_in, width), nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, self.hidden), nn.Linear(self.hidden, width)
        self.norm = nn.LayerNorm(width)
        self._start_small(self.outer)

    def forward(self, z: Tensor, injection: CellInjection) -> Tensor:
        """Return the next state, `(B, width)`."""
        h = self.inner(z).relu()
        if injection.mask is not None:
            h = h * injection.mask
        return self.norm(injection.u + self.outer(h))


class ConvCell(_ReadyCell):
    """A cell of pictures or sequences: `f(z; x) = GN(u + C_2 relu(C_1 z))`, with `u = GN(C x)`.

    `C`, `C_1` and `C_2` are convolutions with zero padding, so that the state has the size of the input. `GN` is group
    normalization, whose statistics are those of one sample: a batch is solved as independent problems.

    Args:
        d_in: Number of channels of the input; inputs are `(B, D, H, W)`, or `(B, D, L)` with `dims=1`.
        width: Number of channels of the state.
        dims: Number of dimensions of the convolution, 1 or 2.
        kernel_size: Size of each kernel, an odd number.
        groups: Number of groups of the normalization; it divides `width`. The mean over the positions and channels of
            a group is fixed by the normalization: with many groups, little is left for an average over positions to
            tell.
        hidden: Number of hidden channels; default `width`.
        gain: The initial values of `C_2` have the standard deviation `gain / sqrt(hidden * kernel_size**dims)`.
        dropout: Fraction of the hidden channels that is dropped in training. One mask is drawn for each solve.

    Raises:
        ValueError: An argument is out of range.
    """

    channel_dim = 1

    def __init__(
        self,
        d_in: int,
        width: int,
        *,
        dims: Literal[1, 2] = 2,
        kernel_size: int = 3,
        groups: int = 1,
        hidden: int | None = None,
        gain: float = 0.3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self._set(d_in, width, hidden, gain, dropout)
        check_choice("dims", dims, Literal[1, 2])
        check_count("kernel_size", kernel_size, least=1, owner=self)
        check_count("groups", groups, least=1, owner=self)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} of ConvCell must be odd, so that the state keeps its size")
        if width % groups:
            raise ValueError(f"groups={groups} of ConvCell must divide width={width}")
        self.num_dims, self.layout = 2 + dims, "(B, D, L)" if dims == 1 else "(B, D, H, W)"
        convolution = nn.Conv1d if dims == 1 else nn.Conv2d

        def layer(before: int, after: int) -> nn.Module:
            return convolution(before, after, kernel_size, padding=kernel_size // 2)

        self.injection, self.injection_norm = layer(d_in, width), nn.GroupNorm(groups, width)
        self.inner, self.outer = layer(width, self.hidden), layer(self.hidden, width)
        self.norm = nn.GroupNorm(groups, width)
        self._start_small(self.outer)

    def forward(self, z: Tensor, injection: CellInjection) -> Tensor:
        """Return the next state, `(B, width, H, W)` or `(B, width, L)`."""
        h = self.inner(z).relu()
        if injection.mask is not None:
            h = h * injection.mask
        return self.norm(injection.u + self.outer(h))


class AttentionCell(_ReadyCell):
    """A cell of sequences or sets, with attention between the positions and a feed-forward network at each of them.

    With `u = LN(U x)`, plus the encoding of the position where there is one, the next state is

        post:  h = LN(u + W_o attention(z)),     f(z; x) = LN(h + W_2 relu(W_1 h))
        pre:   h = u + W_o attention(LN(z)),     f(z; x) = h + W_2 relu(W_1 LN(h))

    In neither of them does the state skip the layer, as it does in a transformer. A skip connection would make the
    equilibrium of `pre` a state at which all updates vanish, and there need not be one.

    Args:
        d_in: Number of channels of the input; inputs are `(B, T, D)`.
        width: Number of channels of the state, a multiple of `num_heads`.
        num_heads: Number of attention heads.
        norm: Place of the normalization, as above.
        positions: `"sinusoidal"` adds an encoding of the position to the injection. With None the cell is equivariant:
            permuted inputs have permuted equilibria. For other encodings, add them to `x`.
        causal: Whether a position sees only itself and those before it.
        hidden: Number of hidden units of the feed-forward network; default `2 * width`.
        gain: The initial values of `W_o` and `W_2` have the standard deviation `gain / sqrt(fan_in)`.
        dropout: Fraction of the hidden units that is dropped in training. One mask is drawn for each solve.

    Raises:
        ValueError: An argument is out of range.
    """

    channel_dim, num_dims, layout = 2, 3, "(B, T, D)"

    def __init__(
        self,
        d_in: int,
        width: int,
        *,
        num_heads: int = 4,
        norm: Literal["post", "pre"] = "post",
        positions: Literal["sinusoidal"] | None = None,
        causal: bool = False,
        hidden: int | None = None,
        gain: float = 0.3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self._set(d_in, width, hidden, gain, dropout)
        self.hidden = hidden or 2 * width
        check_count("num_heads", num_heads, least=1, owner=self)
        if width % num_heads:
            raise ValueError(f"num_heads={num_heads} of AttentionCell must divide width={width}")
        check_choice("norm", norm, Literal["post", "pre"])
        if positions is not None:
            check_choice("positions", positions, Literal["sinusoidal"])
            if width % 2:
                raise ValueError(f"width={width} of AttentionCell must be even for sinusoidal positions")
        self.num_heads, self.placement, self.positions, self.causal = num_heads, norm, positions, causal
        self.injection, self.injection_norm = nn.Linear(d_in, width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, self.hidden), nn.Linear(self.hidden, width)
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self._start_small(self.projection)
        self._start_small(self.outer)

    def inject(self, x: Tensor, memory: None = None) -> CellInjection:
        injection = super().inject(x, memory)
        if self.positions is None:
            return injection
        table = sinusoidal_positions(x.shape[1], self.width, like=injection.u)  # (T, D)
        return injection._replace(u=injection.u + table)

    def forward(self, z: Tensor, injection: CellInjection) -> Tensor:
        """Return the next state, `(B, T, width)`."""
        pre = self.placement == "pre"
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(z) if pre else z).chunk(3, dim=-1)
        )  # (B, H, T, K)
        attended = scaled_dot_product_attention(query, key, value, is_causal=self.causal).transpose(1, 2).flatten(2)
        h = injection.u + self.projection(attended)
        h = h if pre else self.attention_norm(h)
        inner = self.inner(self.norm(h) if pre else h).relu()
        if injection.mask is not None:
            inner = inner * injection.mask
        z = h + self.outer(inner)
        return z if pre else self.norm(z)

    def extra_repr(self) -> str:
        return f"norm={self.placement}, positions={self.positions}, causal={self.causal}, {super().extra_repr()}"
