"""The modes of PyTorch that a caller has set, in which `f` runs and the algebra of a solver does not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class Modes(NamedTuple):
    """The autocast and inference modes of one moment, for one type of device."""

    device_type: str
    autocast: bool
    dtype: torch.dtype
    cache: bool
    inference: bool

    @classmethod
    def now(cls, device_type: str) -> "Modes":
        """Return the modes that are set now."""
        return cls(
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_cache_enabled(),
            torch.is_inference_mode_enabled(),
        )

    def keep(self, f: Callable[[Tensor], Value]) -> Callable[[Tensor], Value]:
        """Return `f` under these modes, wherever it is called."""
        if not self.autocast and not self.inference:
            return f

        def evaluate(z: Tensor) -> Value:
            with (
                torch.inference_mode() if self.inference else nullcontext(),  # inference_mode(False) enables gradients
                torch.autocast(self.device_type, dtype=self.dtype, cache_enabled=self.cache, enabled=self.autocast),
            ):
                return f(z)

        return evaluate

    @contextmanager
    def algebra(self) -> Iterator[None]:
        """Run a solver's own arithmetic without autocast, and outside of inference mode."""
        with torch.autocast(self.device_type, enabled=False):
            if not self.inference:
                yield
                return
            with torch.inference_mode(False), torch.no_grad():
                yield
