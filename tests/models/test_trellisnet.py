"""The trellis network against its equations, step by step."""

import copy

import pytest
import torch
from torch import Tensor

import deepeq
from deepeq.models import TrellisCell, TrellisConfig, TrellisMemory

SIZES = {"d_input": 3, "d_hidden": 5, "d_output": 2, "init_std": 0.3}


def make_cell(**values: object) -> TrellisCell:
    cell = TrellisCell(TrellisConfig(**{**SIZES, **values}))  # pyright: ignore[reportArgumentType]
    torch.nn.init.normal_(cell.injection.bias, std=0.3)
    return cell.double()


def random_inputs(cell: TrellisCell, batch_size: int = 2, length: int = 6) -> tuple[Tensor, tuple, TrellisMemory]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, dtype=torch.float64)

    history = cell.history_len
    return (
        draw(length, 3),
        (draw(length, 5), draw(length, 5)),
        TrellisMemory(draw(history, 3), draw(history, 5), draw(history, 5)),
    )


def reference(cell: TrellisCell, z: tuple, x: Tensor, memory: TrellisMemory) -> tuple[Tensor, Tensor]:
    """One application, position by position and tap by tap, from the equations of the paper."""
    taps, dilation, history = cell.config.kernel_size, cell.config.dilation, cell.history_len
    num_input, num_hidden = cell.config.d_input, cell.config.d_hidden
    h_all, c_all, x_all = (torch.cat(parts, dim=1) for parts in ((memory.h, z[0]), (memory.c, z[1]), (memory.x, x)))
    h_new, c_new = torch.empty_like(z[0]), torch.empty_like(z[1])
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            gates = cell.injection.bias.clone()
            for tap in range(taps):
                position = history + t - (taps - 1 - tap) * dilation
                gates += cell.injection.weight[:, tap * num_input : (tap + 1) * num_input] @ x_all[b, position]
                gates += cell.convolution.weight[:, tap * num_hidden : (tap + 1) * num_hidden] @ h_all[b, position]
            i, o, g, f = (gates[k * num_hidden : (k + 1) * num_hidden] for k in range(4))
            c = torch.sigmoid(f) * c_all[b, history + t - dilation] + torch.sigmoid(i) * torch.tanh(g)
            c_new[b, t], h_new[b, t] = c, torch.sigmoid(o) * torch.tanh(c)
    return h_new, c_new


