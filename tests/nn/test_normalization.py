"""Normalized weights: their bounds, names and gradients, and what training and files do to them."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations

import deepeq
from deepeq.nn import (
    OncePerSolve,
    hold_weights,
    infinity_norm,
    spectral_norm,
    weight_norm,
)
from tests.nn.parts import EXACT, NORMALIZATIONS, Cell, gradients, spectral, x_of

# What the normalizations compute


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (1, 4), (4, 1)])
def test_spectral_norm_is_that_of_a_dense_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    linear = nn.Linear(shape[1], shape[0], dtype=dtype)
    original = linear.weight.detach().clone()
    spectral_norm(linear, bound=0.7, clip=False, num_steps=200)
    torch.testing.assert_close(linear.weight, original * (0.7 / spectral(original)))
    assert spectral(linear.weight) == pytest.approx(0.7, rel=1e-9 if dtype == torch.float64 else 1e-5)


def test_spectral_estimate_follows_a_weight_that_is_trained() -> None:
    linear = nn.Linear(40, 30, dtype=torch.float64)
    spectral_norm(linear, bound=0.9, num_steps=5)
    optimizer = torch.optim.SGD(linear.parameters(), lr=6.0)
    target = torch.randn(30, 40, dtype=torch.float64)
    norms = []
    for _ in range(150):
        optimizer.zero_grad()
        weight = linear.weight
        norms.append(spectral(weight))
        (weight - target).square().mean().backward()
        optimizer.step()
    assert spectral(linear.parametrizations.weight.original) > 1.0, "the bound never mattered"
    assert max(norms) < 0.9 * 1.01
    for _ in range(100):
        weight = linear.weight
    assert spectral(weight) == pytest.approx(0.9, rel=1e-9)


def test_spectral_gradient_is_that_of_the_exact_norm() -> None:
    linear = nn.Linear(5, 4, bias=False, dtype=torch.float64)
    spectral_norm(linear, bound=0.5, clip=False, num_steps=300)
    original, direction = linear.parametrizations.weight.original, torch.randn(4, 5, dtype=torch.float64)
    exact = 0.5 * original / torch.linalg.matrix_norm(original, ord=2)
    torch.testing.assert_close(
        torch.autograd.grad((linear.weight * direction).sum(), original),
        torch.autograd.grad((exact * direction).sum(), original),
    )


@pytest.mark.parametrize("clip", [True, False])
def test_infinity_norm_scales_rows(clip: bool) -> None:
    linear = nn.Linear(7, 3, dtype=torch.float64)
    rows = torch.randn(3, 7, dtype=torch.float64)
    rows *= torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64).unsqueeze(1) / rows.abs().sum(1, keepdim=True)
    with torch.no_grad():
        linear.weight.copy_(rows)
    infinity_norm(linear, bound=0.9, clip=clip)
    sums = linear.weight.abs().sum(1)
    expected = torch.tensor([0.2 if clip else 0.9, 0.9, 0.9], dtype=torch.float64)
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(linear.weight / linear.weight.abs().sum(1, keepdim=True), rows / rows.abs().sum(1, True))
    if clip:
        assert torch.equal(linear.weight[0], rows[0])


@pytest.mark.parametrize("normalize", [spectral_norm, infinity_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clip_leaves_a_small_weight_bit_identical(normalize: Callable[..., Any], dtype: torch.dtype) -> None:
    linear = nn.Linear(9, 6, dtype=dtype)
    original = linear.weight.detach().clone()
    normalize(linear, bound=50.0)
    assert torch.equal(linear.weight, original)
    (gradient,) = torch.autograd.grad(linear.weight.sum(), linear.parametrizations.weight.original)
    assert torch.equal(gradient, torch.ones_like(gradient)), "the gradient of an unscaled weight passes unchanged"
    linear = nn.Linear(9, 6, dtype=dtype)
    original = linear.weight.detach().clone()
    normalize(linear, bound=50.0, clip=False)
    assert linear.weight.abs().sum() > 2 * original.abs().sum()


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalization_passes_gradcheck(name: str) -> None:
    module = nn.Linear(4, 3, dtype=torch.float64)
    NORMALIZATIONS[name](module)
    names, values = zip(*module.named_parameters(), strict=True)
    x = x_of(2, 4)
    with torch.no_grad():  # at its fixed point, the vector of the power iteration is the constant that it is taken for
        for _ in range(100):
            module(x)
    module.eval()

    def f(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, values)


def test_convolution_is_bounded_up_to_the_root_of_its_kernel_positions() -> None:
    size, bound = 6, 0.8
    for layer, dim in ((nn.Conv2d(2, 3, 3, padding=1), 0), (nn.ConvTranspose2d(2, 3, 3, padding=1), 1)):
        layer = layer.double()
        original = layer.weight.detach().clone()
        spectral_norm(layer, bound=bound, clip=False, num_steps=100)
        rows = layer.weight.detach().movedim(dim, 0)
        assert spectral(rows) == pytest.approx(bound, rel=1e-9)
        torch.testing.assert_close(layer.weight * original.norm() / layer.weight.norm(), original)
        inputs = torch.eye(2 * size * size, dtype=torch.float64).view(-1, 2, size, size)
        operator = (layer(inputs) - layer.bias.view(-1, 1, 1)).flatten(1)
        assert spectral(operator) <= 3 * bound


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_infinity_norm_bounds_convolutions_without_a_factor(mode: str) -> None:
    size = 6
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, dtype=torch.float64)
    infinity_norm(layer, bound=0.8, clip=False)
    inputs = torch.eye(2 * size * size, dtype=torch.float64).view(-1, 2, size, size)
    operator = (layer(inputs) - layer.bias.view(-1, 1, 1)).flatten(1).T
    norm = operator.abs().sum(1).max().item()
    assert norm <= 0.8 + 1e-12
    assert norm == pytest.approx(0.8) or mode in ("reflect", "replicate")


def test_weight_norm_is_g_times_the_direction() -> None:
    for layer, dims in ((nn.Linear(4, 3), [1]), (nn.Conv2d(4, 3, 2), [1, 2, 3]), (nn.ConvTranspose1d(4, 3, 2), [0, 2])):
        original = layer.weight.detach().clone()
        weight_norm(layer)
        torch.testing.assert_close(layer.weight, original)
        g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        nn.init.uniform_(g, 1.0, 2.0)
        nn.init.normal_(v)
        torch.testing.assert_close(layer.weight, g * v / v.square().sum(dims, keepdim=True).sqrt())


def test_names_choose_the_weights() -> None:
    def plain() -> list[str]:
        return [name for name, _ in cell.named_parameters()]

    cell = Cell()
    spectral_norm(cell, "first.weight", bound=0.9)
    assert plain() == ["first.bias", "first.parametrizations.weight.original", "second.weight", "second.bias"]
    cell = Cell()
    infinity_norm(cell, ["second.weight", "second.weight"], bound=0.9)
    assert len(cell.second.parametrizations.weight) == 1
    assert "second.parametrizations.weight.original" in plain()
    assert "first.weight" in plain()
    attention = nn.MultiheadAttention(8, 2)
    spectral_norm(attention, ["in_proj_weight", "out_proj.weight"], bound=0.5, clip=False)
    x = torch.randn(3, 2, 8)
    held = hold_weights(attention)
    out, _ = held(x, x, x)
    out.sum().backward()
    assert attention.parametrizations.in_proj_weight.original.grad is not None


def test_normalizations_stack() -> None:
    linear = nn.Linear(6, 6, dtype=torch.float64)
    spectral_norm(weight_norm(linear), bound=0.4, clip=False, num_steps=200)
    assert spectral(linear.weight) == pytest.approx(0.4)
    assert {"original0", "original1"} <= {name.rsplit(".", 1)[-1] for name, _ in linear.named_parameters()}


def test_mistakes_are_named() -> None:
    cell = Cell()
    before = list(cell.state_dict())
    for bound in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"bound={bound!r} must be a number > 0"):
            spectral_norm(cell, bound=bound)
        with pytest.raises(ValueError, match=f"bound={bound!r} must be a number > 0"):
            infinity_norm(cell, bound=bound)
    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"num_steps={steps!r} must be a whole number >= 1"):
            spectral_norm(cell, bound=1.0, num_steps=steps)  # pyright: ignore[reportArgumentType]
    for name in ("third.weight", "first.wait", "first.weight.data"):
        with pytest.raises(ValueError, match=f"names has '{name}', but Cell has no such tensor"):
            spectral_norm(cell, ["first.weight", name], bound=1.0)
    for name in ("first.bias", "first.in_features", "training"):
        with pytest.raises(ValueError, match=f"names has '{name}', which must be a real weight"):
            infinity_norm(cell, ["first.weight", name], bound=1.0)
    with pytest.raises(ValueError, match="ReLU has no linear or convolutional layer"):
        weight_norm(nn.ReLU())
    assert list(cell.state_dict()) == before, "a refused call changes nothing"
    weight_norm(cell, "first.weight")
    with pytest.raises(ValueError, match="weight of ParametrizedLinear is parametrized already"):
        weight_norm(cell, "first.weight")
    nn.init.zeros_(cell.second.weight[0])
    with pytest.raises(ValueError, match="an output channel of zeros"):
        weight_norm(cell, "second.weight")
    fresh = Cell()
    nn.init.zeros_(fresh.second.weight[0])
    with pytest.raises(ValueError, match="an output channel of zeros"):
        weight_norm(fresh)
    assert list(fresh.state_dict()) == before
    with pytest.raises(TypeError, match="cell must be a torch.nn.Module"):
        OncePerSolve(lambda z, x: z)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"memory was given, but Cell has no inject\(x, memory\)"):
        OncePerSolve(Cell()).inject(x_of(), x_of())


def test_registering_draws_no_random_numbers() -> None:
    cell = Cell()
    state = torch.get_rng_state()
    for normalize in NORMALIZATIONS.values():
        normalize(copy.deepcopy(cell))
    assert torch.equal(torch.get_rng_state(), state)


def test_zero_and_broken_weights_do_not_spoil_the_estimate() -> None:
    linear = nn.Linear(6, 40, dtype=torch.float64)
    weight = linear.weight.detach().clone()
    nn.init.zeros_(linear.weight)
    spectral_norm(linear, bound=0.5, clip=False)
    original = linear.parametrizations.weight.original
    assert torch.equal(linear.weight, torch.zeros_like(weight))
    (gradient,) = torch.autograd.grad(linear.weight.sum(), original)
    assert gradient.isfinite().all()
    with torch.no_grad():
        original.fill_(math.nan)
        assert linear.weight.isnan().all()
        original.copy_(weight)
    assert spectral(linear.weight) == pytest.approx(0.5)


# Modes, copies, files


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_evaluation_mode_changes_nothing(name: str) -> None:
    cell = Cell()
    NORMALIZATIONS[name](cell)
    layer = deepeq.DEQ(OncePerSolve(cell)).eval()
    before = copy.deepcopy(layer.state_dict())
    x = x_of()
    assert torch.equal(layer(x).value, layer(x).value)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_training_updates_the_vector_once_per_solve() -> None:
    cell = Cell(40)
    spectral_norm(cell, bound=0.5, num_steps=1)
    reference = copy.deepcopy(cell)
    layer = deepeq.DEQ(OncePerSolve(cell), **EXACT)
    with torch.no_grad():
        reference.first.parametrizations.weight[0].train()(reference.first.parametrizations.weight.original)
    start = cell.first.parametrizations.weight[0].vectors.clone()
    solution = layer(x_of(4, 40))
    solution.value.sum().backward()
    vector = cell.first.parametrizations.weight[0].vectors
    assert solution.num_evals > 5
    assert not torch.equal(vector, start)
    assert torch.equal(vector, reference.first.parametrizations.weight[0].vectors)


def test_evaluation_continues_where_training_ended() -> None:
    linear = nn.Linear(30, 30, dtype=torch.float64)
    spectral_norm(linear, bound=0.3, num_steps=1)
    evaluated = copy.deepcopy(linear).eval().weight
    assert torch.equal(linear.weight, evaluated), "the mode only says whether the vector is kept"
    assert not torch.equal(linear.weight, evaluated)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_copies_and_files_give_the_same_and_are_apart(name: str) -> None:
    def make() -> deepeq.DEQ:
        cell = Cell()
        NORMALIZATIONS[name](cell)
        return deepeq.DEQ(OncePerSolve(cell), **EXACT)

    layer, x = make(), x_of()
    layer(x)  # so that the copy is one of a layer that has been used
    clone, loaded = copy.deepcopy(layer).eval(), make().eval()
    loaded.load_state_dict(layer.state_dict())
    expected = layer.eval()(x).value
    assert torch.equal(clone(x).value, expected)
    assert torch.equal(loaded(x).value, expected)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(-0.5)
    assert not torch.equal(clone(x).value, expected)
    assert torch.equal(layer(x).value, expected)
    grads = gradients(clone(x).value.sum(), clone)
    assert all(grad.abs().sum() > 0 for grad in grads if name == "weight")
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_an_updated_or_loaded_weight_is_never_stale() -> None:
    cell = Cell()
    spectral_norm(cell, bound=0.5)
    layer, x = deepeq.DEQ(OncePerSolve(cell), **EXACT), x_of()
    first = layer(x).value
    with torch.no_grad():
        cell.first.parametrizations.weight.original.neg_()
    assert not torch.allclose(layer(x).value, first)
    other = Cell()
    spectral_norm(other, bound=0.5)
    layer.load_state_dict(deepeq.DEQ(OncePerSolve(other)).state_dict())
    torch.testing.assert_close(layer(x).value, deepeq.DEQ(OncePerSolve(other), **EXACT)(x).value)


def test_normalizations_can_be_removed_after_a_solve() -> None:
    cell = Cell()
    spectral_norm(cell, bound=0.5)
    layer, x = deepeq.DEQ(OncePerSolve(cell), **EXACT).eval(), x_of()
    before = layer(x).value
    for linear in (cell.first, cell.second):
        remove_parametrizations(linear, "weight")
    assert type(cell.first) is nn.Linear
    torch.testing.assert_close(layer(x).value, before)
    infinity_norm(cell, bound=0.1)
    assert not torch.allclose(layer(x).value, before)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_conversion_to_another_type_keeps_the_bound(name: str) -> None:
    linear = nn.Linear(16, 16, dtype=torch.float64)
    NORMALIZATIONS[name](linear)
    expected = linear.weight.detach()
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        linear.to(dtype)
        assert linear.weight.dtype == dtype
        torch.testing.assert_close(linear.weight.double(), expected, rtol=rtol, atol=rtol)


def test_modules_can_be_built_without_storage() -> None:
    with torch.device("meta"):
        cell = Cell()
        for normalize in (weight_norm, NORMALIZATIONS["spectral"]):
            normalize(cell)
    real = Cell()
    for normalize in (weight_norm, NORMALIZATIONS["spectral"]):
        normalize(real)
    cell.load_state_dict(real.state_dict(), assign=True)
    x = x_of()
    assert torch.equal(deepeq.DEQ(OncePerSolve(cell)).eval()(x).value, deepeq.DEQ(OncePerSolve(real)).eval()(x).value)
