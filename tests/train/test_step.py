"""One optimizer step: its rule, its precision, and what it does with values that are not finite."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.utils._pytree import tree_leaves

from deepeq.models import LanguageModel, ModelConfig, TransformerConfig
from deepeq.nn import AdaptiveSoftmax
from deepeq.train import (
    OptimizerConfig,
    RunConfig,
    TrainingError,
)
from deepeq.train.checkpoint import SavedCheckpoint
from deepeq.train.step import make_optimizer
from tests.train.conftest import fit, make_trainer, with_run, with_train


def test_stochastic_gradient_descent_is_plain() -> None:
    model = make_model()
    optimizer = make_optimizer(model, OptimizerConfig(name="sgd", lr=0.5, weight_decay=0.0))
    before = model.softmax.bias.detach().clone()
    model.softmax(torch.ones(1, 1, 8), torch.tensor([[2]])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.softmax.bias, before - 0.5 * model.softmax.bias.grad)


def make_model() -> LanguageModel:
    return LanguageModel(7, ModelConfig(layer=TransformerConfig(d_model=8, num_heads=2, d_inner=8, weight_norm=True)))


def test_muon_makes_steps_of_hidden_matrices_orthogonal_and_leaves_the_rest_to_adam() -> None:
    model, twin = make_model(), make_model()
    twin.load_state_dict(model.state_dict())
    tokens = torch.arange(12).reshape(2, 6) % 7
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for each, rule in ((model, "muon"), (twin, "adamw")):
        optimizer = make_optimizer(each, OptimizerConfig(name=rule, weight_decay=0.0))
        each(tokens, None, tokens.roll(1)).nll.mean().backward()
        optimizer.step()
    change = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    # The Newton-Schulz iteration brings singular values near 1, not to 1.
    spread = torch.linalg.svdvals(change["network.cell.inner.parametrizations.weight.original1"])
    assert spread[-2] > 0.3 * spread[0]  # the smallest one may be zero in the gradient too
    # Steps have the size of Adam's: a root mean square of 0.2 learning rates.
    assert change["network.cell.inner.parametrizations.weight.original1"].square().mean().sqrt() == pytest.approx(
        0.2 * OptimizerConfig().lr, rel=0.3
    )
    for name in ("embedding.tables.0", "softmax.bias", "network.cell.inner.bias", "network.cell.content_bias"):
        assert torch.equal(dict(model.named_parameters())[name], dict(twin.named_parameters())[name]), name


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_matrices_decay_and_vectors_do_not(rule: Literal["adamw", "muon"]) -> None:
    model = make_model()
    optimizer = make_optimizer(model, OptimizerConfig(name=rule, weight_decay=0.3))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    names = {name: decay[parameter] for name, parameter in model.named_parameters()}
    cell = "network.cell."
    for name in ("content_bias", "position_bias", "qkv.parametrizations.weight.original0", "inner.bias"):
        assert names[cell + name] == 0.0, name
    assert names[cell + "qkv.parametrizations.weight.original1"] == 0.3
    assert names["embedding.tables.0"] == names["network.cell.position.weight"] == 0.3
    assert names["softmax.bias"] == names["network.cell.attention_norm.weight"] == 0.0


@pytest.mark.parametrize("where", ["loss", "gradient", "equilibrium"])
def test_non_finite_value_stops_before_the_optimizer(
    config: RunConfig, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(replace(config, equilibrium=replace(config.equilibrium, pretrain_fraction=0.0)))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    if where == "loss":
        monkeypatch.setattr(AdaptiveSoftmax, "nll", lambda self, hidden, targets: hidden.sum(dim=2) * math.nan)
    elif where == "gradient":
        trainer.model.embedding.tables[0].register_hook(lambda gradient: gradient * math.inf)
    else:
        trainer.model.network.cell.register_forward_hook(lambda cell, arguments, z: z * math.nan)
    with pytest.raises(TrainingError, match=r"step 1: .*(nan|inf|non-finite)"):
        trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.folder.last is not None
    assert SavedCheckpoint(trainer.folder.last).progress["step"] == 0


def test_bfloat16_training_stays_close_to_float32(config: RunConfig, tmp_path: Path) -> None:
    final = {}
    for precision in ("32-true", "bf16-mixed"):
        final[precision] = fit(with_run(with_train(config, precision=precision), dir=str(tmp_path / precision)))[-1][1]
    assert final["bf16-mixed"] != final["32-true"]
    assert final["bf16-mixed"] == pytest.approx(final["32-true"], rel=0.05)


def test_bfloat16_leaves_states_memory_and_losses_in_float32(config: RunConfig) -> None:
    trainer, seen = make_trainer(with_train(config, precision="bf16-mixed")), set()
    cell = trainer.model.network.cell
    cell.register_forward_pre_hook(
        lambda _, arguments: seen.add((arguments[0].dtype, torch.is_autocast_enabled("cpu")))
    )
    trainer.optimizer_step.run(5, [])
    assert seen == {(torch.float32, True)}
    leaves = [leaf for leaf in tree_leaves(trainer.optimizer_step.memory) if leaf is not None]
    assert {leaf.dtype for leaf in leaves} == {torch.float32}
    assert trainer.averages.compute()["backward_residual"] > 0
