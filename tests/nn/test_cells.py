import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import deepeq
from deepeq.nn import AttentionCell, ConvCell, DenseCell

SHAPES = {"dense": (12,), "conv2": (3, 6, 5), "conv1": (3, 12), "post": (7, 6), "pre": (7, 6), "positions": (7, 6)}
MAKERS = {
    "dense": partial(DenseCell, 12),
    "conv2": partial(ConvCell, 3),
    "conv1": partial(ConvCell, 3, dims=1, groups=4),
    "post": partial(AttentionCell, 6, norm="post"),
    "pre": partial(AttentionCell, 6, norm="pre"),
    "positions": partial(AttentionCell, 6, positions="sinusoidal", causal=True),
}
KINDS = pytest.mark.parametrize("kind", list(MAKERS))


def solve(cell: nn.Module, x: Tensor) -> deepeq.Solution:
    """Solve with the default solver and adjoint, and take gradients."""
    cell.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # forward and backward solves that miss their tolerance warn
        solution = deepeq.DEQ(cell)(x)
        solution.value.pow(3).sum().backward()
    return solution


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_new_cells_converge_for_inputs_of_any_scale(kind: str, dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    for width in (16, 128):
        cell = MAKERS[kind](width).to(dtype)
        solution = solve(cell, scale * torch.randn(4, *SHAPES[kind], dtype=dtype))
        assert solution.converged.all()
        assert solution.num_steps.max() <= 8
        assert solution.value.dtype == dtype


@KINDS
@pytest.mark.parametrize(("width", "batch_size"), [(512, 1), (32, 256), (512, 16)])
def test_new_cells_converge_at_any_size(kind: str, width: int, batch_size: int) -> None:
    torch.manual_seed(1)
    shape = SHAPES[kind] if kind != "conv2" else (3, 3, 3)
    solution = solve(MAKERS[kind](width), torch.randn(batch_size, *shape))
    assert solution.converged.all()
    assert solution.num_steps.max() <= 8


@KINDS
def test_blank_inputs_have_an_equilibrium(kind: str) -> None:
    torch.manual_seed(2)
    assert solve(MAKERS[kind](16), torch.zeros(2, *SHAPES[kind])).converged.all()


@KINDS
def test_new_cells_are_contractions(kind: str) -> None:
    torch.manual_seed(3)
    layer = deepeq.DEQ(MAKERS[kind](32))
    x = torch.randn(3, *SHAPES[kind])
    f, _ = layer.prepare(x)
    assert deepeq.spectral_radius(f, layer(x).value.detach(), num_steps=20).max() < 0.5


@pytest.mark.parametrize(
    ("kind", "lr"),
    [
        pytest.param(kind, lr, marks=[] if lr > 5e-3 and kind in ("dense", "conv2", "post") else pytest.mark.slow)
        for kind in MAKERS
        for lr in (1e-3, 1e-2)
    ],
)
def test_trained_cells_still_converge(kind: str, lr: float) -> None:
    torch.manual_seed(4)
    x = torch.randn(64, *SHAPES[kind])
    y = (x.flatten(1)[:, :4].argmax(dim=1) + (x.flatten(1).sum(dim=1) > 0)) % 4
    cell = MAKERS[kind](16)
    head = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    layer, parameters = deepeq.DEQ(cell, on_failure="ignore"), [*cell.parameters()]
    head(layer(x).value)
    optimizer = torch.optim.Adam([*parameters, *head.parameters()], lr=lr)
    losses, converged = [], []
    for step in range(120):
        rows = slice(32 * (step % 2), 32 * (step % 2) + 32)
        solution = layer(x[rows])
        loss = cross_entropy(head(solution.value), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        converged.append(solution.converged.float().mean().item())
    assert losses[-1] < 0.5 * losses[0]
    assert sum(converged) / len(converged) > 0.98
    assert layer(x).converged.float().mean() > 0.95


@KINDS
def test_gradients_are_those_of_backpropagation(kind: str) -> None:
    torch.manual_seed(5)
    cell = MAKERS[kind](16, gain=0.6).double()
    x = torch.randn(2, *SHAPES[kind], dtype=torch.float64, requires_grad=True)
    gradients = []
    for adjoint, solver in (
        (
            deepeq.ImplicitAdjoint(solver=deepeq.GMRES(rtol=1e-9, max_steps=100)),
            deepeq.Broyden(rtol=1e-10, max_steps=80),
        ),
        (deepeq.BackpropAdjoint(), deepeq.FixedPointIteration(rtol=1e-11, max_steps=200)),
    ):
        value = deepeq.DEQ(cell, solver=solver, adjoint=adjoint)(x).value
        gradients.append(torch.autograd.grad(value.pow(3).sum(), [x, *cell.parameters()]))
    for implicit, unrolled in zip(*gradients, strict=True):
        torch.testing.assert_close(implicit, unrolled, rtol=1e-6, atol=1e-8)


@KINDS
def test_injected_rows_can_be_taken(kind: str) -> None:
    torch.manual_seed(6)
    cell = MAKERS[kind](16, dropout=0.3)
    x, rows = torch.randn(5, *SHAPES[kind]), torch.tensor([3, 0])
    for mode in (True, False):
        cell.train(mode)
        injection, z = cell.inject(x), torch.randn_like(cell.initial_state(x))
        torch.testing.assert_close(cell(z[rows], cell.take(injection, rows)), cell(z, injection)[rows])


@KINDS
def test_dropout_is_fixed_within_a_solve(kind: str) -> None:
    torch.manual_seed(7)
    cell = MAKERS[kind](16, dropout=0.5)
    x = torch.randn(3, *SHAPES[kind])
    f, z0 = deepeq.DEQ(cell).prepare(x)
    other, _ = deepeq.DEQ(cell).prepare(x)
    z = torch.randn_like(z0)
    assert torch.equal(f(z), f(z))
    assert not torch.equal(f(z), other(z))
    cell.eval()
    assert cell.inject(x).mask is None


@KINDS
def test_samples_do_not_see_each_other(kind: str) -> None:
    torch.manual_seed(8)
    layer = deepeq.DEQ(MAKERS[kind](16), solver=deepeq.Broyden(rtol=1e-6))
    x = torch.randn(4, *SHAPES[kind])
    torch.testing.assert_close(layer(x).value[1:2], layer(x[1:2]).value, rtol=1e-4, atol=1e-5)


def test_attention_without_positions_is_equivariant() -> None:
    torch.manual_seed(9)
    x, order = torch.randn(2, 7, 6), torch.randperm(7)
    for norm in ("post", "pre"):
        layer = deepeq.DEQ(AttentionCell(6, 16, norm=norm, gain=1.0), solver=deepeq.Broyden(rtol=1e-6))
        torch.testing.assert_close(layer(x[:, order]).value, layer(x).value[:, order], rtol=1e-3, atol=1e-4)
    layer = deepeq.DEQ(AttentionCell(6, 16, positions="sinusoidal"))
    assert (layer(x[:, order]).value - layer(x).value[:, order]).abs().max() > 0.1


def test_causal_attention_does_not_see_later_positions() -> None:
    torch.manual_seed(10)
    x = torch.randn(2, 7, 6)
    changed = torch.cat([x[:, :4], torch.randn(2, 3, 6)], dim=1)
    for causal in (True, False):
        layer = deepeq.DEQ(AttentionCell(6, 16, causal=causal, gain=1.0), solver=deepeq.Broyden(rtol=1e-6))
        difference = (layer(x).value - layer(changed).value).abs()[:, :4].max()
        assert (difference < 1e-4) == causal


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dense", {"hidden": 5}),
        ("dense", {"gain": 1.0}),
        ("conv2", {"hidden": 5}),
        ("conv2", {"gain": 1.0}),
        ("conv2", {"kernel_size": 5}),
        ("conv2", {"groups": 8}),
        ("post", {"hidden": 5}),
        ("post", {"gain": 1.0}),
        ("post", {"num_heads": 2}),
        ("post", {"norm": "pre"}),
        ("post", {"positions": "sinusoidal"}),
        ("post", {"causal": True}),
    ],
)
def test_every_option_changes_the_computation(kind: str, options: dict[str, object]) -> None:
    values = []
    for chosen in ({}, options):
        torch.manual_seed(11)
        make = MAKERS[kind]
        cell = make.func(*make.args, 16, **(make.keywords | chosen))
        torch.manual_seed(12)
        values.append(deepeq.DEQ(cell)(torch.randn(2, *SHAPES[kind])).value)
    assert (values[0] - values[1]).abs().max() > 1e-2


