"""Rules that find a fixed point; `deepeq.iterate` runs them."""

from deepeq.solvers.anderson import Anderson
from deepeq.solvers.base import Solver
from deepeq.solvers.broyden import Broyden
from deepeq.solvers.conjugate_gradient import ConjugateGradient
from deepeq.solvers.fixed_point_iteration import FixedPointIteration
from deepeq.solvers.gmres import GMRES
from deepeq.solvers.newton_krylov import NewtonKrylov

__all__ = ["GMRES", "Anderson", "Broyden", "ConjugateGradient", "FixedPointIteration", "NewtonKrylov", "Solver"]
