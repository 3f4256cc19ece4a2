"""Parametrized weights that are computed once per solve.

PyTorch computes a weight under `torch.nn.utils.parametrize` at every access, which in a solve means at every
evaluation. `OncePerSolve` (for cells) and `hold_weights` (for any map) compute it once, with its graph, and hold it
while a solve runs.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


class HeldWeights:
    """The parametrized weights of a module, computed once and held for every later call; see `hold_weights`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._values = []
        for owner, name in _parametrized_tensors(module):
            _look_up_first(owner, name)
            self._values.append((owner, name, getattr(owner, name)))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let every access to one of the weights return its held value, in this thread, while the context lasts."""
        before = _HELD.values
        _HELD.values = before | {(id(owner), name): value for owner, name, value in self._values}
        try:
            yield
        finally:
            _HELD.values = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.in_place():
            return self.module(*args, **kwargs)


def hold_weights(module: nn.Module) -> HeldWeights:
    """Return a callable that evaluates `module` with its parametrized weights as they are computed now.

    Every tensor under `torch.nn.utils.parametrize` in the module or below is computed here, once: normalized weights,
    and random ones such as `WeightDropout`, which are thus the same in all calls. They keep their graph, so that each
    call passes gradients to the original parameters; a search under `no_grad` loses nothing. Nothing is stored on the
    module. Call this once per solve, with gradients enabled where gradients are wanted:

        held = hold_weights(module)
        solution = deepeq.fixed_point(lambda z: held(z, x), z0)

    A later update of a parameter does not reach a callable made before it. Checkpoint whole calls, not parts of the
    module: a part that is computed again outside a call would compute its weights again.
    """
    return HeldWeights(module)


class OncePerSolve(nn.Module):
    """A cell that computes the parametrized weights of another cell once per solve, in `inject`.

    Takes the place of the wrapped cell: `deepeq.DEQ(OncePerSolve(cell))`. All that `hold_weights` says holds for each
    solve. If the wrapped cell has `inject`, it runs with the held weights. The wrapper has its
    `initial_state`, `output` and `extend_memory`, and no other optional method.

    Args:
        cell: A module called as `cell(z, injection)`.

    Raises:
        TypeError: `cell` is not a module.
        ValueError: `inject` is given memory for a cell that takes none.
    """

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell must be a torch.nn.Module called as cell(z, injection), got {type(cell).__name__}")
        self.cell = cell
        # Set on the instance, so that `deepeq.cell.implements` sees only methods that the wrapped cell has.
        for name in ("initial_state", "output", "extend_memory"):
            if hasattr(cell, name):
                setattr(self, name, getattr(cell, name))

    def shared_weights(self) -> "SharedWeights":
        """Return the weights of one solve, which several solves can share by `inject(x, memory, weights)`."""
        held = hold_weights(self.cell)
        compute: Callable[[], Any] | None = getattr(self.cell, "shared_weights", None)
        if compute is None:
            return SharedWeights(held)
        with held.in_place():
            own = compute()
        return SharedWeights(held, () if own is None else (own,))  # None is the default of `Cell`

    def inject(self, x: Any, memory: Any = None, weights: "SharedWeights | None" = None) -> "HeldInjection":
        """Return the held weights with the injection of the wrapped cell, which is `x` for a cell without `inject`.

        Args:
            x: Input of the wrapped cell.
            memory: Memory of the wrapped cell, if it has one.
            weights: What `shared_weights` returned; None to compute the weights for this solve alone.

        Raises:
            ValueError: `memory` is given, but the wrapped cell has no `inject`.
        """
        shared = SharedWeights(hold_weights(self.cell)) if weights is None else weights
        inject: Callable[..., Any] | None = getattr(self.cell, "inject", None)
        if inject is not None:
            with shared.held.in_place():
                return HeldInjection(shared.held, inject(x, memory, *shared.own))
        if memory is not None:
            raise ValueError(f"memory was given, but {type(self.cell).__name__} has no inject(x, memory) to take it")
        return HeldInjection(shared.held, x)

    def forward(self, z: Any, injection: "HeldInjection") -> Any:
        with injection.held.in_place():
            return self.cell(z, injection.injection)


class SharedWeights(NamedTuple):
    """What the solves of one sequence share."""

    held: HeldWeights
    own: tuple[Any, ...] = ()
    """The result of the wrapped cell's own `shared_weights()`, if it has one."""


class HeldInjection(NamedTuple):
    """What `OncePerSolve.inject` prepares for one solve."""

    held: HeldWeights
    injection: Any
    """The injection of the wrapped cell."""


class _Held(threading.local):
    """The weights in force in this thread: one thread's evaluation must not see another's."""

    def __init__(self) -> None:
        self.values: dict[tuple[int, str], Tensor] = {}


_HELD = _Held()


class _HeldProperty(property):
    """A parametrized tensor that is looked up among the held weights before it is computed."""


def _look_up_first(owner: nn.Module, name: str) -> None:
    """Make the property by which PyTorch computes a parametrized tensor look for a held value first.

    The property belongs to a class that PyTorch makes for this module and its copies alone.
    """
    cls = next((cls for cls in type(owner).__mro__ if name in vars(cls)), None)
    if cls is None or isinstance(vars(cls)[name], _HeldProperty):
        return
    computed: property = vars(cls)[name]
    compute = computed.fget
    assert compute is not None

    def get(self: nn.Module) -> Tensor:
        value = _HELD.values.get((id(self), name))
        return compute(self) if value is None else value

    setattr(cls, name, _HeldProperty(get, computed.fset))


def _parametrized_tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the owner and the name of each parametrized tensor.

    Those inside a parametrization are left out: computing the outer tensor reads them.
    """
    pending, seen = [module], set()
    while pending:
        owner = pending.pop()
        if owner in seen:
            continue
        seen.add(owner)
        parametrized = is_parametrized(owner)
        if parametrized:
            assert isinstance(owner.parametrizations, nn.ModuleDict)
            yield from ((owner, name) for name in owner.parametrizations)
        children = [
            child for name, child in owner.named_children() if not (parametrized and name == "parametrizations")
        ]
        pending += reversed(children)
