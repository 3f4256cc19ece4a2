"""Optimizers, and what changes over the steps of a run."""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from deepeq.solvers import Solver
from deepeq.train.config import EquilibriumConfig, OptimizerConfig
from deepeq.train.schedules import Schedule


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer of a configuration; it decays matrices, and leaves biases and the lengths of vectors alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if _is_matrix(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if not _is_matrix(p)], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return SGD(groups, lr=config.lr)
    return AdamW(groups, lr=config.lr, betas=config.betas)


def _is_matrix(parameter: Tensor) -> bool:
    # Lengths of normalized rows are (D, 1), biases of attention heads (H, 1, K).
    return parameter.ndim >= 2 and parameter.shape[1] > 1


def learning_rate(config: OptimizerConfig, step: int, num_steps: int, validations: Sequence[float] = ()) -> float:
    """Learning rate of a step counted from 0: a linear rise, then the schedule.

    Args:
        config: The rise, the schedule and what it multiplies.
        step: The step.
        num_steps: Steps of the run.
        validations: Losses on the validation text before the step, the oldest first.
    """
    if step < config.warm_up_steps:
        return config.lr * (step + 1) / config.warm_up_steps
    return config.lr * _factor(config.with_defaults().schedule, step, config.warm_up_steps, num_steps, validations)


def jacobian_weight(config: EquilibriumConfig, step: int, num_steps: int, validations: Sequence[float] = ()) -> float:
    """Weight of the Jacobian penalty at a step counted from 0; 0 where the step pays none.

    Paying steps are spread evenly without a random number, so that a resumed run takes the same ones.
    """
    share = config.jacobian_share
    if math.floor((step + 1) * share) == math.floor(step * share):
        return 0.0
    first = config.warm_up_steps(num_steps)
    return config.jacobian_weight * _factor(config.jacobian_schedule, step, first, num_steps, validations)


def scheduled_solver(config: EquilibriumConfig, step: int, num_steps: int, validations: Sequence[float] = ()) -> Solver:
    """The forward solver of a step counted from 0: the one of the configuration, where nothing is scheduled itself."""
    solver = config.with_defaults().solver
    assert solver is not None
    if config.tolerance_schedule is None and config.step_limit_schedule is None:
        return solver
    first = config.warm_up_steps(num_steps)
    tolerance = _factor(config.tolerance_schedule, step, first, num_steps, validations)
    limit = _factor(config.step_limit_schedule, step, first, num_steps, validations)
    max_steps = _rounded_up(solver.max_steps * limit)
    return replace(solver, rtol=solver.rtol * tolerance, atol=solver.atol * tolerance, max_steps=max_steps)


def scheduled_depth(config: EquilibriumConfig, step: int, num_steps: int, validations: Sequence[float] = ()) -> int:
    """Layers of the shallow stack at a step counted from 0."""
    last = config.warm_up_steps(num_steps)
    return _rounded_up(config.warm_up_depth * _factor(config.warm_up_depth_schedule, step, 0, last, validations))


def _rounded_up(count: float) -> int:
    # A factor that rounding put a hair above a whole number is not one more.
    return max(1, math.ceil(count - 1e-9))


def _factor(schedule: Schedule | None, step: int, first: int, num_steps: int, validations: Sequence[float]) -> float:
    """A schedule's factor at a step, where it begins at step `first` and ends at the last; 1 without a schedule."""
    if schedule is None:
        return 1.0
    progress = (step - first) / max(1, num_steps - 1 - first)
    return schedule.factor(max(0.0, progress), validations)
