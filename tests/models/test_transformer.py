"""The cell against a version written with loops, and the properties that the paper asks of it."""

import math

import pytest
import torch
from torch import Tensor

import deepeq
from deepeq.models import Memory, TransformerCell, TransformerConfig
from deepeq.nn import relative_shift, sinusoidal_positions

CONFIG = TransformerConfig(d_model=8, num_heads=2, d_inner=12, memory_len=5)


@pytest.fixture
def cell() -> TransformerCell:
    """A small cell whose biases are not zero, in float64."""
    cell = TransformerCell(CONFIG).double()
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return cell


@pytest.fixture
def contractive_cell() -> TransformerCell:
    """A cell whose plain iteration converges, because the injected values outweigh the residual connection."""
    return make_contractive(TransformerCell(TransformerConfig(d_model=8, num_heads=2, d_inner=12, init_std=0.2)))


def make_contractive(cell: TransformerCell) -> TransformerCell:
    with torch.no_grad():
        cell.injection.weight[2 * cell.config.d_model :] *= 5
        cell.output.weight *= 4
    return cell.double()


def random_inputs(batch_size: int = 3, length: int = 4, memory_len: int = 5) -> tuple[Tensor, Tensor, Memory]:
    x, z = (torch.randn(batch_size, length, 8, dtype=torch.float64) for _ in range(2))
    memory = Memory(*(torch.randn(batch_size, memory_len, 8, dtype=torch.float64) for _ in range(2)))
    return x, z, memory


