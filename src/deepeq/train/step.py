"""One optimizer step."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from deepeq.data import Batches
from deepeq.models import LanguageModel, ModelOutput
from deepeq.solution import ConvergenceError
from deepeq.train.config import RunConfig
from deepeq.train.devices import any_process
from deepeq.train.metrics import Averages
from deepeq.train.optimizer import jacobian_weight, learning_rate, make_optimizer


class TrainingError(RuntimeError):
    """A run cannot go on: its loss or its gradient is not finite."""


class Step:
    """Optimizer steps over the parts of a batch, in this process and the others.

    The rows of a batch are dealt out to the processes in their order, and those of a process to its `train.accumulate`
    parts. Each part carries the memory of its own rows.

    Args:
        model: The model, which is handed to Fabric here.
        config: The run.
        batches: The training data, with the rows of all processes.
        fabric: The processes.
        averages: Where the losses, the gradient's norm and the forward solves are counted.

    Raises:
        ValueError: the rows cannot be dealt out evenly.
    """

    def __init__(
        self, model: LanguageModel, config: RunConfig, batches: Batches, fabric: Fabric, averages: Averages
    ) -> None:
        self._model, self._config, self._fabric, self._averages = model, config, fabric, averages
        self._first, self._count = fabric.global_rank * config.train.accumulate, config.train.accumulate
        self._num_parts = fabric.world_size * config.train.accumulate  # of all processes
        try:
            self._parts = [batches.shard(self._first + index, self._num_parts) for index in range(self._count)]
        except ValueError as error:
            raise ValueError(
                f"the rows of a training batch cannot be dealt out to {fabric.world_size} processes with "
                f"train.accumulate={self._count}: {error}"
            ) from error
        self._memories: list[Any] = [None] * self._count
        self._forward = fabric.setup_module(model)
        # After the set-up, which may put shards in the place of the parameters.
        self.optimizer = make_optimizer(model, config.optimizer)
        wrapped = fabric.setup_optimizers(self.optimizer)
        assert isinstance(wrapped, _FabricOptimizer)
        self._wrapped_optimizer = wrapped

    @property
    def memory(self) -> Any:
        """The memory of the rows of this process."""
        if self._memories[0] is None:
            return None
        return pytree.tree_map(lambda *parts: torch.cat(parts), *self._memories)

    def restore_memory(self, memory: Any) -> None:
        """Take the rows of this process from a memory of the rows of all."""

        def rows(part: int) -> Any:
            own = lambda leaf: leaf.chunk(self._num_parts)[part].to(self._fabric.device, copy=True)  # noqa: E731
            return pytree.tree_map_only(Tensor, own, memory)

        self._memories = [rows(self._first + index) for index in range(self._count)]

    def take(self, step: int, validations: Sequence[float]) -> int:
        """Run the optimizer once, at a step counted from 0; returns the targets of the batch, over all processes.

        Raises:
            TrainingError: the loss or the gradient is not finite; the parameters are as before.
        """
        num_steps, num_rows, num_tokens = self._config.train.steps, 0, 0
        epoch, position = divmod(step, self._parts[0].num_segments)
        if position == 0 or not self._parts[0].continuous:
            self._memories = [None] * self._count
        self._model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self._config.optimizer, step, num_steps, validations)
        weight = jacobian_weight(self._config.equilibrium, step, num_steps, validations)
        self._wrapped_optimizer.zero_grad()
        for index, batches in enumerate(self._parts):
            tokens, targets = (ids.to(self._fabric.device) for ids in batches.segment(position, epoch=epoch))
            # Gradients travel between processes once, with the last part.
            with self._fabric.no_backward_sync(self._forward, enabled=index + 1 < self._count):
                self._backward(index, step, tokens, targets, weight)
            num_rows, num_tokens = num_rows + len(targets), num_tokens + targets.numel()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.optimizer.max_gradient_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not bool(torch.isfinite(norm)):
            raise self._error(step, f"the norm of the gradient is {float(norm)}")
        self._wrapped_optimizer.step()
        self._averages.add("gradient_norm", norm, num_rows)
        return num_tokens * self._fabric.world_size

    def _backward(self, index: int, step: int, tokens: Tensor, targets: Tensor, weight: float) -> None:
        """Add the gradient of a part of the batch."""
        loss, problem = None, ""
        try:
            output: ModelOutput = self._forward(
                tokens,
                self._memories[index],
                targets,
                penalty_generator=self._generators(index, step, len(tokens)) if weight else None,
            )
            loss = self._loss(output, weight)
            self._memories[index] = output.memory
            if not bool(torch.isfinite(loss)):
                problem = f"the loss is {float(loss.detach())}"
        except ConvergenceError as error:
            problem = str(error)
        # All processes stop together: one that waited for the gradients of a failed one would wait for ever.
        if any_process(bool(problem), self._fabric):
            raise self._error(step, problem or "another process has a loss that is not finite")
        assert loss is not None
        try:
            self._fabric.backward(loss if self._count == 1 else loss / self._count)
        except ConvergenceError as error:
            raise self._error(step, str(error)) from error

    def _loss(self, output: ModelOutput, weight: float) -> Tensor:
        assert output.nll is not None
        nll = output.nll.mean()
        self._averages.add("nll", nll, output.nll.numel())
        loss, num_rows = nll, len(output.nll)
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
        """A source for each row and step: a resumed run draws the same vectors, with any number of processes."""
        train = self._config.train
        first = step * train.batch_size + (self._first + index) * num_rows
        seeds = [(train.seed + 1_000_003 * row) % 2**63 for row in range(first, first + num_rows)]
        return [torch.Generator(self._fabric.device).manual_seed(seed) for seed in seeds]

    def _error(self, step: int, problem: str) -> TrainingError:
        return TrainingError(
            f"step {step + 1}: {problem}, and the optimizer was not run; lower optimizer.lr (now "
            f"{self._config.optimizer.lr}), lengthen the warm-up, or go on from the last checkpoint with --resume yes"
        )
