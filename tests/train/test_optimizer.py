"""The optimizer's groups, and what a step takes from the schedules."""

import math
from dataclasses import replace

import pytest
import torch

from deepeq import Anderson, Broyden
from deepeq.models import LanguageModel, ModelConfig, TransformerConfig
from deepeq.train import Cosine, Drops, Geometric, Linear, Plateau
from deepeq.train.config import EquilibriumConfig, OptimizerConfig
from deepeq.train.optimizer import (
    jacobian_weight,
    learning_rate,
    make_optimizer,
    scheduled_depth,
    scheduled_solver,
)


def test_learning_rate_rises_linearly_and_falls_as_half_a_cosine() -> None:
    config = OptimizerConfig(lr=2.0, schedule=Cosine(end=0.1), warm_up_steps=4)
    rates = [learning_rate(config, step, 25) for step in range(25)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    assert rates[14] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[24] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


@pytest.mark.parametrize("end", [0.0, 0.05])
def test_cosine_equals_its_formula_to_the_last_bit(end: float) -> None:
    """The learning rates of the results in `benchmarks/` came from this formula."""
    config = OptimizerConfig(lr=3e-3, schedule=Cosine(end=end), warm_up_steps=50)
    for step in range(50, 2200):
        share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - 50) / (2200 - 1 - 50))))
        assert learning_rate(config, step, 2200) == 3e-3 * (end + (1.0 - end) * share)


def test_default_schedule_is_a_cosine_down_to_a_twentieth() -> None:
    for step in (0, 99, 100, 500, 999):
        default, given = (OptimizerConfig(schedule=schedule) for schedule in (None, Cosine(end=0.05)))
        assert learning_rate(default, step, 1000) == learning_rate(given, step, 1000)


def test_learning_rate_drops_at_shares_of_the_steps_after_the_rise() -> None:
    config = OptimizerConfig(lr=2.0, schedule=Drops(at=(0.5, 0.8)), warm_up_steps=1)
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates == pytest.approx([2.0] * 6 + [0.2] * 3 + [0.02] * 3)
    at_once = OptimizerConfig(lr=2.0, schedule=Drops(at=(0.5,)), warm_up_steps=0)
    assert [learning_rate(at_once, step, 10) for step in range(10)] == pytest.approx([2.0] * 5 + [0.2] * 5)


def test_learning_rate_follows_the_validations_after_the_rise() -> None:
    config = OptimizerConfig(lr=2.0, schedule=Plateau(patience=0), warm_up_steps=4)
    assert learning_rate(config, 3, 100, [1.0, 1.5]) == 2.0
    assert learning_rate(config, 4, 100, [1.0, 1.5]) == 1.0
    assert learning_rate(config, 4, 100) == 2.0


def test_runs_shorter_than_the_rise_and_of_one_step_have_a_rate() -> None:
    assert learning_rate(OptimizerConfig(lr=2.0, warm_up_steps=50), 9, 10) == 2.0 * 10 / 50
    assert learning_rate(OptimizerConfig(lr=2.0, warm_up_steps=0), 0, 1) == 2.0


def test_stochastic_gradient_descent_is_plain() -> None:
    model = make_model()
    optimizer = make_optimizer(model, OptimizerConfig(name="sgd", lr=0.5, weight_decay=0.0))
    before = model.softmax.bias.detach().clone()
    model.softmax(torch.ones(1, 1, 8), torch.tensor([[2]])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.softmax.bias, before - 0.5 * model.softmax.bias.grad)


def test_jacobian_weight_moves_after_the_shallow_stack_and_is_paid_evenly() -> None:
    schedule = Linear(start=1.0, end=3.0)
    config = EquilibriumConfig(warm_up_share=0.0, jacobian_weight=0.5, jacobian_schedule=schedule, jacobian_share=0.5)
    weights = [jacobian_weight(config, step, 11) for step in range(11)]
    assert weights == pytest.approx([0, 0.6, 0, 0.8, 0, 1.0, 0, 1.2, 0, 1.4, 0])
    config = EquilibriumConfig(warm_up_share=0.5, jacobian_weight=0.5, jacobian_schedule=schedule, jacobian_share=1.0)
    weights = [jacobian_weight(config, step, 10) for step in range(10)]
    assert weights == pytest.approx([0.5] * 6 + [0.75, 1.0, 1.25, 1.5])
    always = EquilibriumConfig(jacobian_weight=0.3, jacobian_share=1.0)
    assert [jacobian_weight(always, step, 5) for step in range(5)] == [0.3] * 5


