"""The entry points: `fixed_point` and `root_find`."""

from collections.abc import Callable
from typing import Any

import torch

from deepeq.adjoint import Adjoint, ImplicitAdjoint, first_nonfinite
from deepeq.packing import Packing
from deepeq.solution import ConvergenceError, Result, Solution
from deepeq.solvers import Broyden, Solver


def fixed_point(
    f: Callable[[Any], Any],
    z0: Any,
    *,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    throw: bool = False,
) -> Solution:
    """The equilibrium `z* = f(z*)`, found from `z0`, sample by sample.

    Costs at most `solver.max_steps` evaluations of `f`, and one more with a graph if gradients are enabled. States of
    16 bits are iterated in float32, and rounded for `f` and in the result; `residual` is that before the rounding.

    Args:
        f: Map of a state to a state of the same structure and shapes, pure in its argument. It may close over any
            tensors: all get their gradients. The samples of a batch must not mix if their answers are to be
            independent.
        z0: A tensor `(B, ...)`, or a tuple, list or dict of them. A tensor without dimensions is a batch of one.
        solver: The rule, its tolerances and step limit; default `Broyden()`.
        adjoint: How gradients are computed; default `ImplicitAdjoint()`, the exact ones.
        throw: Raise also when the step limit is reached.

    Returns:
        Solution; `value` has the structure, shapes and dtypes of `z0`, `residual` is `(B,)`.

    Raises:
        ConvergenceError: a non-finite value appeared (the message says at which step), or `throw` and not converged.
        ValueError: `f` changes structure or shape, or the tensors of `z0` disagree on the batch size.
        TypeError: a state is not made of floating-point tensors.

    References:
        Bai, Kolter, Koltun (2019), Deep equilibrium models, NeurIPS, eq. 2-11.

    Example:
        >>> f = lambda z: torch.cos(z)
        >>> deepeq.fixed_point(f, torch.zeros(1, 1), solver=deepeq.Anderson(rtol=1e-6)).value
        tensor([[0.7391]])
    """
    return _solve(f, z0, "f", lambda z, fz: fz, solver, adjoint, throw)


def root_find(
    g: Callable[[Any], Any],
    z0: Any,
    *,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    throw: bool = False,
) -> Solution:
    """The root `g(z*) = 0` near `z0`, as the fixed point of `f(z) = z + g(z)`.

    `residual` is that of `f`, `||g(z)|| / ||z + g(z)||`; set `atol` to bound `||g(z)||` itself. Arguments, errors and
    costs are those of `fixed_point`.
    """
    return _solve(g, z0, "g", torch.add, solver, adjoint, throw)


def check_rules(solver: Solver | None, adjoint: Adjoint | None) -> tuple[Solver, Adjoint]:
    """The solver and the adjoint, or the defaults for None.

    Raises:
        TypeError: one of them is something else.
    """
    solver = Broyden() if solver is None else solver
    adjoint = ImplicitAdjoint() if adjoint is None else adjoint
    if not isinstance(solver, Solver):
        raise TypeError(f"solver={solver!r} must be a Solver, such as Broyden(rtol=1e-3)")
    if not isinstance(adjoint, Adjoint):
        raise TypeError(f"adjoint={adjoint!r} must be an Adjoint, such as ImplicitAdjoint()")
    return solver, adjoint


def _solve(
    function: Callable[[Any], Any],
    z0: Any,
    name: str,
    as_map: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    solver: Solver | None,
    adjoint: Adjoint | None,
    throw: bool,
) -> Solution:
    solver, adjoint = check_rules(solver, adjoint)
    packing = Packing(z0)

    def packed(flat: torch.Tensor) -> torch.Tensor:
        version = None if flat.is_inference() else flat._version
        fz = packing.pack(function(packing.unpack(flat)), name)
        if version is not None and flat._version != version:
            raise ValueError(
                f"{name} changed its argument in place, and with it the iterate; use operations that make new tensors "
                "(inplace=False)"
            )
        return as_map(flat, fz)

    solution = adjoint.solve(packed, packing.pack(z0, "z0"), solver)
    solution = solution._replace(value=packing.unpack(solution.value))
    if solution.result is Result.NONFINITE:
        step = first_nonfinite(solution)
        where = " (the first evaluation, at z0)" if step == 1 else ""
        raise ConvergenceError(
            f"{name} returned a non-finite value at step {step}{where}: {solution.result.value}", solution
        )
    if throw and solution.result is not Result.CONVERGED:
        worst = float(solution.residual.max())
        raise ConvergenceError(
            f"residual {worst:.1e} after {solution.num_evals} evaluations: {solution.result.value}", solution
        )
    return solution
