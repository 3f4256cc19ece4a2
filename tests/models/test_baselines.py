"""The explicit networks of table 1: against references written with loops, and segment by segment."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deepeq.models import TCN, Recurrent, RecurrentConfig, TCNConfig

NETWORKS: dict[str, tuple[Any, int]] = {
    "tcn": (TCNConfig(d_input=3, d_hidden=5, kernel_size=3), 3),
    "tcn_equal_widths": (TCNConfig(d_input=5, d_hidden=5, kernel_size=2), 2),
    "lstm": (RecurrentConfig(d_input=3, d_hidden=5, kind="lstm"), 2),
    "gru": (RecurrentConfig(d_input=3, d_hidden=5, kind="gru"), 1),
}
networks = pytest.mark.parametrize(("config", "depth"), NETWORKS.values(), ids=list(NETWORKS))


def make(config: Any, depth: int) -> TCN | Recurrent:
    network = TCN(config, depth) if isinstance(config, TCNConfig) else Recurrent(config, depth)
    return network.double()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- the same for both -----------------------------------------------------------------------------------------------


@networks
def test_shapes_are_batch_first_and_channels_last(config: Any, depth: int) -> None:
    output = make(config, depth)(draw(2, 7, config.d_input))
    assert output.value.shape == (2, 7, 5)
    assert config.widths == (config.d_input, 5)
    assert all(leaf.shape[0] == 2 for leaf in pytree.tree_leaves(output.memory))
    assert (output.solution, output.intermediate, output.jacobian_penalty) == (None, (), None)


@networks
def test_output_is_causal(config: Any, depth: int) -> None:
    network, x = make(config, depth), draw(2, 6, config.d_input).requires_grad_()
    value = network(x).value
    for t in range(6):
        (gradient,) = torch.autograd.grad(value[:, t].sum(), x, retain_graph=True)
        assert (gradient[:, t + 1 :] == 0.0).all()
        assert (gradient[:, t] != 0.0).any()


@networks
@pytest.mark.parametrize("lengths", [(7, 6), (12, 1), (2, 1, 9, 1)])
def test_segments_equal_the_whole_in_values_and_gradients(config: Any, depth: int, lengths: tuple[int, ...]) -> None:
    """Segments shorter than what a convolution looks back on are among them."""
    network, x = make(config, depth), draw(2, sum(lengths), config.d_input).requires_grad_()
    weight = draw(2, sum(lengths), 5)
    memory, values = None, []
    for segment in x.split(lengths, dim=1):
        output = network(segment, memory)
        memory = output.memory
        values.append(output.value)
    whole, joined = network(x).value, torch.cat(values, dim=1)
    torch.testing.assert_close(joined, whole, rtol=1e-10, atol=1e-12)
    leaves = [x, *network.parameters()]
    expected = torch.autograd.grad((whole * weight).sum(), leaves)
    for a, b in zip(torch.autograd.grad((joined * weight).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@networks
def test_samples_do_not_mix(config: Any, depth: int) -> None:
    network, x, earlier = make(config, depth), draw(3, 4, config.d_input), draw(3, 4, config.d_input)
    memory = network(earlier).memory
    alone = pytree.tree_map(lambda leaf: leaf[1:2], memory)
    torch.testing.assert_close(network(x[1:2], alone).value, network(x, memory).value[1:2])


@networks
@pytest.mark.parametrize("bad", [0, -1, 1.0, True])
def test_bad_depth_raises_at_construction(config: Any, depth: int, bad: Any) -> None:
    with pytest.raises(ValueError, match="depth="):
        make(config, bad)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (
            TCNConfig,
            {"d_input": 0, "kernel_size": 1},
            "d_input=0 must be a whole number >= 1; kernel_size=1 must be a whole number >= 2",
        ),
        (
            TCNConfig,
            {"d_hidden": 0, "dropout": 1.0},
            r"d_hidden=0 must be a whole number >= 1; dropout=1.0 must lie in \[0, 1\)",
        ),
        (
            RecurrentConfig,
            {"d_hidden": -1, "kind": "rnn"},
            "d_hidden=-1 must be a whole number >= 1; kind='rnn' must be",
        ),
        (
            RecurrentConfig,
            {"d_input": 0, "dropout": -0.1},
            "d_input=0 must be a whole number >= 1; dropout=-0.1 must lie",
        ),
    ],
)
def test_values_out_of_range_are_named_together(config: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**values)


# --- temporal convolutions -------------------------------------------------------------------------------------------


def convolve(x: Tensor, convolution: nn.Module, *, dilation: int) -> Tensor:
    """Position by position and tap by tap, with `w = g v / ||v||` of each output channel."""
    g, v = (convolution.get_parameter(f"parametrizations.weight.original{i}") for i in range(2))
    num_outputs, num_inputs, taps = v.shape
    y = torch.empty(len(x), num_outputs, dtype=x.dtype)
    for t in range(len(x)):
        for i in range(num_outputs):
            w = g[i].reshape(()) * v[i] / v[i].square().sum().sqrt()
            total = convolution.get_parameter("bias")[i]
            for tap in range(taps):
                position = t - (taps - 1 - tap) * dilation
                for channel in range(num_inputs if position >= 0 else 0):
                    total = total + w[channel, tap] * x[position, channel]
            y[t, i] = total
    return y


@pytest.mark.parametrize("d_input", [2, 4])
def test_tcn_agrees_with_the_loop_written_reference(d_input: int) -> None:
    network = make(TCNConfig(d_input=d_input, d_hidden=4, kernel_size=3), 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * draw(*parameter.shape)  # norms that are not those of the directions
    x = draw(2, 8, d_input)
    actual = network(x).value
    for b in range(2):
        h = x[b]
        for level, block in enumerate(network.blocks):  # pyright: ignore[reportArgumentType]
            inner = convolve(h, block.first.convolution, dilation=2**level).clamp(min=0.0)
            inner = convolve(inner, block.second.convolution, dilation=2**level).clamp(min=0.0)
            if h.shape[1] != 4:
                h = torch.stack([block.skip.weight @ row + block.skip.bias for row in h])
            h = (h + inner).clamp(min=0.0)
        torch.testing.assert_close(actual[b], h, rtol=1e-10, atol=1e-12)


def test_receptive_field_is_what_the_output_depends_on() -> None:
    network = TCN(TCNConfig(d_input=1, d_hidden=6, kernel_size=3), 3).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()  # no ReLU closes
    assert network.receptive_field == 1 + 2 * 2 * (1 + 2 + 4)
    x = draw(1, 40, 1).abs().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).value[0, -1].sum(), x)
    assert (gradient[0, :, 0] != 0).tolist() == [False] * (40 - 29) + [True] * 29


def test_eight_blocks_with_kernel_eight_see_the_whole_copy_task() -> None:
    assert TCN(TCNConfig(d_input=1, d_hidden=2, kernel_size=8), 8).receptive_field == 3571
    assert TCN(TCNConfig(d_input=1, d_hidden=2, kernel_size=8), 5).receptive_field >= 420


def test_tcn_drops_whole_channels_in_training_alone() -> None:
    config = TCNConfig(d_input=64, d_hidden=64, kernel_size=2, dropout=0.5)
    network, x = TCN(config, 1), torch.zeros(1, 9, 64)
    with torch.no_grad():
        network.blocks[0].second.convolution.bias.fill_(1.0)  # pyright: ignore
    network.eval()
    kept = network(x).value
    network.train()
    value = network(x).value
    dropped = (value == 0.0) & (kept != 0.0)
    assert torch.equal(dropped.any(dim=1), dropped.all(dim=1))
    assert 10 < int(dropped.all(dim=1).sum()) < 54


# --- recurrent networks ----------------------------------------------------------------------------------------------


def lstm_step(x: Tensor, state: tuple[Tensor, Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    h, c = state
    w_x, w_h, b_x, b_h = weights
    i, f, g, o = (w_x @ x + b_x + w_h @ h + b_h).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(x: Tensor, h: Tensor, weights: list[Tensor]) -> Tensor:
    w_x, w_h, b_x, b_h = weights
    (r_x, z_x, n_x), (r_h, z_h, n_h) = (w_x @ x + b_x).chunk(3), (w_h @ h + b_h).chunk(3)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    return (1 - z) * torch.tanh(n_x + r * n_h) + z * h


def layer_weights(network: nn.Module, layer: int) -> list[Tensor]:
    return [
        network.get_parameter(f"layers.{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_network_agrees_with_its_equations_and_remembers_its_last_states(kind: Any) -> None:
    network, x = make(RecurrentConfig(d_input=3, d_hidden=4, kind=kind), 2), draw(2, 5, 3)
    value, memory = network(x)[:2]
    zero = torch.zeros(4, dtype=x.dtype)
    for b in range(2):
        states: list[Any] = [(zero, zero) if kind == "lstm" else zero] * 2
        for t in range(5):
            features = x[b, t]
            for layer in range(2):
                weights = layer_weights(network, layer)
                if kind == "lstm":
                    states[layer] = lstm_step(features, states[layer], weights)
                    features = states[layer][0]
                else:
                    features = states[layer] = gru_step(features, states[layer], weights)
            torch.testing.assert_close(value[b, t], features, rtol=1e-10, atol=1e-12)
        for layer in range(2):
            last = (memory[0][b, layer], memory[1][b, layer]) if kind == "lstm" else memory[b, layer]
            torch.testing.assert_close(last, states[layer], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_dropout_acts_in_training_alone_and_not_on_the_memory(kind: Any, depth: int) -> None:
    network, x = make(RecurrentConfig(d_input=3, d_hidden=50, kind=kind, dropout=0.4), depth), draw(2, 8, 3)
    value, memory = network(x)[:2]
    assert 0.3 < float((value == 0.0).double().mean()) < 0.5
    assert all((leaf != 0.0).all() for leaf in pytree.tree_leaves(memory))
    # Between the layers too: the states of the second layer are other ones at each call.
    again = pytree.tree_leaves(network(x).memory)[0]
    assert torch.equal(again, pytree.tree_leaves(memory)[0]) == (depth == 1)
    network.eval()
    assert (network(x).value != 0.0).all()
    assert torch.equal(network(x).value, network(x).value)


# --- sizes of table 1 ------------------------------------------------------------------------------------------------


def num_params(network: nn.Module, *, d_input: int, d_hidden: int) -> int:
    """With an embedding of ten symbols before, and a softmax of ten after."""
    return sum(p.numel() for p in network.parameters()) + 10 * d_input + 10 * d_hidden + 10


@pytest.mark.parametrize(
    ("config", "depth", "expected"),
    [
        (TCNConfig(d_input=10, d_hidden=11, kernel_size=8), 8, 16_093),
        (RecurrentConfig(d_input=10, d_hidden=52, kind="lstm"), 1, 13_942),
        (RecurrentConfig(d_input=10, d_hidden=61, kind="gru"), 1, 14_079),
    ],
)
def test_widths_that_give_the_sizes_of_table_1(config: Any, depth: int, expected: int) -> None:
    """16K, 14K and 14K parameters; counted layer by layer."""
    e, h = config.widths
    assert num_params(make(config, depth), d_input=e, d_hidden=h) == expected
    if isinstance(config, TCNConfig):
        # Taps, bias and norm of each output channel; two convolutions a block, and the skip of the first.
        counted = (8 * e * h + 2 * h) + (2 * depth - 1) * (8 * h * h + 2 * h) + (e * h + h)
    else:
        counted = (4 if config.kind == "lstm" else 3) * (e * h + h * h + 2 * h)
    assert counted + 10 * e + 10 * h + 10 == expected
