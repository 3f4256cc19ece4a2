"""The optimizer's groups and its learning rate."""

import pytest
import torch

from deepeq.models import LanguageModel, ModelConfig, TransformerConfig
from deepeq.train.config import EquilibriumConfig, OptimizerConfig
from deepeq.train.optimizer import jacobian_weight, learning_rate, make_optimizer


def test_learning_rate_rises_linearly_and_falls_as_half_a_cosine() -> None:
    config = OptimizerConfig(lr=2.0, min_lr_share=0.1, warm_up_steps=4)
    rates = [learning_rate(config, step, 25) for step in range(25)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    assert rates[14] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[24] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


def test_learning_rate_drops_by_ten_where_it_is_told_to() -> None:
    config = OptimizerConfig(lr=2.0, schedule="drops", drops=(0.5, 0.8), warm_up_steps=2)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 0.2, 0.2, 0.2, 0.02, 0.02])
    constant = OptimizerConfig(lr=2.0, schedule="drops", warm_up_steps=0)
    assert {learning_rate(constant, step, 10) for step in range(10)} == {2.0}


def test_drops_without_their_schedule_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer.drops=\(0.5,\) needs schedule='drops'"):
        OptimizerConfig(drops=(0.5,))


def test_stochastic_gradient_descent_is_plain() -> None:
    model = make_model()
    optimizer = make_optimizer(model, OptimizerConfig(name="sgd", lr=0.5, weight_decay=0.0))
    before = model.softmax.bias.detach().clone()
    model.softmax(torch.ones(1, 1, 8), torch.tensor([[2]])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.softmax.bias, before - 0.5 * model.softmax.bias.grad)


def test_jacobian_weight_moves_in_a_straight_line_and_is_paid_evenly() -> None:
    config = EquilibriumConfig(jacobian_weight=1.0, jacobian_final_weight=3.0, jacobian_share=0.5)
    weights = [jacobian_weight(config, step, 11) for step in range(11)]
    assert weights == pytest.approx([0, 1.2, 0, 1.6, 0, 2.0, 0, 2.4, 0, 2.8, 0])
    always = EquilibriumConfig(jacobian_weight=0.3, jacobian_share=1.0)
    assert [jacobian_weight(always, step, 5) for step in range(5)] == [0.3] * 5


def make_model() -> LanguageModel:
    return LanguageModel(7, ModelConfig(layer=TransformerConfig(d_model=8, num_heads=2, d_inner=8, weight_norm=True)))


def test_matrices_decay_and_vectors_do_not() -> None:
    model = make_model()
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    names = {name: decay[parameter] for name, parameter in model.named_parameters()}
    cell = "network.core.cell."
    for name in ("content_bias", "position_bias", "qkv.parametrizations.weight.original0", "inner.bias"):
        assert names[cell + name] == 0.0, name
    assert names[cell + "qkv.parametrizations.weight.original1"] == 0.3
    assert names["embedding.tables.0"] == names["network.core.cell.position.weight"] == 0.3
    assert names["softmax.bias"] == names["network.core.cell.attention_norm.weight"] == 0.0
