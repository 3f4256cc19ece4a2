"""Where a run computes: one process, or several that `torchrun` started; and how it is stopped from outside."""

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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
    """Return the launched Fabric of a run: in one process, or in each of those that `torchrun` started.

    Raises:
        ValueError: A strategy for several processes is asked for outside `torchrun`, or a device is not there.
    """
    if config.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.accelerator='cuda' finds no CUDA device; use 'auto' or 'cpu'")
    if config.strategy != "auto" and not is_torchelastic_launched():
        raise ValueError(
            f"train.strategy={config.strategy!r} is for several processes: start them with torchrun "
            "--standalone --nproc-per-node N -m deepeq train ..., or leave it out"
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
            # The training step opens autocast itself: Fabric's own would convert the arguments of the model, and fails
            # at the frozen value that says how to solve.
            precision="32-true",
        )
        fabric.launch()
    except MisconfigurationException as error:  # such as more processes than devices
        raise ValueError(f"{num_local} processes on this machine cannot be started: {error}") from error
    return fabric


def _strategy(name: str, num_processes: int) -> Strategy | str:
    if name == "fsdp":
        return ModelParallelStrategy(_shard, data_parallel_size=num_processes, tensor_parallel_size=1)
    if name == "ddp" or num_processes > 1:
        return DDPStrategy(gradient_as_bucket_view=True)
    return "auto"


def _shard(model: LanguageModel, mesh: DeviceMesh) -> LanguageModel:
    """Shard with FSDP2: the network is gathered for its own call, and the rest for the call of the whole model.

    A call of a tied network is a whole solve, so the cell is gathered once per solve and not once per evaluation.
    """
    # The outputs that it warns of are views, but nothing changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    fully_shard(model.network, mesh=mesh["data_parallel"])
    # Embedding and softmax share parameters, so they cannot be units of their own.
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Treat floats that are too small to be normal as zero, on the CPU.

    Saturated softmaxes give such gradients, which make products four times slower.
    """
    before = bool(torch.tensor(1e-40) * 1.0 == 0.0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold all parameters in all processes, for calls of parts of a sharded model; then shard them again."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def any_process(flag: bool, fabric: Fabric) -> bool:
    """Return, in every process, whether the flag is set in any of them."""
    if fabric.world_size == 1:
        return flag
    total = torch.tensor(float(flag), device=fabric.device)
    torch.distributed.all_reduce(total)  # without the barrier that Fabric's own would add
    return bool(total > 0)


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Yield a list that is empty until SIGINT or SIGTERM comes; a second signal ends the process as usual.

    Under `torchrun`, which repeats the signal that the terminal sent already, a second signal changes nothing.
    `torchrun` kills processes that have not ended after half a minute.
    """
    received: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if not is_torchelastic_launched():
            signal.signal(number, usual[signal.Signals(number)])

    try:
        for number in usual:
            signal.signal(number, receive)
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def peak_memory_mb(device: torch.device) -> float | None:
    """Return the largest memory that was in use, in MiB: of a CUDA device, or of this process on the CPU.

    It is None on Windows, whose Python cannot tell.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource  # here, because Windows has no such module
    except ModuleNotFoundError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def is_sharded(model: nn.Module) -> bool:
    """Return whether each process holds only a part of the parameters."""
    return isinstance(model, FSDPModule)
