"""Optimizers, and what changes over the steps of a run."""

import math

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from deepeq.train.config import EquilibriumConfig, OptimizerConfig


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


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of a step counted from 0: a linear rise, then half a cosine, or drops by a factor of ten."""
    if step < config.warm_up_steps:
        return config.lr * (step + 1) / config.warm_up_steps
    if config.schedule == "drops":
        return config.lr * 0.1 ** sum(step >= drop * num_steps for drop in config.drops)
    progress = (step - config.warm_up_steps) / max(1, num_steps - 1 - config.warm_up_steps)
    share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_share + (1.0 - config.min_lr_share) * share)


def jacobian_weight(config: EquilibriumConfig, step: int, num_steps: int) -> float:
    """Weight of the Jacobian penalty at a step counted from 0; 0 where the step pays none.

    Paying steps are spread evenly without a random number, so that a resumed run takes the same ones.
    """
    share = config.jacobian_share
    if math.floor((step + 1) * share) == math.floor(step * share):
        return 0.0
    last = config.jacobian_weight if config.jacobian_final_weight is None else config.jacobian_final_weight
    return config.jacobian_weight + (last - config.jacobian_weight) * step / max(1, num_steps - 1)
