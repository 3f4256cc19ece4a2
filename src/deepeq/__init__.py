"""Deep equilibrium models: equilibria `z* = f(z*, x)` as layers, with exact gradients and the memory of one layer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepeq.adjoint import Adjoint, BackpropAdjoint, ImplicitAdjoint, NeumannAdjoint, PhantomAdjoint
    from deepeq.cell import Cell
    from deepeq.deq import Equilibrium, Pieces, Stack
    from deepeq.layers import DEQ, Subsequences, Unrolled
    from deepeq.solution import ConvergenceError, ConvergenceWarning, Result, Solution
    from deepeq.solve import fixed_point, root_find
    from deepeq.solvers import (
        GMRES,
        Anderson,
        Broyden,
        ConjugateGradient,
        FixedPointIteration,
        NewtonKrylov,
        Solver,
    )
    from deepeq.stability import error_bound, jacobian_penalty, smallest_singular_value, spectral_radius

__version__ = "0.2.0.dev0"

__all__ = [
    "DEQ",
    "GMRES",
    "Adjoint",
    "Anderson",
    "BackpropAdjoint",
    "Broyden",
    "Cell",
    "ConjugateGradient",
    "ConvergenceError",
    "ConvergenceWarning",
    "Equilibrium",
    "FixedPointIteration",
    "ImplicitAdjoint",
    "NeumannAdjoint",
    "NewtonKrylov",
    "PhantomAdjoint",
    "Pieces",
    "Result",
    "Solution",
    "Solver",
    "Stack",
    "Subsequences",
    "Unrolled",
    "error_bound",
    "fixed_point",
    "jacobian_penalty",
    "root_find",
    "smallest_singular_value",
    "spectral_radius",
]

# Names are imported at their first use, because torch takes a second and `deepeq --help` does not need it.
_HOMES = {
    "adjoint": ("Adjoint", "BackpropAdjoint", "ImplicitAdjoint", "NeumannAdjoint", "PhantomAdjoint"),
    "cell": ("Cell",),
    "deq": ("Equilibrium", "Pieces", "Stack"),
    "layers": ("DEQ", "Subsequences", "Unrolled"),
    "solution": ("ConvergenceError", "ConvergenceWarning", "Result", "Solution"),
    "solve": ("fixed_point", "root_find"),
    "solvers": ("GMRES", "Anderson", "Broyden", "ConjugateGradient", "FixedPointIteration", "NewtonKrylov", "Solver"),
    "stability": ("error_bound", "jacobian_penalty", "smallest_singular_value", "spectral_radius"),
}


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    try:
        value = import_module(f"deepeq.{name}") if home is None else getattr(import_module(f"deepeq.{home}"), name)
    except ModuleNotFoundError as error:
        if error.name != f"deepeq.{name}":  # a package that this part needs is not installed
            raise
        raise AttributeError(f"module 'deepeq' has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
