"""One optimizer step."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.utils import _pytree as pytree

from deepeq.data import Batches
from deepeq.deq import How
from deepeq.models import LanguageModel, ModelOutput
from deepeq.solution import ConvergenceError
from deepeq.train.config import OptimizerConfig, RunConfig
from deepeq.train.distributed import any_process
from deepeq.train.evaluation import Averages


class TrainingError(RuntimeError):
    """A run cannot continue: its loss or its gradient is not finite."""


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Return the optimizer of a configuration. It decays matrices, but not biases and lengths of normalized rows."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    orthogonal = [p for name, p in parameters.items() if config.name == "muon" and _is_hidden(name, p)]
    rest = [p for name, p in parameters.items() if not (config.name == "muon" and _is_hidden(name, p))]
    groups = [
        {"params": [p for p in rest if _is_matrix(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if not _is_matrix(p)], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return SGD(groups, lr=config.lr)
    adamw = AdamW(groups, lr=config.lr, betas=config.betas)
    if not orthogonal:
        return adamw
    # Steps of the size of Adam's, so that one learning rate serves both.
    muon = Muon(orthogonal, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return _Together(muon, adamw)


class _Together(Optimizer):
    """Several optimizers of different parameters, with one list of groups and one state by parameter."""

    def __init__(self, *optimizers: Optimizer) -> None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.param_groups, self._optimizers = groups, optimizers
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run one step of each; there is no closure."""
        for optimizer in self._optimizers:
            optimizer.step()


def _is_hidden(name: str, parameter: Tensor) -> bool:
    # Embeddings and softmax see one row per token, whose updates are no business of a whole matrix.
    return name.startswith("network.") and parameter.ndim == 2 and _is_matrix(parameter)


def _is_matrix(parameter: Tensor) -> bool:
    # Lengths of normalized rows are (D, 1), biases of attention heads (H, 1, K).
    return parameter.ndim >= 2 and parameter.shape[1] > 1


