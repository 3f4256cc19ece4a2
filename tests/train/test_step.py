"""The optimizer of a step: its rule, and what it decays."""

import torch

from deepeq.models import LanguageModel, ModelConfig, TransformerConfig
from deepeq.train import OptimizerConfig
from deepeq.train.step import make_optimizer


def test_stochastic_gradient_descent_is_plain() -> None:
    model = make_model()
    optimizer = make_optimizer(model, OptimizerConfig(name="sgd", lr=0.5, weight_decay=0.0))
    before = model.softmax.bias.detach().clone()
    model.softmax(torch.ones(1, 1, 8), torch.tensor([[2]])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.softmax.bias, before - 0.5 * model.softmax.bias.grad)


def make_model() -> LanguageModel:
    return LanguageModel(7, ModelConfig(layer=TransformerConfig(d_model=8, num_heads=2, d_inner=8, weight_norm=True)))


def test_matrices_decay_and_vectors_do_not() -> None:
    model = make_model()
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    names = {name: decay[parameter] for name, parameter in model.named_parameters()}
    cell = "network.cell."
    for name in ("content_bias", "position_bias", "qkv.parametrizations.weight.original0", "inner.bias"):
        assert names[cell + name] == 0.0, name
    assert names[cell + "qkv.parametrizations.weight.original1"] == 0.3
    assert names["embedding.tables.0"] == names["network.cell.position.weight"] == 0.3
    assert names["softmax.bias"] == names["network.cell.attention_norm.weight"] == 0.0
