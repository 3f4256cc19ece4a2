"""The user's function, watched: what it returns, whether it leaves its argument alone, and why its first call fails."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepeq.diagnosis import explain_error
from deepeq.packing import Map, Packing


class Watched:
    """The user's function on packed states `(B, N)`, and the checks that it leaves its argument alone.

    Changes that a version counter does not see (through `.data` or numpy) are looked for at the first two points. A
    function that writes its results into buffers of its own is harmless: they are copied during the search.
    """

    def __init__(self, function: Callable[[Any], Any], packing: Packing, name: str) -> None:
        self._function, self._packing, self._name = function, packing, name
        if not callable(function):
            raise TypeError(f"{name}={function!r} must be a function of a state")
        self.num_calls = 0

    def rows(self, take: Callable[[Tensor], Callable[[Any], Any]] | None) -> Callable[[Tensor], Map] | None:
        """Return what makes the function of some problems of a batch, whose calls count here, from that of the user."""
        if take is None or not self._packing.is_batch:
            return None

        def of(index: Tensor) -> Map:
            function, packing = take(index), self._packing.with_batch(len(index))

            def call(flat: Tensor) -> Tensor:
                self.num_calls += 1
                value = packing.pack(function(packing.unpack(flat)), self._name)
                return value if packing.copies else value.clone()

            return call

        return of

    def __call__(self, flat: Tensor) -> Tensor:
        self.num_calls += 1
        if torch._C._are_functorch_transforms_active():  # a product in forward mode, of tensors without storage
            return self._packing.pack(self._function(self._packing.unpack(flat)), self._name)
        version = None if flat.is_inference() else flat._version
        before = flat.detach().clone() if self.num_calls <= 2 else None
        state = self._packing.unpack(flat)
        try:
            value = self._function(state)
        except (RuntimeError, TypeError) as error:
            # Errors of other classes, such as that of a solve inside of f, say more than a shape does.
            plain = self.num_calls == 1 and type(error) in (RuntimeError, TypeError)
            sentence = explain_error(error, self._name, state) if plain else ""
            if not sentence:
                raise
            raise type(error)(sentence) from error
        value = self._packing.pack(value, self._name)
        changed = version is not None and flat._version != version
        if changed or (before is not None and not torch.equal(before.nan_to_num(), flat.detach().nan_to_num())):
            raise ValueError(
                f"{self._name} changed its argument in place, and with it the iterate; use operations that make new "
                "tensors (inplace=False)"
            )
        return value if self._packing.copies or torch.is_grad_enabled() else value.clone()
