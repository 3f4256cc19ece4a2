"""Deep equilibrium models: equilibria `z* = f(z*, x)` as layers, with exact gradients and the memory of one layer."""

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

__version__ = "0.1.0"

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
