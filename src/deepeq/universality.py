"""Theorems 2 and 3 of the paper as constructors: one DEQ for two, and one tied layer for any feed-forward network."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.utils import _pytree as pytree

from deepeq.adjoint import Adjoint
from deepeq.cell import Cell, method, require
from deepeq.layers import DEQ, Unrolled
from deepeq.solvers import Solver

Pair = tuple[Any, Any]
Layers = nn.Sequential | Sequence[tuple[nn.Linear, nn.Module | None]]


def stack(deq1: DEQ, deq2: DEQ, *, solver: Solver | None = None, adjoint: Adjoint | None = None) -> DEQ:
    """Return one DEQ that computes what `deq2` computes from the output of `deq1` (Bai et al. 2019, theorem 2).

    Its state is `(z1, z2)`, its map is eq. 16, and its equilibrium holds the equilibria of both:

        Gamma(z1, z2; x) = (f1(z1; x), f2(z2; z1))

    Where the first cell has a method `output(z)`, as a stack itself has, `f2` reads `output(z1)` instead of `z1`. The
    memory is None or a pair. The parameters are shared with `deq1` and `deq2`. One evaluation costs one of each map and
    one of the second cell's `inject`, which depends on `z1`.

    Args:
        deq1: The layer that reads `x`.
        deq2: The layer that reads the equilibrium of `deq1`; its options are those of the result.
        solver: Forward solver; default the solver of `deq2`.
        adjoint: How gradients are computed; default the adjoint of `deq2`.

    Raises:
        TypeError: One of the layers is not a `DEQ`.
    """
    for name, layer in (("deq1", deq1), ("deq2", deq2)):
        if not isinstance(layer, DEQ):
            raise TypeError(f"{name} must be a DEQ, got {type(layer).__name__}")
    how = deq2.how if deq1.how.on_failure != "raise" else replace(deq2.how, on_failure="raise")
    how = how if solver is None else replace(how, solver=solver)
    how = how if adjoint is None else replace(how, adjoint=adjoint)
    return DEQ(StackedCell(deq1, deq2), **vars(how))


class StackedInjection(NamedTuple):
    """Everything that one solve of a `StackedCell` needs besides its state."""

    f1: Callable[[Any], Any]
    memory: Any  # of the second cell
    seed: int | None  # of what the second cell draws


class StackedCell(Cell):
    """Two cells as one, where the second reads the state of the first; see `stack`.

    Random numbers that the second cell draws in `inject`, such as a dropout mask, are the same at every evaluation of a
    solve.
    """

    def __init__(self, first: DEQ, second: DEQ) -> None:
        super().__init__()
        self.first, self.second = first, second

    def initial_state(self, x: Any) -> Pair:
        """Return the first states of both cells."""
        z1 = method(self.first.cell, "initial_state")(x)
        return z1, method(self.second.cell, "initial_state")(self._read(z1))

    def inject(self, x: Any, memory: Pair | None = None) -> StackedInjection:
        """Return what both cells need besides the state, for an input of the first and a pair of memories."""
        memory1, memory2 = _pair(memory)
        f1, _ = self.first.prepare(x, memory=memory1)
        draws = any(module.training for module in self.second.modules())
        return StackedInjection(f1, memory2, int(torch.randint(2**31, ())) if draws else None)

    def forward(self, z: Pair, injection: StackedInjection) -> Pair:
        """Return `(f1(z1), f2(z2))`, where `f2` reads `z1`."""
        z1, z2 = z
        with _seeded(injection.seed, like=pytree.tree_leaves(z2)[0]):
            f2, _ = self.second.prepare(self._read(z1), z2, injection.memory)
        return injection.f1(z1), f2(z2)

    def output(self, z: Pair) -> Any:
        """Return the output of the second cell."""
        return method(self.second.cell, "output")(z[1])

    def extend_memory(self, memory: Pair | None, x: Any, z: Pair, *, length: int | None = None) -> Pair:
        """Return both memories after a segment, for cells that extend theirs.

        Args:
            memory: The two memories before the segment, or None.
            x: Input of the segment.
            z: The two states of the segment.
            length: Largest number of positions to remember.
        """
        (memory1, memory2), (z1, z2) = _pair(memory), z
        for cell in (self.first.cell, self.second.cell):
            require(cell, "extend_memory(memory, x, z, *, length)", purpose="be solved in pieces")
        return (
            method(self.first.cell, "extend_memory")(memory1, x, z1, length=length),
            method(self.second.cell, "extend_memory")(memory2, self._read(z1), z2, length=length),
        )

    def _read(self, z1: Any) -> Any:
        return method(self.first.cell, "output")(z1)


def weight_tied(layers: Layers) -> Unrolled:
    """Return the weight-tied, input-injected network that equals a feed-forward one of the same depth (theorem 3).

    Args:
        layers: As in `WeightTiedCell`.

    Returns:
        `Unrolled` of a `WeightTiedCell`. The value of its Solution is the features of all layers side by side; the
        output of the network is `layer.cell.output(value)`.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> layer, x = weight_tied(network), torch.randn(5, 3)
        >>> torch.allclose(layer.cell.output(layer(x).value), network(x), atol=1e-6)
        True
    """
    cell = WeightTiedCell(layers)
    return Unrolled(cell, cell.depth)


class WeightTiedInjection(NamedTuple):
    """Everything that one solve of a `WeightTiedCell` needs besides `z`."""

    weight: Tensor  # W_z, (D, D)
    shift: Tensor  # W_x x + b, (..., D)


class WeightTiedCell(Cell):
    """A feed-forward network of `L` layers as one tied layer (Bai et al. 2019, theorem 3).

    The state holds the features of all layers side by side, `D = d_1 + ... + d_L` channels, and

        f(z; x) = sigma(W_z z + W_x x + b)

    with the blocks of eq. 19: `W_z` moves the features of each layer to the next, and `W_x` feeds the first layer. Both
    are built once per solve from the parameters of the network, which are shared. After `L` applications the state is
    that of eq. 21 and no longer changes: the Jacobian is nilpotent, so a `DEQ` of this cell has the network's features
    as its only equilibrium. The dense product with `W_z` costs `D^2` products; the network needs only the blocks.

    Args:
        layers: An `nn.Sequential` in which each `nn.Linear` is followed by at most one activation, or the pairs
            `(nn.Linear, activation)`. An activation is an element-wise module; None or nothing is the identity.

    Raises:
        TypeError: An entry is not a `nn.Linear`, or not an activation.
        ValueError: There is no layer, or a layer's width does not match the layer before it.
    """

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        pairs = _linear_and_activation(layers)
        self.linears = nn.ModuleList(layer for layer, _ in pairs)
        self.activations = nn.ModuleList(activation for _, activation in pairs)
        self.d_input, self.widths = pairs[0][0].in_features, [layer.out_features for layer, _ in pairs]

    @property
    def depth(self) -> int:
        """The number of layers `L`."""
        return len(self.widths)

    def initial_state(self, x: Tensor) -> Tensor:
        """Return zeros, `(..., D)`, for inputs `(..., d_input)`."""
        return x.new_zeros(*x.shape[:-1], sum(self.widths))

    def inject(self, x: Tensor, memory: None = None) -> WeightTiedInjection:
        """Return `W_z` and `W_x x + b`, for inputs `x` `(..., d_input)`."""
        if memory is not None:
            raise ValueError("memory was given, but a feed-forward network has none; leave it out")
        weights, biases = [], []
        for layer in self.linears:
            assert isinstance(layer, nn.Linear)
            weights.append(layer.weight)
            biases.append(layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias)
        # Blocks without rows, or without columns, put the zeros at the top and the right of eq. 19.
        first, last = weights[0].new_zeros(self.widths[0], 0), weights[0].new_zeros(0, self.widths[-1])
        w_z = torch.block_diag(first, *weights[1:], last)  # (D, D)
        w_x = pad(weights[0], (0, 0, 0, sum(self.widths[1:])))  # (D, d_input)
        return WeightTiedInjection(w_z, linear(x, w_x, torch.cat(biases)))

    def forward(self, z: Tensor, injection: WeightTiedInjection) -> Tensor:
        """Return `sigma(W_z z + W_x x + b)`, `(..., D)`."""
        before = linear(z, injection.weight) + injection.shift
        # An ordinary split gives views, which an in-place activation may not write to.
        blocks = torch.unsafe_split_with_sizes(before, self.widths, dim=-1)
        return torch.cat([sigma(block) for sigma, block in zip(self.activations, blocks, strict=True)], dim=-1)

    def output(self, z: Tensor) -> Tensor:
        """Return the features of the last layer, `(..., d_L)`."""
        return z[..., -self.widths[-1] :]

    def take(self, injection: WeightTiedInjection, rows: Tensor) -> WeightTiedInjection:
        """Return the injection of some problems; the weight belongs to all of them."""
        return injection._replace(shift=injection.shift[rows])


def _linear_and_activation(layers: Layers) -> list[tuple[nn.Linear, nn.Module]]:
    pairs = []
    for place, (layer, activation) in enumerate(_pairs(layers)):
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"layer {place} must start with a torch.nn.Linear, got {type(layer).__name__}")
        activation = nn.Identity() if activation is None else activation
        if not isinstance(activation, nn.Module) or isinstance(activation, nn.Linear):
            raise TypeError(
                f"the activation of layer {place} must be an element-wise torch.nn.Module such as nn.Tanh(), or None, "
                f"got {type(activation).__name__}"
            )
        if pairs and pairs[-1][0].out_features != layer.in_features:
            raise ValueError(
                f"layer {place} takes {layer.in_features} channels, but layer {place - 1} gives "
                f"{pairs[-1][0].out_features}; a network's widths must chain"
            )
        pairs.append((layer, activation))
    if not pairs:
        raise ValueError("layers is empty; give at least one torch.nn.Linear")
    return pairs


def _pairs(layers: Layers) -> Iterator[tuple[Any, Any]]:
    """Yield the layers of a Sequential, cut before each Linear, or the given pairs."""
    if not isinstance(layers, nn.Sequential):
        for pair in layers:
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise TypeError(f"layers must be an nn.Sequential or pairs (nn.Linear, activation), got {pair!r}")
            yield pair[0], pair[1]
        return
    modules = list(layers)
    while modules:
        layer = modules.pop(0)
        activation = modules.pop(0) if modules and not isinstance(modules[0], nn.Linear) else None
        yield layer, activation


def _pair(memory: Pair | None) -> Pair:
    if memory is None:
        return None, None
    if not isinstance(memory, tuple) or len(memory) != 2:
        raise ValueError(
            f"the memory of a stack must be None or a pair (memory1, memory2), got {type(memory).__name__}"
        )
    return memory


@contextmanager
def _seeded(seed: int | None, *, like: Tensor) -> Iterator[None]:
    """Draw random numbers from a seed on the CPU and the tensor's device, then restore both generators."""
    if seed is None:
        yield
        return
    device = like.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        yield
