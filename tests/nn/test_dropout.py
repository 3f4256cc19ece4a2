"""Masks that hold still, and weights that are normalized and dropped."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from deepeq.nn import VariationalDropout, WeightDropout, regularize_weight, variational_mask

SETTINGS = [(True, 0.0), (False, 0.5), (True, 0.5)]


def make_linear(normalize: bool, dropout: float, *, d_in: int = 6, d_out: int = 5) -> nn.Linear:
    module = nn.Linear(d_in, d_out, dtype=torch.float64)
    regularize_weight(module, weight_norm=normalize, dropout=dropout)
    return module


def parameters_by_role(module: nn.Linear) -> dict[str, Tensor]:
    return {name.rsplit(".", 1)[-1]: parameter for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9])
def test_mask_is_inverted_bernoulli(p: float) -> None:
    mask = variational_mask((200, 500), p, like=torch.zeros(1, dtype=torch.float64))
    assert mask.shape == (200, 500)
    assert mask.dtype == torch.float64
    torch.testing.assert_close(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / (1 - p)))
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert (mask == 0).double().mean().item() == pytest.approx(p, abs=4 * deviation)
    assert mask.mean().item() == pytest.approx(1.0, abs=4 * deviation / (1 - p))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mask_follows_dtype_device_and_seed(dtype: torch.dtype) -> None:
    like = torch.zeros(1, dtype=dtype)
    torch.manual_seed(3)
    first, second = (variational_mask((4, 9), 0.5, like=like) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(variational_mask((4, 9), 0.5, like=like), first)
    assert not torch.equal(first, second)
    assert first.dtype == dtype
    assert variational_mask((4,), 0.5, like=like.to("meta")).device.type == "meta"


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_share_out_of_range_is_named(p: float) -> None:
    makers = (
        lambda: VariationalDropout(p),
        lambda: WeightDropout(p),
        lambda: variational_mask((2,), p, like=torch.zeros(1)),
        lambda: regularize_weight(nn.Linear(2, 2), weight_norm=False, dropout=p),
    )
    for make in makers:
        with pytest.raises(ValueError, match=f"p={p!r} must be in"):
            make()


def test_variational_dropout_is_constant_over_positions_alone() -> None:
    x = torch.ones(4, 7, 64, dtype=torch.float64)
    dropout = VariationalDropout(0.5)
    out = dropout(x)
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(sample.tolist()) for sample in out[:, 0]}) == 4
    assert not torch.equal(dropout(x), out)
    mask = dropout.mask(x)
    assert mask is not None
    assert mask.shape == (4, 1, 64)


def test_variational_dropout_multiplies_by_its_mask() -> None:
    x = torch.randn(2, 3, 5)
    dropout = VariationalDropout(0.5)
    torch.manual_seed(0)
    mask = dropout.mask(x)
    assert mask is not None
    torch.manual_seed(0)
    assert torch.equal(dropout(x), x * mask)


def test_variational_dropout_does_nothing_in_evaluation_or_at_zero() -> None:
    x = torch.randn(2, 3, 5)
    for dropout in (VariationalDropout(0.5).eval(), VariationalDropout(0.0)):
        assert dropout.mask(x) is None
        assert dropout(x) is x


def test_weight_dropout_drops_single_entries_and_keeps_the_mean() -> None:
    weight = torch.randn(300, 400, dtype=torch.float64)
    ratio = WeightDropout(0.25)(weight) / weight
    torch.testing.assert_close(ratio[ratio != 0], torch.full_like(ratio[ratio != 0], 1 / 0.75))
    assert (ratio == 0).double().mean().item() == pytest.approx(0.25, abs=0.005)
    assert ratio.std(dim=0).min() > 0.2
    assert ratio.std(dim=1).min() > 0.2


def test_a_row_is_never_dropped_entirely() -> None:
    weight = torch.ones(2000, 2)
    dropped = WeightDropout(0.9)(weight)
    rows = {tuple(row.tolist()) for row in dropped}
    scaled = pytest.approx(10.0, rel=1e-5)
    assert (1.0, 1.0) in rows
    assert all(row == (1.0, 1.0) or max(row) == scaled for row in rows)
    single = nn.Linear(1, 2000)
    regularize_weight(single, weight_norm=True, dropout=0.9)
    assert single.weight.isfinite().all()


@pytest.mark.parametrize(("normalize", "dropout"), [*SETTINGS, (False, 0.0)])
def test_regularizing_keeps_the_weight(normalize: bool, dropout: float) -> None:
    module = nn.Linear(6, 5, dtype=torch.float64)
    before = module.weight.detach().clone()
    state = torch.get_rng_state()
    regularize_weight(module, weight_norm=normalize, dropout=dropout)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(module.eval().weight, before, rtol=1e-15, atol=0.0)


def test_nothing_to_do_leaves_a_plain_linear() -> None:
    assert type(make_linear(False, 0.0)) is nn.Linear


def test_normalized_weight_is_g_times_the_direction() -> None:
    module = make_linear(True, 0.0)
    parts = parameters_by_role(module)
    g, v = parts["original0"], parts["original1"]
    nn.init.normal_(g)
    nn.init.normal_(v)
    assert g.shape == (5, 1)
    for i in range(5):
        for j in range(6):
            expected = g[i, 0] * v[i, j] / sum(v[i, k] ** 2 for k in range(6)) ** 0.5
            torch.testing.assert_close(module.weight[i, j], expected)


def test_normalized_weight_is_that_of_torch() -> None:
    plain = make_linear(False, 0.0)
    theirs, ours = (copy.deepcopy(plain) for _ in range(2))
    weight_norm(theirs, dim=0)
    regularize_weight(ours, weight_norm=True, dropout=0.5)
    torch.testing.assert_close(ours.eval().weight, theirs.weight)


def test_rows_keep_their_norm_under_dropout() -> None:
    module = make_linear(True, 0.5)
    g = parameters_by_role(module)["original0"]
    nn.init.uniform_(g, 1.0, 2.0)
    weight = module.weight
    assert (weight == 0).any()
    torch.testing.assert_close(weight.norm(dim=1, keepdim=True), g)


@pytest.mark.parametrize(("normalize", "dropout"), SETTINGS)
def test_weight_is_drawn_anew_in_training_alone(normalize: bool, dropout: float) -> None:
    module = make_linear(normalize, dropout)
    assert torch.equal(module.weight, module.weight) == (dropout == 0.0)
    module.eval()
    assert torch.equal(module.weight, module.weight)
    assert (module.weight != 0).all()


@pytest.mark.parametrize(("normalize", "dropout"), SETTINGS)
def test_gradients_reach_every_parameter_and_are_right(normalize: bool, dropout: float) -> None:
    module = make_linear(normalize, dropout)
    x = torch.randn(3, 6, dtype=torch.float64)
    names, values = zip(*module.named_parameters(), strict=True)

    def f(*parameters: Tensor) -> Tensor:
        torch.manual_seed(5)
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, values)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("normalize", "dropout"), SETTINGS)
def test_regularized_weights_survive_copies_checkpoints_and_conversions(normalize: bool, dropout: float) -> None:
    module = make_linear(normalize, dropout).eval()
    clone = copy.deepcopy(module)
    assert torch.equal(clone.weight, module.weight)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.add_(1.0)
    assert not torch.equal(clone.weight, module.weight)
    module.load_state_dict(clone.state_dict())
    assert torch.equal(clone.weight, module.weight)
    expected = module.weight.float()
    assert module.float().weight.dtype == torch.float32
    torch.testing.assert_close(module.weight, expected)


def test_a_weight_is_regularized_once() -> None:
    module = make_linear(True, 0.0)
    with pytest.raises(ValueError, match=r"module\.weight is parametrized already"):
        regularize_weight(module, weight_norm=False, dropout=0.5)