def layer_norm(h: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centered = h - h.mean()
    return centered / torch.sqrt((centered**2).mean() + norm.eps) * norm.weight + norm.bias


def position_encoding(distance: int, d_model: int) -> Tensor:
    angles = [distance / 10000 ** (2 * i / d_model) for i in range(d_model // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def reference(cell: TransformerCell, z: Tensor, x: Tensor, memory: Memory) -> Tensor:
    """One application of the block, position by position, head by head, from the equations of the paper."""
    d_model, num_heads = cell.config.d_model, cell.config.num_heads
    channels = d_model // num_heads
    out = torch.empty_like(z)
    for b in range(z.shape[0]):
        states, inputs = torch.cat([memory.z[b], z[b]]), torch.cat([memory.x[b], x[b]])
        injected = [cell.qkv.weight @ s + cell.injection.weight @ i for s, i in zip(states, inputs, strict=True)]
        start = memory.z.shape[1]
        for t in range(z.shape[1]):
            query = injected[start + t][:d_model]
            heads = []
            for head in range(num_heads):
                part = slice(head * channels, (head + 1) * channels)
                logits = []
                for j in range(start + t + 1):
                    key = injected[j][d_model : 2 * d_model][part]
                    position = (cell.position.weight @ position_encoding(start + t - j, d_model))[part]
                    content = (query[part] + cell.content_bias[head, 0]) @ key
                    logits.append((content + (query[part] + cell.position_bias[head, 0]) @ position) / channels**0.5)
                weights = torch.softmax(torch.stack(logits), dim=0)
                heads.append(sum(w * injected[j][2 * d_model :][part] for j, w in enumerate(weights)))
            h = layer_norm(z[b, t] + cell.output.weight @ torch.cat(heads), cell.attention_norm)
            first, _, second = cell.feed_forward
            inner = torch.relu(first.weight @ h + first.bias)
            out[b, t] = layer_norm(h + second.weight @ inner + second.bias, cell.feed_forward_norm)
    return out


@pytest.mark.parametrize("memory_len", [0, 1, 5])
def test_cell_agrees_with_the_loop_written_reference(cell: TransformerCell, memory_len: int) -> None:
    x, z, memory = random_inputs(memory_len=memory_len)
    actual = cell(z, cell.inject(x, memory))
    torch.testing.assert_close(actual, reference(cell, z, x, memory), rtol=1e-10, atol=1e-10)
    if memory_len == 0:
        torch.testing.assert_close(cell(z, cell.inject(x)), actual)


def test_relative_shift_puts_each_distance_at_its_key() -> None:
    num_queries, num_keys = 3, 5
    distances = torch.arange(num_keys - 1, -1, -1.0).expand(1, 1, num_queries, num_keys)
    shifted = relative_shift(distances)[0, 0]
    for i in range(num_queries):
        query = num_keys - num_queries + i
        assert shifted[i, : query + 1].tolist() == [float(query - j) for j in range(query + 1)]


def test_positions_count_down_to_zero_and_need_an_even_width() -> None:
    encodings = sinusoidal_positions(4, 6, like=torch.zeros(1, dtype=torch.float64))
    for row, distance in enumerate([3, 2, 1, 0]):
        torch.testing.assert_close(encodings[row], position_encoding(distance, 6), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="d_model=5"):
        sinusoidal_positions(4, 5, like=torch.zeros(1))


def test_cell_is_causal(cell: TransformerCell) -> None:
    x, z, memory = random_inputs()
    before = cell(z, cell.inject(x, memory))
    x[:, 2:], z[:, 2:] = 1.0, -1.0
    after = cell(z, cell.inject(x, memory))
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert not torch.allclose(after[:, 2:], before[:, 2:])


def test_every_memory_position_matters(cell: TransformerCell) -> None:
    x, z, memory = random_inputs()
    before = cell(z, cell.inject(x, memory))
    for part in memory:
        for position in range(5):
            kept = part[:, position].clone()
            part[:, position] += 1.0
            assert not torch.allclose(cell(z, cell.inject(x, memory)), before)
            part[:, position] = kept


def test_samples_do_not_mix(cell: TransformerCell) -> None:
    x, z, memory = random_inputs()
    together = cell(z, cell.inject(x, memory))
    alone = cell(z[1:2], cell.inject(x[1:2], Memory(memory.x[1:2], memory.z[1:2])))
    torch.testing.assert_close(together[1:2], alone)


def test_equilibrium_of_a_segment_equals_that_of_its_halves(contractive_cell: TransformerCell) -> None:
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    layer = deepeq.DEQ(contractive_cell, solver=deepeq.Anderson(rtol=1e-12, max_steps=200))
    whole = layer(x)
    first = layer(x[:, :4])
    memory = contractive_cell.extend_memory(None, x[:, :4], first.value)
    second = layer(x[:, 4:], memory=memory)
    assert whole.result is first.result is second.result is deepeq.Result.CONVERGED
    halves = torch.cat([first.value, second.value], dim=1)
    torch.testing.assert_close(halves, whole.value, rtol=1e-9, atol=1e-9)


def test_gradient_through_the_equilibrium_matches_the_deep_stack(contractive_cell: TransformerCell) -> None:
    cell = contractive_cell
    x, _, memory = random_inputs()
    weight = torch.randn_like(x)
    exact = deepeq.ImplicitAdjoint(solver=deepeq.GMRES(rtol=1e-12))
    gradients = []
    for layer in (
        deepeq.DEQ(cell, solver=deepeq.Anderson(rtol=1e-13, max_steps=200), adjoint=exact),
        deepeq.Unrolled(cell, 400),
    ):
        inputs = x.clone().requires_grad_()
        loss = (layer(inputs, memory=memory).value * weight).sum()
        gradients.append(torch.autograd.grad(loss, [inputs, *cell.parameters()]))
    for implicit, unrolled in zip(*gradients, strict=True):
        torch.testing.assert_close(implicit, unrolled, rtol=1e-6, atol=1e-9)


def test_memory_keeps_the_last_positions_without_gradients(cell: TransformerCell) -> None:
    x, z, memory = random_inputs()
    extended = cell.extend_memory(memory, x.requires_grad_(), z)
    assert extended is not None
    torch.testing.assert_close(extended.x, torch.cat([memory.x, x], dim=1)[:, -5:].detach())
    torch.testing.assert_close(extended.z, torch.cat([memory.z, z], dim=1)[:, -5:])
    assert not extended.x.requires_grad
    without = TransformerCell(TransformerConfig(d_model=8, num_heads=2, d_inner=12, memory_len=0))
    assert without.extend_memory(None, x, z) is None


def test_weights_start_with_the_standard_deviation_of_the_paper() -> None:
    cell = TransformerCell(TransformerConfig(d_model=64, num_heads=4, d_inner=256))
    for name, parameter in cell.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 10, "num_heads": 4}, "d_model=10 must be even and a multiple of num_heads=4"),
        ({"memory_len": -1, "d_inner": 0}, "d_inner=0 must be >= 1; memory_len=-1 must be >= 0"),
        ({"init_std": 0.0}, "init_std=0.0 must be > 0"),
    ],
)
def test_sizes_out_of_range_are_named_together(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**values)  # pyright: ignore[reportArgumentType]