def test_jacobian_weight_follows_the_validations() -> None:
    config = EquilibriumConfig(jacobian_weight=0.5, jacobian_schedule=Plateau(patience=0), jacobian_share=1.0)
    assert [jacobian_weight(config, 5, 10, losses) for losses in ([], [1.0], [1.0, 1.0])] == [0.5, 0.5, 0.25]


def test_tolerance_goes_from_loose_to_tight_after_the_shallow_stack() -> None:
    solver = Broyden(rtol=1e-3, atol=1e-5, max_steps=12, history_size=7)
    schedule = Geometric(start=100.0, end=1.0)
    config = EquilibriumConfig(solver=solver, warm_up_share=0.2, tolerance_schedule=schedule)
    solvers = [scheduled_solver(config, step, 15) for step in range(15)]
    factors = [100.0] * 4 + [100.0 ** (1 - i / 11) for i in range(1, 12)]
    assert [s.rtol for s in solvers] == pytest.approx([1e-3 * factor for factor in factors])
    assert [s.atol for s in solvers] == pytest.approx([1e-5 * factor for factor in factors])
    assert solvers[-1] == solver
    assert all(isinstance(s, Broyden) and s.history_size == 7 and s.max_steps == 12 for s in solvers)


def test_step_limit_is_rounded_up_and_stays_at_least_one() -> None:
    solver = Anderson(rtol=1e-2, max_steps=12)
    config = EquilibriumConfig(solver=solver, warm_up_share=0.0, step_limit_schedule=Linear(start=0.0, end=1.0))
    limits = [scheduled_solver(config, step, 11).max_steps for step in range(11)]
    assert limits == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert scheduled_solver(config, 5, 11).rtol == 1e-2


def test_step_limit_ignores_the_rounding_of_a_factor() -> None:
    assert 1000 * 0.1**2 > 10  # by a rounding error
    config = EquilibriumConfig(
        solver=Anderson(max_steps=1000), warm_up_share=0.0, step_limit_schedule=Drops(at=(0.1, 0.2))
    )
    assert scheduled_solver(config, 9, 10).max_steps == 10


def test_stack_of_the_warm_up_grows_to_its_last_step() -> None:
    config = EquilibriumConfig(warm_up_share=0.5, warm_up_depth=2, warm_up_depth_schedule=Linear(end=3.0))
    assert [scheduled_depth(config, step, 10) for step in range(5)] == [2, 3, 4, 5, 6]
    steps = replace(config, warm_up_depth_schedule=Drops(at=(0.5,), multiplier=1.5))
    assert [scheduled_depth(steps, step, 10) for step in range(5)] == [2, 2, 3, 3, 3]
    assert scheduled_depth(replace(config, warm_up_depth_schedule=None), 4, 10) == 2


def test_growing_stack_needs_steps_to_grow_in() -> None:
    with pytest.raises(ValueError, match="needs a warm_up_share above 0"):
        EquilibriumConfig(warm_up_share=0.0, warm_up_depth_schedule=Linear(end=3.0))


def test_solver_without_a_schedule_is_the_one_of_the_configuration() -> None:
    solver = Anderson(rtol=1e-2, max_steps=12)
    assert scheduled_solver(EquilibriumConfig(solver=solver), 3, 10) is solver
    assert scheduled_solver(EquilibriumConfig(), 3, 10) == EquilibriumConfig().with_defaults().solver


def test_solver_follows_the_validations() -> None:
    config = EquilibriumConfig(
        solver=Anderson(rtol=1e-2, max_steps=12), warm_up_share=0.0, tolerance_schedule=Plateau(patience=0, floor=0.3)
    )
    rtols = [scheduled_solver(config, 5, 10, losses).rtol for losses in ([], [1.0], [1.0, 1.0], [1.0] * 9)]
    assert rtols == pytest.approx([1e-2, 1e-2, 5e-3, 3e-3])


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
