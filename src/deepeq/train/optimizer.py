"""AdamW and its learning rate."""

import math

from torch import nn
from torch.optim import AdamW

from deepeq.train.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW that decays matrices and leaves vectors (biases, norms) alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.lr, betas=config.betas)


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of a step counted from 0: a linear rise, then half a cosine down to `min_lr_share lr`."""
    if step < config.warm_up_steps:
        return config.lr * (step + 1) / config.warm_up_steps
    progress = (step - config.warm_up_steps) / max(1, num_steps - 1 - config.warm_up_steps)
    share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_share + (1.0 - config.min_lr_share) * share)