class Step:
    """Optimizer steps on the batches of the training data, in this process and the others together.

    The rows of a batch are dealt out to the processes in order, and the rows of a process to its `train.accumulate`
    parts. Each part carries the memory of its own rows.

    Args:
        model: The model, which is handed to Fabric here.
        config: The run.
        batches: The training data, with the rows of all processes.
        fabric: The processes.
        averages: Collects the losses, the norm of the gradient and the solves.

    Raises:
        ValueError: The rows cannot be dealt out evenly.
    """

    def __init__(
        self, model: LanguageModel, config: RunConfig, batches: Batches, fabric: Fabric, averages: Averages
    ) -> None:
        self._model, self._config, self._fabric, self._averages = model, config, fabric, averages
        self._count = config.train.accumulate
        self._first, self._num_parts = fabric.global_rank * self._count, fabric.world_size * self._count
        try:
            self._parts = [batches.shard(self._first + index, self._num_parts) for index in range(self._count)]
        except ValueError as error:
            raise ValueError(
                f"the rows of a training batch cannot be dealt out to {fabric.world_size} processes with "
                f"train.accumulate={self._count}: {error}"
            ) from error
        self._memories: list[Any] = [None] * self._count
        self._forward = fabric.setup_module(model)
        # After the setup, which may replace the parameters by shards.
        self.optimizer = make_optimizer(model, config.optimizer)

    @property
    def memory(self) -> Any:
        """The memory of the rows of this process."""
        if self._memories[0] is None:
            return None
        return pytree.tree_map(lambda *parts: torch.cat(parts), *self._memories)

    def restore_memory(self, memory: Any) -> None:
        """Take the rows of this process from a memory of the rows of all processes."""
        for index in range(self._count):
            place = self._first + index
            self._memories[index] = pytree.tree_map_only(
                Tensor,
                lambda leaf, place=place: leaf.chunk(self._num_parts)[place].to(self._fabric.device, copy=True),
                memory,
            )

    def run(self, step: int, validations: Sequence[float]) -> int:
        """Run one optimizer step, and return its number of targets in all processes.

        Args:
            step: The step, counted from 0.
            validations: Losses on the validation text before the step, the oldest first.

        Raises:
            TrainingError: The loss or the gradient is not finite; the parameters are as before.
        """
        config, num_steps, num_rows, num_tokens = self._config, self._config.train.steps, 0, 0
        how = config.training_how(step, validations, lambda solution: self._averages.add_solution("backward", solution))
        weight = config.equilibrium.jacobian_weight_at(step, num_steps, validations)
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.lr_at(step, num_steps, validations)
        epoch, position = divmod(step, self._parts[0].num_segments)
        if position == 0 or not self._parts[0].continuous:
            self._memories = [None] * self._count
        self._model.train()
        self.optimizer.zero_grad()
        for index, batches in enumerate(self._parts):
            tokens, targets = (ids.to(self._fabric.device) for ids in batches.segment(position, epoch=epoch))
            # Gradients travel between processes once, with the last part.
            with self._fabric.no_backward_sync(self._forward, enabled=index + 1 < self._count):
                self._run_part(index, step, tokens, targets, how, weight)
            num_rows, num_tokens = num_rows + len(targets), num_tokens + targets.numel()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), config.optimizer.max_gradient_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not bool(torch.isfinite(norm)):
            raise self._error(step, f"the norm of the gradient is {float(norm)}")
        self.optimizer.step()
        self._averages.add("gradient_norm", norm, num_rows)
        return num_tokens * self._fabric.world_size

    def _run_part(self, index: int, step: int, tokens: Tensor, targets: Tensor, how: How | None, weight: float) -> None:
        """Run the model on one part of the batch, keep its memory, and add its gradient."""
        loss, problem = None, ""
        generators = self._generators(index, step, len(tokens)) if weight else None
        mixed = self._config.train.precision == "bf16-mixed"
        try:
            with torch.autocast(self._fabric.device.type, torch.bfloat16, enabled=mixed):
                output: ModelOutput = self._forward(
                    tokens, self._memories[index], targets, how=how, penalty_generator=generators
                )
            loss = self._loss(output, weight)
            self._memories[index] = output.memory
            if not bool(torch.isfinite(loss)):
                problem = f"the loss is {float(loss.detach())}"
        except ConvergenceError as error:
            problem = str(error)
        # All processes stop together: one that waited for the gradients of a failed one would wait forever.
        if any_process(bool(problem), self._fabric):
            raise self._error(step, problem or "another process has a loss that is not finite")
        assert loss is not None
        try:
            self._fabric.backward(loss if self._count == 1 else loss / self._count)
        except ConvergenceError as error:
            raise self._error(step, str(error)) from error

    def _loss(self, output: ModelOutput, weight: float) -> Tensor:
        assert output.nll is not None
        loss, num_rows = output.nll.mean(), len(output.nll)
        self._averages.add("nll", loss, output.nll.numel())
        if output.jacobian_penalty is not None:
            self._averages.add("jacobian_penalty", output.jacobian_penalty, num_rows)
            loss = loss + weight * output.jacobian_penalty
        if output.auxiliary_nll is not None:
            self._averages.add("auxiliary_nll", output.auxiliary_nll, num_rows)
            loss = loss + self._config.model.auxiliary_weight * output.auxiliary_nll
        if output.solution is not None and not self._config.model.depth:
            self._averages.add_solution("forward", output.solution)
        return loss

    def _generators(self, index: int, step: int, num_rows: int) -> list[torch.Generator]:
        """Return a generator for each row of a step, the same ones in a resumed run and in any number of processes."""
        train = self._config.train
        first = step * train.batch_size + (self._first + index) * num_rows
        seeds = [(train.seed + 1_000_003 * row) % 2**63 for row in range(first, first + num_rows)]
        return [torch.Generator(self._fabric.device).manual_seed(seed) for seed in seeds]

    def _error(self, step: int, problem: str) -> TrainingError:
        return TrainingError(
            f"step {step + 1}: {problem}, and the optimizer was not run; lower optimizer.lr (now "
            f"{self._config.optimizer.lr}), raise optimizer.lr_warmup_steps, or continue from the last checkpoint with "
            "--resume yes"
        )
