"""The cell against a version written with loops, and the properties that the paper asks of it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import deepeq
from deepeq.models import CellConfig, Memory, TransformerCell, TransformerConfig, TrellisConfig
from deepeq.nn import relative_shift, sinusoidal_positions

CONFIG = TransformerConfig(d_model=8, num_heads=2, d_inner=12)


@pytest.fixture
def cell() -> TransformerCell:
    """A small cell whose biases are not zero, in float64."""
    return make_cell()


@pytest.fixture
def contractive_cell() -> TransformerCell:
    """A cell whose plain iteration converges, because the injected values outweigh the residual connection."""
    return make_contractive(TransformerCell(TransformerConfig(d_model=8, num_heads=2, d_inner=12, init_std=0.2)))


def make_cell(*, injected: bool = True, **values: object) -> TransformerCell:
    config = replace(CONFIG, **values)  # pyright: ignore[reportArgumentType]
    cell = TransformerCell(config, injected=injected).double()
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return cell


def make_contractive(cell: TransformerCell) -> TransformerCell:
    with torch.no_grad():
        cell.injection.weight[2 * cell.config.d_model :] *= 5
        cell.output_projection.weight *= 4
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
    config, d_heads = cell.config, cell.config.d_heads
    channels, window = d_heads // config.num_heads, cell.config.window or 10**6

    def normalized(h: Tensor, norm: torch.nn.LayerNorm, where: str) -> Tensor:
        return layer_norm(h, norm) if config.norm == where else h

    out = torch.empty_like(z)
    for b in range(z.shape[0]):
        projected = []
        for state, inputs in zip(torch.cat([memory.z[b], z[b]]), torch.cat([memory.x[b], x[b]]), strict=True):
            part = cell.qkv.weight @ normalized(state, cell.attention_norm, "pre")
            projected.append(part if cell.injection is None else part + cell.injection.weight @ inputs)
        start = memory.z.shape[1]
        for t in range(z.shape[1]):
            query = projected[start + t][:d_heads]
            heads = []
            for head in range(config.num_heads):
                part = slice(head * channels, (head + 1) * channels)
                logits, values = [], []
                for j in range(max(0, start + t + 1 - window), start + t + 1):
                    key = projected[j][d_heads : 2 * d_heads][part]
                    position = (cell.position.weight @ position_encoding(start + t - j, config.d_model))[part]
                    content = (query[part] + cell.content_bias[head, 0]) @ key
                    logits.append((content + (query[part] + cell.position_bias[head, 0]) @ position) / channels**0.5)
                    values.append(projected[j][2 * d_heads :][part])
                weights = torch.softmax(torch.stack(logits), dim=0)
                heads.append(sum(w * value for w, value in zip(weights, values, strict=True)))
            attended = cell.output_projection.weight @ torch.cat(heads)
            h = normalized(z[b, t] + attended, cell.attention_norm, "post")
            inner = torch.relu(cell.inner.weight @ normalized(h, cell.feed_forward_norm, "pre") + cell.inner.bias)
            outer = cell.outer.weight @ inner + cell.outer.bias
            out[b, t] = normalized(h + outer, cell.feed_forward_norm, "post")
            if cell.output_norm is not None:
                out[b, t] = layer_norm(out[b, t].clone(), cell.output_norm)
    return out


VARIANTS = [
    {},
    {"norm": "pre"},
    {"head_dim": 3},
    {"window": 3},
    {"weight_norm": True},
    {"norm": "pre", "window": 1, "head_dim": 5},
]


@pytest.mark.parametrize("values", VARIANTS)
@pytest.mark.parametrize("injected", [True, False])
def test_every_variant_agrees_with_the_loop_written_reference(values: dict, injected: bool) -> None:
    cell = make_cell(injected=injected, **values)
    x, z, memory = random_inputs()
    actual = cell(z, cell.inject(x, memory if injected else memory._replace(x=memory.x[..., :0])))
    torch.testing.assert_close(actual, reference(cell, z, x, memory), rtol=1e-10, atol=1e-10)


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


def test_window_hides_what_lies_further_back() -> None:
    cell = make_cell(window=3)
    x, z, memory = random_inputs()
    before = cell(z, cell.inject(x, memory))
    for part in memory:
        part[:, :3] = 7.0  # more than two positions before the first query
    torch.testing.assert_close(cell(z, cell.inject(x, memory)), before)
    memory.z[:, 3] = 7.0
    assert not torch.allclose(cell(z, cell.inject(x, memory))[:, :1], before[:, :1])


def test_mask_is_made_once_per_solve_for_all_samples_and_heads(cell: TransformerCell) -> None:
    x, z, memory = random_inputs()
    injection = cell.inject(x, memory)
    assert injection.mask.shape == (4, 9)
    shapes: list = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("full", "triu", "tril", "arange", "bernoulli_", "masked_fill"):
                shapes.append(func)
            return func(*args, **(kwargs or {}))

    with Shapes():
        cell(z, injection)
    assert not shapes


def test_map_does_not_change_during_a_solve_though_masks_do_between_solves() -> None:
    cell = make_cell(hidden_dropout=0.3, attention_dropout=0.3)
    x, z, memory = random_inputs()
    injection = cell.inject(x, memory)
    torch.testing.assert_close(cell(z, injection), cell(z, injection), rtol=0, atol=0)
    assert not torch.allclose(cell(z, injection), cell(z, cell.inject(x, memory)))
    assert {part.shape for part in injection.dropped if part is not None} == {(3, 1, 8), (3, 1, 12), (3, 2, 4, 1)}
    cell.eval()
    expected = reference(cell, z, x, memory)
    torch.testing.assert_close(cell(z, cell.inject(x, memory)), expected, rtol=1e-10, atol=1e-10)


def test_attention_dropout_hides_values_of_the_memory_and_of_the_segment() -> None:
    cell = make_cell(attention_dropout=0.5)
    x, _, memory = random_inputs()
    injection = cell.inject(x, memory)
    assert injection.dropped.value is not None
    for values in (injection.dropped.value, (injection.memory_value != 0).any(dim=3)):
        share = (values == 0).double().mean().item()
        assert 0.0 < share < 1.0


def test_weights_are_normalized_once_per_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = make_cell(weight_norm=True)
    calls: list = []
    parametrization = cell.qkv.parametrizations.weight[0]  # pyright: ignore
    original = type(parametrization).forward
    monkeypatch.setattr(type(parametrization), "forward", lambda self, *a: calls.append(self) or original(self, *a))
    x, _, memory = random_inputs()
    deepeq.DEQ(cell, solver=deepeq.Broyden(rtol=1e-4))(x, memory=memory)
    assert calls.count(parametrization) == 1


@pytest.mark.parametrize(("eval_memory_len", "expected"), [(9, 9), (None, 7), (0, 0)])
def test_memory_length_depends_on_the_phase(eval_memory_len: int | None, expected: int) -> None:
    cell = make_cell(memory_len=7, eval_memory_len=eval_memory_len)
    assert cell.memory_length() == 7
    assert cell.eval().memory_length() == expected


def test_every_memory_position_matters(cell: TransformerCell) -> None:
    x, z, memory = random_inputs()
    before = cell(z, cell.inject(x, memory))
    for part in memory:
        for position in range(5):
            kept = part[:, position].clone()
            part[:, position] += 1.0
            assert not torch.allclose(cell(z, cell.inject(x, memory)), before)
            part[:, position] = kept


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize(
    "solver", [deepeq.Broyden(rtol=1e-8, max_steps=200), deepeq.Anderson(rtol=1e-8, max_steps=200)]
)
def test_equilibrium_of_either_norm_is_one_of_bounded_size(norm: str, solver: deepeq.Solver) -> None:
    config = replace(CONFIG, norm=norm, init_std=0.2)  # pyright: ignore[reportArgumentType]
    cell = make_contractive(TransformerCell(config))
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    z = deepeq.DEQ(cell, solver=solver)(x).value
    torch.testing.assert_close(cell(z, cell.inject(x)), z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z.square().mean(dim=2), torch.ones(2, 6, dtype=torch.float64), rtol=0.01, atol=0)


def test_memory_is_no_longer_than_the_window_sees() -> None:
    x, z, memory = random_inputs()
    extended = make_cell(window=3).extend_memory(memory, x, z)
    assert extended is not None
    torch.testing.assert_close(extended.z, z[:, -2:])
    assert make_cell(window=1).extend_memory(memory, x, z) is None
    whole, cell = torch.cat([memory.z, z], dim=1), make_cell(window=3)
    together = cell(whole, cell.inject(torch.cat([memory.x, x], dim=1)))
    kept = cell.extend_memory(None, memory.x, memory.z)
    torch.testing.assert_close(cell(z, cell.inject(x, kept)), together[:, 5:])


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


def test_memory_keeps_the_last_positions_with_their_gradients(cell: TransformerCell) -> None:
    x, z, memory = random_inputs()
    extended = cell.extend_memory(memory, x.requires_grad_(), z, length=5)
    assert extended is not None
    torch.testing.assert_close(extended.x, torch.cat([memory.x, x], dim=1)[:, -5:])
    torch.testing.assert_close(extended.z, torch.cat([memory.z, z], dim=1)[:, -5:])
    assert extended.x.requires_grad
    everything = cell.extend_memory(memory, x, z)
    assert everything is not None
    assert everything.z.shape[1] == 9
    assert cell.extend_memory(memory, x, z, length=0) is None


def test_weights_start_with_the_standard_deviation_of_the_paper() -> None:
    cell = TransformerCell(TransformerConfig(d_model=64, num_heads=4, d_inner=256))
    for name, parameter in cell.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 10, "num_heads": 4}, "d_model=10 must be a multiple of num_heads=4, or head_dim be given"),
        ({"d_model": 9, "num_heads": 3}, "d_model=9 must be even"),
        ({"window": 0}, "window=0 must be a whole number >= 1"),
        ({"norm": "middle"}, "norm='middle' must be 'post' or 'pre'"),
        (
            {"memory_len": -1, "d_inner": 0},
            "memory_len=-1 must be a whole number >= 0; d_inner=0 must be a whole number >= 1",
        ),
        ({"init_std": 0.0}, "init_std=0.0 must be > 0 and finite"),
    ],
)
def test_sizes_out_of_range_are_named_together(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**values)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("config", [TransformerConfig(d_model=16, init_std=0.2), TrellisConfig(d_input=16)])
def test_sequences_that_are_done_leave_the_solve(config: CellConfig) -> None:
    """With `take` as without it: values and steps, where six of eight sequences start at their equilibrium."""
    torch.manual_seed(3)
    cell = config.build().eval()
    cell = (make_contractive(cell) if isinstance(cell, TransformerCell) else cell).double()
    f, z0 = deepeq.DEQ(cell).prepare(torch.randn(8, 5, 16, dtype=torch.float64))
    options = {"solver": deepeq.Anderson(rtol=1e-5, max_steps=60), "on_failure": "raise", "verify": False}
    with torch.no_grad():
        found = deepeq.fixed_point(f, z0, **options).value
        z0 = tree_map(lambda z, start: torch.cat([z[:6], start[6:]]), found, z0)
        left = deepeq.fixed_point(f, z0, **options)
        whole = deepeq.fixed_point(lambda z: f(z), z0, **options)
    assert left.num_steps.max() > 4 * left.num_steps[:6].max()
    assert torch.equal(left.num_steps, whole.num_steps)
    for a, b in zip(tree_leaves(left.value), tree_leaves(whole.value), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
