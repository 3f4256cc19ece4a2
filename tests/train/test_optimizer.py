"""The optimizer's groups and its learning rate."""

import pytest

from deepeq.models import LanguageModel, TransformerConfig
from deepeq.train.config import OptimizerConfig
from deepeq.train.optimizer import learning_rate, make_optimizer


def test_learning_rate_rises_linearly_and_falls_as_half_a_cosine() -> None:
    config = OptimizerConfig(lr=2.0, min_lr_share=0.1, warm_up_steps=4)
    rates = [learning_rate(config, step, 25) for step in range(25)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    assert rates[14] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[24] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


def test_matrices_decay_and_vectors_do_not() -> None:
    model = LanguageModel(7, TransformerConfig(d_model=8, num_heads=2, d_inner=8))
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert decay[model.embedding] == decay[model.cell.qkv.weight] == 0.3
    assert decay[model.bias] == decay[model.cell.attention_norm.weight] == 0.0
