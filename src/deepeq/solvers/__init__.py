"""Rules that find a fixed point; `deepeq.iterate` runs them."""

from deepeq.solvers.anderson import Anderson
from deepeq.solvers.base import Solver
from deepeq.solvers.broyden import Broyden
from deepeq.solvers.fixed_point_iteration import FixedPointIteration
from deepeq.solvers.gmres import GMRES

__all__ = ["GMRES", "Anderson", "Broyden", "FixedPointIteration", "Solver"]
