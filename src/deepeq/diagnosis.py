"""Sentences about a search that failed: which problem, how far it came, and what to change."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deepeq.solution import ConvergenceError, ConvergenceWarning, Solution
from deepeq.solvers import GMRES
from deepeq.solvers.base import Solver

Kind = Literal["fixed point", "root", "linear"]
OnFailure = Literal["ignore", "warn", "raise"]
"""What happens when a solve misses its tolerance: nothing, a `ConvergenceWarning`, or a `ConvergenceError`."""

_LIBRARIES = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))


def report(message: str, solution: Solution, on_failure: OnFailure) -> None:
    """Raise, warn, or ignore, as the caller of a solve wishes.

    Args:
        message: What happened, and what to change.
        solution: The solution that missed its tolerance; the error carries it.
        on_failure: What to do. A warning points at the first line of the stack that is outside of libraries.

    Raises:
        ConvergenceError: `on_failure` is "raise".
    """
    if on_failure == "raise":
        raise ConvergenceError(message, solution)
    if on_failure == "warn":
        level, frame = 1, sys._getframe(0)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
            level, frame = level + 1, frame.f_back
        warnings.warn(message, ConvergenceWarning, stacklevel=level)


def explain_steps(
    solution: Solution, solver: Solver, absolute: Tensor, *, kind: Kind = "fixed point", resolution: float = 0.0
) -> str:
    """Return why the worst problem may have missed its tolerance, and what to change.

    Args:
        solution: A solution that did not converge.
        solver: The solver that found it.
        absolute: Absolute residual of each problem at each step, `(steps, B)`.
        kind: What was searched for; "linear" is the affine fixed point of a backward pass.
        resolution: Relative rounding of the map, where it is coarser than the dtype of the solution.
    """
    if not len(solution.residual_history):
        return f"max_steps=0 of {type(solver).__name__} runs no search, so the first state was returned unchanged"
    worst = int(torch.where(solution.converged, -torch.inf, solution.relative_residual).argmax())
    residual, steps = float(solution.relative_residual[worst]), int(solution.num_steps[worst])
    problem = f"problem {worst} of {len(solution.relative_residual)} (counted from 0)"
    smallest = float(solution.residual_history[:, worst].nan_to_num(torch.inf).min())
    if kind == "fixed point" and not solver.atol and smallest <= solver.rtol and steps >= solver.min_steps:
        return (
            f"{problem} has no equilibrium in sight after {steps} steps: its state grows while f(z) - z does not "
            "shrink, so a small relative residual says nothing; put a normalization or a bounded function around the "
            "whole of f"
        )
    digits = 1 if residual > 1.05 * solver.rtol else 4
    reached = (
        f"the residual of {problem} is {residual:.{digits}e} after {steps} steps, above its tolerance "
        f"(rtol={solver.rtol:g}, atol={solver.atol:g})"
    )
    if kind == "linear":
        other = "" if isinstance(solver, GMRES) else ", or take GMRES()"
        generic = f"raise max_steps, loosen {_HOW_FAR[_tolerance(solver, solution, resolution)]}{other}"
        return f"{reached}; {solver.advice(len(solution.residual_history)) or generic}"
    return (
        f"{reached}; {_about_vectors(solution)}{_advice(solution, solver, worst, absolute[:, worst], kind, resolution)}"
    )


def _advice(solution: Solution, solver: Solver, worst: int, sizes: Tensor, kind: Kind, resolution: float) -> str:
    history, sizes = (row.nan_to_num(torch.inf) for row in (solution.residual_history[:, worst], sizes))
    residual, absolute = float(solution.relative_residual[worst]), float(solution.absolute_residual[worst])
    half, tolerance = len(history) // 2, _tolerance(solver, solution, resolution)
    own = solver.advice(len(history))
    # Of a state that grows without bound, the relative residual stays the same.
    if len(history) > 2 and not all(row[-1] <= 10 * row.min() for row in (history, sizes)):
        others = [other for other in _SAFER if not other.startswith(type(solver).__name__)]
        away = (
            "the iteration moves away from its best point: try damping, a normalization inside the map, or "
            f"{' or '.join(others)}"
        )
        return f"{away}. Besides, {own}" if own else away
    if half and float(history[half:].min()) < 0.5 * float(history[:half].min()):
        falling = f"the residual is still falling: raise max_steps, or loosen {tolerance}"
        return f"{falling}. If that does not help, {own}" if own else falling
    if residual <= max(30 * torch.finfo(solution.relative_residual.dtype).eps, 2 * resolution):
        return f"the residual is at rounding level: raise {_HOW_FAR[tolerance]}, or use a wider dtype"
    if kind == "fixed point" and residual > 0.1 and absolute < 1e-3 * float(sizes[0]):
        remedy = "raise max_steps or atol" if solver.atol else "set atol"
        return f"the equilibrium seems to be near zero, where a relative residual says little: {remedy}"
    if own:
        return own
    others = [other for other in _OTHERS if not other.startswith(type(solver).__name__)]
    remedy = "make the map more contractive (deepeq.jacobian_penalty)"
    if kind == "root":
        remedy = "start elsewhere, or divide g and z by their typical sizes"
    none = ", if there is an equilibrium at all" if residual > 0.1 and kind == "fixed point" else ""
    return f"the residual has stopped falling: try {' or '.join(others)}, {remedy}, or loosen {tolerance}{none}"


def _tolerance(solver: Solver, solution: Solution, resolution: float) -> str:
    """Return the name of the tolerance that is set; a backward pass has an rtol of the size of rounding in any case."""
    rounding = 2.0 * max(torch.finfo(solution.relative_residual.dtype).eps, resolution)
    return "atol" if solver.atol and solver.rtol <= rounding else "rtol"


def _about_vectors(solution: Solution) -> str:
    count, size = solution.value.shape
    if size > 1 or count == 1:
        return ""
    return (
        f"each of the {count} numbers of the state was taken for a problem of its own: if they are one vector, give z0 "
        f"the shape (1, {count}), or set batch_dims=0. If they are not: "
    )


_HOW_FAR = {"rtol": "rtol (to 1e-2 where f works in 16 bits)", "atol": "atol"}
_SAFER = ("Broyden(line_search_steps=5)", "NewtonKrylov()")
_OTHERS = ("Broyden(max_steps=200, history_size=200)", "Anderson(max_steps=100)", "NewtonKrylov()")


def explain_nonfinite(solution: Solution, broken: Tensor, name: str, *, at_end: bool = False) -> str:
    """Return which problem broke first, at which step, and where to look.

    Args:
        solution: A solution with a problem that broke.
        broken: Which problems did, bool `(B,)`.
        name: What was evaluated.
        at_end: It broke at the returned state, after the search.
    """
    steps = torch.where(broken, solution.num_steps, torch.iinfo(torch.int64).max)
    problem, others = int(steps.argmin()), int(broken.sum()) - 1
    step = int(steps[problem])
    where = f"at step {step}{' (the first evaluation, at z0)' if step == 1 else ''}"
    more = f", and in {others} more" if others else ""
    return (
        f"{name} returned a non-finite value {'at the returned state' if at_end else where}, in problem {problem} of "
        f"{len(broken)} (samples are counted from 0){more}: look for NaN in the inputs and parameters, then for a "
        "diverging iteration (Broyden or Anderson instead of plain iteration, damping, a normalization inside f, a "
        "lower learning rate)"
    )


def explain_inconsistency(solution: Solution, name: str) -> str:
    """Return why one evaluation at the returned state contradicts the residuals that were measured before."""
    worst = float(solution.relative_residual.nan_to_num(0.0).max())
    num_problems = len(solution.relative_residual)
    causes = f"{name} is random or changes from call to call: fix its random numbers for the whole solve"
    if num_problems > 1:
        causes = (
            f"the state was taken for {num_problems} independent problems, but they depend on each other: set "
            f"batch_dims=0 for one coupled state, or segments for ragged problems. Or {causes}"
        )
    return (
        f"evaluated again at the returned state, {name} has residuals up to {worst:.1e}, which differ from those of "
        f"the search; {_about_vectors(solution)}{causes}"
    )


def explain_randomness(name: str) -> str:
    """Return that two evaluations at one point differ as much as the residual that is left."""
    return (
        f"two evaluations of {name} at the same state differ, so there is no equilibrium to find: {name} draws random "
        "numbers, as ordinary dropout does. Draw them once per solve (deepeq.nn.VariationalDropout, or in "
        "inject), or call eval()"
    )


def explain_error(error: Exception, name: str, state: Any) -> str:
    """Return what the first evaluation was called with, where that may be why it failed; else an empty string.

    Args:
        error: What the function raised.
        name: What was evaluated.
        state: The first state.
    """
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, tuple | list) else (state,)
    shapes = ", ".join(str(tuple(part.shape)) for part in parts if isinstance(part, Tensor))
    if isinstance(error, TypeError) and "positional argument" in str(error) and not isinstance(state, Tensor):
        return (
            f"{name} is called with the whole state as one argument, here a {type(state).__name__} of {len(state)}; "
            f"take one argument and unpack it inside {name} ({error})"
        )
    if isinstance(error, RuntimeError) and ("shape" in str(error) or "size" in str(error)):
        return (
            f"{name} fails at the first state, of shape {shapes}: {error}. A layer starts from zeros shaped like its "
            "input: if the state has another shape, define initial_state(x) in the cell or give z0; if the input has "
            "another width than the state, project it (a Linear in inject)"
        )
    return ""
