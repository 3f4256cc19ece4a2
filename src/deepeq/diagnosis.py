"""Sentences about a search that failed: which problem, how far it came, and what to change."""

import torch
from torch import Tensor

from deepeq.solution import Result, Solution
from deepeq.solvers.base import Solver


def explain_steps(
    solution: Solution, solver: Solver, first: Tensor, *, linear: bool = False, resolution: float = 0.0
) -> str:
    """Return why the worst problem may have missed its tolerance, and what to change.

    Args:
        solution: A solution that did not converge.
        solver: The solver that found it.
        first: Absolute residual of each problem at the first point, `(B,)`.
        linear: The map is the affine one of a backward pass.
        resolution: Relative rounding of the map, where it is coarser than the dtype of the solution.
    """
    if not len(solution.trace):
        return f"max_steps=0 of {type(solver).__name__} looks for no equilibrium, and returns the first state as it is"
    worst = int(torch.where(solution.converged, -torch.inf, solution.residual).argmax())
    residual = float(solution.residual[worst])
    reached = (
        f"the residual of problem {worst} of {len(solution.residual)} (counted from 0) is {residual:.1e} after "
        f"{int(solution.num_steps[worst])} steps, above its tolerance (rtol={solver.rtol:g}, atol={solver.atol:g})"
    )
    if linear:
        return f"{reached}; raise max_steps, loosen rtol (to 1e-2 where f works in 16 bits), or solve it with GMRES()"
    return f"{reached}; {_advice(solution, solver, worst, float(first[worst]), resolution)}"


def _advice(solution: Solution, solver: Solver, worst: int, first: float, resolution: float) -> str:
    history = solution.trace[:, worst]
    residual, absolute = float(solution.residual[worst]), float(solution.absolute_residual[worst])
    history = torch.where(torch.isfinite(history), history, torch.inf)
    half = len(history) // 2
    last, least = float(history[-1]), float(history.min())
    if residual <= max(30 * torch.finfo(solution.residual.dtype).eps, 2 * resolution):
        return "its precision resolves no more: raise rtol (to 1e-2 where f works in 16 bits), or take a wider dtype"
    if residual > 0.1 and absolute < 1e-3 * first:
        return "the equilibrium seems to be near zero, where a relative residual says little: set atol"
    if len(history) > 2 and not last <= 10 * least:
        return (
            f"{_with_semicolon(solver.advice(len(history)))}the iteration moves away from its best point: try "
            "Broyden(line_search_steps=5), NewtonKrylov(), damping, or a normalization inside the map"
        )
    own = solver.advice(len(history))
    if own:
        return own
    if half and float(history[half:].min()) < 0.5 * float(history[:half].min()):
        return "it is still falling: raise max_steps, or loosen rtol"
    return (
        "it falls no more: loosen rtol, try another solver (Anderson, Broyden, NewtonKrylov) or a longer history, or "
        "make the map more contractive (deepeq.jacobian_penalty)"
    )


def _with_semicolon(sentence: str) -> str:
    return f"{sentence}; " if sentence else ""


def explain_nonfinite(solution: Solution, broken: Tensor, name: str) -> str:
    """Return which problem broke first, at which step, and where to look.

    Args:
        solution: A solution with a problem that broke.
        broken: Which problems did, bool `(B,)`.
        name: What was evaluated.
    """
    steps = torch.where(broken, solution.num_steps, torch.iinfo(torch.int64).max)
    problem = int(steps.argmin())
    step = int(steps[problem])
    where = " (the first evaluation, at z0)" if step == 1 else ""
    others = int(broken.sum()) - 1
    more = f", and in {others} more" if others else ""
    return (
        f"{name} returned a non-finite value at step {step}{where}, in problem {problem} of {len(broken)} (samples are "
        f"counted from 0){more}: {Result.NONFINITE.value}"
    )


def explain_inconsistency(solution: Solution, name: str) -> str:
    """Return why one evaluation at the returned state contradicts the residuals that were measured before."""
    worst = float(solution.residual.nan_to_num(0.0).max())
    causes = f"{name} is random or changes from call to call, so fix its random numbers for the whole solve"
    if len(solution.residual) > 1:
        causes = (
            "the problems depend on each other, so say what one problem is (batch_dims=0 for one coupled state, "
            f"segments for ragged ones), or {causes}"
        )
    return f"{name} leaves a residual of {worst:.1e} at the returned state, more than was measured on the way: {causes}"
