"""Deep equilibrium models: equilibria `z* = f(z*, x)` as layers, with exact gradients and the memory of one layer."""

from deepeq.adjoint import Adjoint, BackpropAdjoint, ImplicitAdjoint, NeumannAdjoint, PhantomAdjoint
from deepeq.deq import DEQ, Unrolled
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
from deepeq.subsequences import Subsequences
from deepeq.universality import stack, weight_tied

__version__ = "0.1.0"

__all__ = [
    "DEQ",
    "GMRES",
    "Adjoint",
    "Anderson",
    "BackpropAdjoint",
    "Broyden",
    "ConjugateGradient",
    "ConvergenceError",
    "ConvergenceWarning",
    "FixedPointIteration",
    "ImplicitAdjoint",
    "NeumannAdjoint",
    "NewtonKrylov",
    "PhantomAdjoint",
    "Result",
    "Solution",
    "Solver",
    "Subsequences",
    "Unrolled",
    "error_bound",
    "fixed_point",
    "jacobian_penalty",
    "root_find",
    "smallest_singular_value",
    "spectral_radius",
    "stack",
    "weight_tied",
]
