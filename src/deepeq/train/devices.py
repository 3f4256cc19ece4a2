"""Where a run computes: one process, or several that `torchrun` has started."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed import is_torchelastic_launched
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from deepeq.models import LanguageModel
from deepeq.train.config import TrainConfig


def make_fabric(config: TrainConfig) -> Fabric:
    """The launched Fabric of a run: in one process, or in each of those that `torchrun` has started.

    Raises:
        ValueError: a strategy for several processes is asked for outside `torchrun`, or a device that is not there.
    """
    if config.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.accelerator='cuda' finds no CUDA device; use 'auto' or 'cpu'")
    if config.strategy != "auto" and not is_torchelastic_launched():
        raise ValueError(
            f"train.strategy={config.strategy!r} is for several processes: start them with torchrun "
            "--nproc-per-node N -m deepeq train ..., or leave it out"
        )
    num_processes = int(os.environ["WORLD_SIZE"]) if is_torchelastic_launched() else 1
    num_local = int(os.environ["LOCAL_WORLD_SIZE"]) if is_torchelastic_launched() else 1
    accelerator = config.accelerator
    if accelerator == "auto":  # Fabric's own choice may be a device without float64, which the solvers use
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=num_local,
            num_nodes=num_processes // num_local,
            strategy=_strategy(config.strategy, num_processes),
            # Fabric has double precision for some strategies only; a model in float64 needs nothing from it.
            precision="bf16-mixed" if config.precision == "bf16-mixed" else "32-true",
        )
        fabric.launch()
    except MisconfigurationException as error:  # more processes than devices, for one
        raise ValueError(f"{num_local} processes on this machine cannot be started: {error}") from error
    return fabric


def _strategy(name: str, num_processes: int) -> Strategy | str:
    if name == "fsdp":
        return ModelParallelStrategy(_shard, data_parallel_size=num_processes, tensor_parallel_size=1)
    if name == "ddp" or num_processes > 1:
        return DDPStrategy(gradient_as_bucket_view=True)
    return "auto"


def _shard(model: LanguageModel, mesh: DeviceMesh) -> LanguageModel:
    """FSDP2: the network is gathered for the length of its call; the rest for that of the whole model.

    A call of a tied network is its whole solve, so that the cell is gathered once a solve, and not once an evaluation.
    """
    # The outputs that it warns of are views, but nothing changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    fully_shard(model.network, mesh=mesh["data_parallel"])
    # Embedding and softmax share parameters, so that they cannot be units of their own.
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Take floats too small to be normal for zero, on the CPU.

    Saturated softmaxes give such gradients, which made products four times slower.
    """
    before = bool(torch.tensor(1e-40) * 1.0 == 0.0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the parameters only."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All parameters on all processes, for calls of parts of a sharded model; afterwards they are sharded again."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def any_process(flag: bool, fabric: Fabric) -> bool:
    """Whether the flag is set in any process; all of them get the same answer."""
    if fabric.world_size == 1:
        return flag
    total = torch.tensor(float(flag), device=fabric.device)
    torch.distributed.all_reduce(total)  # without the barrier that Fabric's own would add
    return bool(total > 0)