@pytest.mark.parametrize(("kernel_size", "dilation"), [(2, 1), (3, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("weight_norm", [True, False])
def test_cell_agrees_with_the_loop_written_reference(kernel_size: int, dilation: int, weight_norm: bool) -> None:
    cell = make_cell(kernel_size=kernel_size, dilation=dilation, weight_norm=weight_norm)
    x, z, memory = random_inputs(cell)
    for actual, expected in zip(cell(z, cell.inject(x, memory)), reference(cell, z, x, memory), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_history_is_zero_without_a_memory() -> None:
    cell = make_cell(kernel_size=3)
    x, z, memory = random_inputs(cell)
    zeros = TrellisMemory(*(torch.zeros_like(part) for part in memory))
    for actual, expected in zip(cell(z, cell.inject(x)), cell(z, cell.inject(x, zeros)), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dilation", [1, 2])
def test_equilibrium_is_the_recurrence_computed_position_by_position(dilation: int) -> None:
    """At the equilibrium each position depends on itself and on earlier ones: solving them in turn gives the same."""
    cell = make_cell(dilation=dilation)
    x, _, _ = random_inputs(cell)
    solver = deepeq.FixedPointIteration(rtol=1e-13, max_steps=200)
    whole = deepeq.DEQ(cell, solver=solver)(x)
    assert whole.result is deepeq.Result.CONVERGED
    memory, outputs = None, []
    for t in range(x.shape[1]):
        step = deepeq.DEQ(cell, solver=solver)(x[:, t : t + 1], memory=memory)
        memory = cell.extend_memory(memory, x[:, t : t + 1], step.value)
        outputs.append(cell.output(step.value))
    torch.testing.assert_close(torch.cat(outputs, dim=1), cell.output(whole.value), rtol=1e-10, atol=1e-10)


def test_cell_is_causal() -> None:
    cell = make_cell()
    x, z, memory = random_inputs(cell)
    before = cell(z, cell.inject(x, memory))
    x[:, 3:], z[0][:, 3:], z[1][:, 3:] = 1.0, -1.0, 2.0
    after = cell(z, cell.inject(x, memory))
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new[:, :3], old[:, :3])
        assert not torch.allclose(new[:, 3:], old[:, 3:])


def test_output_is_the_last_channels_of_h() -> None:
    cell = make_cell()
    h = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(cell.output((h, torch.zeros_like(h))), h[:, :, 3:])


def test_memory_keeps_what_the_convolutions_see() -> None:
    cell = make_cell(kernel_size=3, dilation=2)
    x, z, memory = random_inputs(cell, length=3)
    extended = cell.extend_memory(memory, x, z)
    for kept, earlier, new in zip(extended, memory, (x, *z), strict=True):
        torch.testing.assert_close(kept, torch.cat([earlier, new], dim=1)[:, -4:])
    first = cell.extend_memory(None, x, z)
    assert first.h.shape == (2, 4, 5)
    assert not first.h[:, 0].any()


def test_gradient_through_the_equilibrium_matches_the_deep_stack() -> None:
    cell = make_cell(kernel_size=3)
    x, _, memory = random_inputs(cell)
    exact = deepeq.ImplicitAdjoint(solver=deepeq.GMRES(rtol=1e-12, max_steps=200, restart=200))
    layers = (
        deepeq.DEQ(cell, solver=deepeq.FixedPointIteration(rtol=1e-14, max_steps=300), adjoint=exact),
        deepeq.Unrolled(cell, 300),
    )
    gradients = []
    for layer in layers:
        inputs = x.clone().requires_grad_()
        loss = cell.output(layer(inputs, memory=memory).value).square().sum()
        gradients.append(torch.autograd.grad(loss, [inputs, *cell.parameters()]))
    for implicit, unrolled in zip(*gradients, strict=True):
        torch.testing.assert_close(implicit, unrolled, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("weight_dropout", [0.0, 0.4])
def test_map_does_not_change_during_a_solve_though_masks_do_between_solves(weight_dropout: float) -> None:
    cell = make_cell(hidden_dropout=0.5, weight_dropout=weight_dropout)
    x, z, memory = random_inputs(cell)
    injection = cell.inject(x, memory)
    first, second = cell(z, injection), cell(z, injection)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.allclose(first[0], cell(z, cell.inject(x, memory))[0])
    cell.eval()
    torch.testing.assert_close(cell(z, cell.inject(x, memory)), cell(z, cell.inject(x, memory)), rtol=0, atol=0)


def test_hidden_dropout_hides_channels_of_h_at_all_positions() -> None:
    cell = make_cell(hidden_dropout=0.5)
    x, z, memory = random_inputs(cell)
    injection = cell.inject(x, memory)
    assert injection.mask is not None
    assert set(injection.mask.unique().tolist()) == {0.0, 2.0}
    before = cell(z, injection)
    hidden = injection.mask.expand_as(z[0]) == 0
    changed = (torch.where(hidden, z[0] + 1.0, z[0]), z[1])
    torch.testing.assert_close(cell(changed, injection), before)


def test_weights_are_normalized_once_per_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = make_cell()
    x, _, _ = random_inputs(cell)
    parametrization = cell.convolution.parametrizations.weight[0]  # pyright: ignore
    calls, original = [], type(parametrization).forward
    monkeypatch.setattr(type(parametrization), "forward", lambda self, *a: calls.append(self) or original(self, *a))
    solution = deepeq.DEQ(cell, solver=deepeq.FixedPointIteration(rtol=1e-8, max_steps=50))(x)
    assert solution.num_evals > 5
    assert calls.count(parametrization) == 1


def test_weight_norm_survives_deepcopy_and_a_state_dict() -> None:
    cell = make_cell(weight_dropout=0.3).eval()
    x, z, memory = random_inputs(cell)
    expected = cell(z, cell.inject(x, memory))
    twin = copy.deepcopy(cell)
    torch.testing.assert_close(twin(z, twin.inject(x, memory)), expected)
    other = make_cell(weight_dropout=0.3).eval()
    assert not torch.allclose(other(z, other.inject(x, memory))[0], expected[0])
    other.load_state_dict(cell.state_dict())
    torch.testing.assert_close(other(z, other.inject(x, memory)), expected)


def test_weights_start_with_the_standard_deviation_of_the_paper() -> None:
    for weight_norm in (True, False):
        cell = TrellisCell(TrellisConfig(d_input=64, d_hidden=128, d_output=64, weight_norm=weight_norm))
        for layer in (cell.injection, cell.convolution):
            assert layer.weight.std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"d_hidden": 0, "kernel_size": 1},
            "d_hidden=0 must be a whole number >= 1; kernel_size=1 must be a whole number >= 2",
        ),
        ({"d_output": 6}, "d_output=6 must be <= d_hidden=5"),
        ({"weight_dropout": 1.0}, r"weight_dropout=1.0 must lie in \[0, 1\)"),
        ({"init_std": 0.0}, "init_std=0.0 must be > 0 and finite"),
    ],
)
def test_values_out_of_range_are_named_together(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrellisConfig(**{**SIZES, **values})  # pyright: ignore[reportArgumentType]