def test_the_first_weights_have_the_size_of_gain() -> None:
    for cell in (DenseCell(9, 64, gain=0.2), ConvCell(3, 32, gain=0.2), AttentionCell(9, 64, gain=0.2)):
        weight = cell.outer.weight
        assert weight.std().item() == pytest.approx(0.2 * weight[0].numel() ** -0.5, rel=0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DenseCell(0, 8), "d_in=0 of DenseCell"),
        (lambda: DenseCell(8, 2.5), "width=2.5 of DenseCell"),
        (lambda: DenseCell(8, 8, hidden=0), "hidden=0 of DenseCell"),
        (lambda: DenseCell(8, 8, gain=0.0), "gain=0.0 of DenseCell"),
        (lambda: DenseCell(8, 8, dropout=1.0), "dropout=1.0 of DenseCell"),
        (lambda: ConvCell(3, 8, dims=3), "dims=3"),
        (lambda: ConvCell(3, 8, kernel_size=4), "kernel_size=4 of ConvCell must be odd"),
        (lambda: ConvCell(3, 8, groups=3), "groups=3 of ConvCell must divide width=8"),
        (lambda: AttentionCell(3, 8, num_heads=3), "num_heads=3 of AttentionCell must divide width=8"),
        (lambda: AttentionCell(3, 8, norm="both"), "norm='both'"),
        (lambda: AttentionCell(3, 8, positions="learned"), "positions='learned'"),
        (lambda: AttentionCell(3, 9, num_heads=3, positions="sinusoidal"), "width=9 of AttentionCell must be even"),
        (lambda: deepeq.DEQ(DenseCell(8, 8))(torch.zeros(2, 9)), r"\(B, D\) with D=8, got \(2, 9\)"),
        (lambda: deepeq.DEQ(DenseCell(8, 8))(torch.zeros(8)), r"\(B, D\) with D=8, got \(8,\)"),
        (lambda: deepeq.DEQ(ConvCell(8, 8))(torch.zeros(2, 3, 4, 4)), r"\(B, D, H, W\) with D=8"),
        (lambda: deepeq.DEQ(ConvCell(8, 8, dims=1))(torch.zeros(2, 3, 4)), r"\(B, D, L\) with D=8"),
        (lambda: deepeq.DEQ(AttentionCell(8, 8))(torch.zeros(2, 3, 4)), r"\(B, T, D\) with D=8"),
        (
            lambda: deepeq.DEQ(DenseCell(8, 8))(torch.zeros(2, 8), memory=torch.zeros(2)),
            "memory was given, but DenseCell",
        ),
    ],
)
def test_errors_name_the_field(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_inputs_must_be_floating_point_tensors() -> None:
    with pytest.raises(TypeError, match=r"x must be a tensor of floating-point numbers \(B, D\), got torch.int64"):
        deepeq.DEQ(DenseCell(8, 8))(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="got list"):
        DenseCell(8, 8).inject([1.0])
