"""The entry points: `fixed_point` and `root_find`."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from deepeq.adjoint import Adjoint, BackpropAdjoint, ImplicitAdjoint
from deepeq.checks import check_choice
from deepeq.diagnosis import OnFailure, explain_randomness, report
from deepeq.norms import safe_two_norm
from deepeq.packing import Map, Norm, Packing
from deepeq.problem import Problem
from deepeq.scaling import automatic_scale
from deepeq.solution import ConvergenceError, Result, Solution, State
from deepeq.solvers import Anderson, NewtonKrylov, Solver
from deepeq.watched import Watched

Nonfinite = Literal["raise", "keep"]
"""What happens when a value is not finite: an error after the other problems are solved, or a Solution that says so."""


Function = TypeVar("Function", bound=Callable[..., Any])


def without_compiling(function: Function) -> Function:
    """Return a function that `torch.compile` leaves as it is, and calls between two of its graphs.

    `torch.compile` could lose the backward pass of an `autograd.Function`, and it cannot trace a search of unknown
    length. `torch.compiler.disable` is called at the first call and not here, because it imports the compiler.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(Function, call)


@without_compiling
def fixed_point(
    f: Callable[[State], State],
    z0: State,
    *,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    batch_dims: int = 1,
    segments: Tensor | None = None,
    norm: Norm = "parts",
    keep: Sequence[int] = (),
    on_failure: OnFailure = "warn",
    nonfinite: Nonfinite = "raise",
    verify: bool = True,
    callback: Callable[[int, Any, Tensor], None] | None = None,
    throw: bool = False,
) -> Solution[State]:
    """Return the equilibrium `z* = f(z*)`, found from `z0`, problem by problem.

    The search evaluates `f` at most `solver.max_steps` times (`NewtonKrylov` needs more). The check of `verify`, the
    graph for gradients and each state of `keep` may cost further evaluations; `Solution.num_evals` counts all of them.
    States of 16 bits are iterated in float32, and rounded for `f` and in the result; residuals are those before the
    rounding.

    Args:
        f: Map of a state to a state of the same structure and shapes, pure in its argument. It may close over any
            tensors: all get their gradients. If it has a method `take(indices)` that returns the map of some of the
            problems, those that are done may leave the evaluations.
        z0: A real or complex tensor, or a tuple, list or dict of them; `(B, ...)` for `B` independent problems.
        solver: The rule, its tolerances and step limit; default `Anderson()`.
        adjoint: How gradients are computed; default `ImplicitAdjoint()`, the exact ones.
        batch_dims: Number of leading dimensions of `z0` that index independent problems. With 0 the whole state is one
            coupled problem, such as the nodes of a graph or a self-consistent field.
        segments: Problem of each row, `(R,)` integers, for ragged problems with states `(R, ...)`, such as a batch of
            graphs or molecules.
        norm: What is compared with the tolerances, see `deepeq.packing.Norm`; by default each tensor of the state.
        keep: Steps, counted from 1, whose states are returned in `Solution.kept`, in this order, for losses along the
            way. The state of a step is `f` of the point that it evaluated, `f(z0)` for step 1, differentiable through
            this one evaluation. Steps after the end of the search give the returned value.
        on_failure: What happens when a problem misses its tolerance.
        nonfinite: `"raise"` raises an error after the other problems are solved. `"keep"` returns the Solution, whose
            failed problems hold their best finite point, and treats the failure like a missed tolerance. Gradients of
            tensors that a failed problem shares with others are then not finite: take it out of the batch.
        verify: Check that the problems do not depend on each other: that their residuals hold together at the returned
            state. With gradients this usually costs no evaluation of `f`; without them, and with `BackpropAdjoint`, at
            most one. If a warning or an error is due, two more tell whether `f` is random.
        callback: Observer called as `callback(step, state, residual)` after each evaluation of the search.
        throw: Older spelling of `on_failure="raise"`.

    Returns:
        Solution; `value` has the structure, shapes and dtypes of `z0`, the residuals are one number per problem.

    Raises:
        ConvergenceError: A non-finite value appeared (the message names the problem and the step), or a problem missed
            its tolerance with `on_failure="raise"`. Its `solution` holds all the problems.
        ValueError: `f` changes structure, shape, or its argument; or an argument is out of range.
        TypeError: A state is not made of floating-point or complex tensors.
        NotImplementedError: The call is inside a `torch.func` transform that cannot pass through it.

    References:
        Bai, Kolter, Koltun (2019), Deep equilibrium models, NeurIPS, eq. 2-11.

    Example:
        >>> with torch.no_grad():
        ...     deepeq.fixed_point(torch.cos, torch.zeros(1, 1), solver=deepeq.Anderson(rtol=1e-6)).value
        tensor([[0.7391]])
    """
    solver, adjoint = check_rules(solver, adjoint)
    options = _Options(keep, "raise" if throw else on_failure, nonfinite, callback)
    packing = Packing(z0, batch_dims, segments)
    function = Watched(f, packing, "f")
    problem = Problem(
        function=function,
        norm=packing.norm(norm),
        sizes=packing.sizes,
        resolution=packing.resolution,
        verify=verify,
        take=None if solver.min_steps else function.rows(getattr(f, "take", None)),
        name="f",
    )
    _refuse_transforms(adjoint)
    return _solve(problem, packing, packing.pack(z0, "z0"), solver, adjoint, options, function)


@without_compiling
def root_find(
    g: Callable[[State], State],
    z0: State,
    *,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    batch_dims: int = 1,
    segments: Tensor | None = None,
    norm: Norm = "parts",
    keep: Sequence[int] = (),
    on_failure: OnFailure = "warn",
    nonfinite: Nonfinite = "raise",
    verify: bool = True,
    callback: Callable[[int, Any, Tensor], None] | None = None,
    throw: bool = False,
) -> Solution[State]:
    """Return the root `g(z*) = 0` near `z0`.

    A problem has converged when `||g(z)|| <= atol + rtol ||g(z0)||`; neither the units of `g` nor the place of the
    root matter. What rounding errors of `z` leave of `g` also counts as converged. A few evaluations of `g` near
    `z0`, nearly always one, find a scale and a sign `a`, so that `z + a g(z)` is a sensible map.
    `Solution.relative_residual` is `||g(z)|| / ||g(z0)||`, and `absolute_residual` is `||g(z)||`.

    The default solver is `NewtonKrylov`, to two thirds of the digits of the dtype.

    Args:
        g: Map whose root is searched for; its value has the structure and the shapes of `z0`.
        z0: First state.
        solver: A solver; default `NewtonKrylov`.
        adjoint: As in `fixed_point`.
        batch_dims: As in `fixed_point`.
        segments: As in `fixed_point`.
        norm: As in `fixed_point`.
        keep: As in `fixed_point`.
        on_failure: As in `fixed_point`.
        nonfinite: As in `fixed_point`.
        verify: As in `fixed_point`.
        callback: As in `fixed_point`.
        throw: As in `fixed_point`.

    Raises:
        The same errors as `fixed_point`.
    """
    packing = Packing(z0, batch_dims, segments)
    solver, adjoint = check_rules(solver or default_root_solver(packing), adjoint)
    options = _Options(keep, "raise" if throw else on_failure, nonfinite, callback)
    function, start = Watched(g, packing, "g"), packing.pack(z0, "z0")
    _refuse_transforms(adjoint)
    with torch.no_grad():
        first = function(start.detach())
        scale = automatic_scale(function, start.detach(), first)
        measure = packing.norm(norm)
        rounding = _rounding(function, start.detach(), first, scale, measure)
    with_graph = isinstance(adjoint, BackpropAdjoint) and torch.is_grad_enabled()
    problem = Problem(
        function=function,
        norm=measure,
        sizes=packing.sizes,
        root=True,
        scale=scale,
        rounding=rounding,
        first=None if with_graph else first,
        resolution=packing.resolution,
        verify=verify,
        name="g",
    )
    return _solve(problem, packing, start, solver, adjoint, options, function)


def _rounding(g: Map, z0: Tensor, g0: Tensor, scale: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Return the rounding level of `g` at `z0` for each number of the norm; None where `z0` is far from a root.

    It is what a relative change of the components of `z0` by a few units in the last place does to `g`, measured with
    a larger change.
    """
    first, eps = norm(g0), torch.finfo(z0.dtype).eps
    if first.ndim == 1 and not bool((safe_two_norm(scale * g0) < 1e-3 * safe_two_norm(z0)).any()):
        return None
    signs = 1.0 - 2.0 * (torch.arange(z0.shape[1], device=z0.device) * 0.6180339887 % 1.0 > 0.5).to(z0.dtype)
    change = norm(g(z0 + eps**0.5 * signs * z0) - g0)
    rounding = 10.0 * eps**0.5 * change
    return torch.where(torch.isfinite(rounding), rounding, 0.0)


def default_root_solver(packing: Packing) -> Solver:
    """Return the solver that `root_find` takes where none is given, to two thirds of the digits of the state."""
    rtol = max(torch.finfo(packing.dtype).eps ** (2 / 3), 2 * packing.resolution)
    return NewtonKrylov(rtol=rtol, max_steps=200)


def check_rules(solver: Solver | None, adjoint: Adjoint | None) -> tuple[Solver, Adjoint]:
    """Return the solver and the adjoint, or the defaults for None.

    Raises:
        TypeError: One of them is something else.
    """
    solver = Anderson() if solver is None else solver
    adjoint = ImplicitAdjoint() if adjoint is None else adjoint
    if not isinstance(solver, Solver):
        raise TypeError(f"solver={solver!r} must be a Solver, such as Anderson(rtol=1e-3)")
    if not isinstance(adjoint, Adjoint):
        raise TypeError(f"adjoint={adjoint!r} must be an Adjoint, such as ImplicitAdjoint()")
    return solver, adjoint


class _Options:
    """The checked arguments of a solve that say what is reported."""

    def __init__(
        self,
        keep: Sequence[int],
        on_failure: OnFailure,
        nonfinite: Nonfinite,
        callback: Callable[[int, Any, Tensor], None] | None,
    ) -> None:
        steps = tuple(keep) if isinstance(keep, Sequence) else (keep,)
        if not isinstance(keep, Sequence) or any(type(step) is not int or step < 1 for step in steps):
            raise ValueError(f"keep={keep!r} must be a list or tuple of whole numbers >= 1, the steps to keep")
        self.keep: tuple[int, ...] = steps
        check_choice("on_failure", on_failure, OnFailure)
        check_choice("nonfinite", nonfinite, Nonfinite)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback={callback!r} must be a function of the step, the state and the residuals")
        self.on_failure: OnFailure = on_failure
        self.nonfinite, self.callback = nonfinite, callback


def _solve(
    problem: Problem,
    packing: Packing,
    z0: Tensor,
    solver: Solver,
    adjoint: Adjoint,
    options: _Options,
    function: "Watched",
) -> Solution:
    observe = options.callback

    def on_step(step: int, z: Tensor, residual: Tensor) -> None:
        assert observe is not None
        observe(step, packing.unpack(z.clone()), packing.per_problem(residual.to(z.dtype)))

    solution = adjoint.solve(problem, z0, solver, keep=options.keep, on_step=on_step if observe else None)
    per_problem = packing.per_problem
    failed = solution.result is Result.MAX_STEPS and bool(len(solution.residual_history))
    if failed and problem.verify and options.on_failure != "ignore" and _is_random(problem, solution.value.detach()):
        solution = solution._replace(message=explain_randomness(problem.name))
    solution = solution._replace(
        value=packing.unpack(solution.value),
        num_evals=function.num_calls,
        relative_residual=per_problem(solution.relative_residual),
        converged=per_problem(solution.converged),
        num_steps=per_problem(solution.num_steps),
        residual_history=per_problem(solution.residual_history),
        absolute_residual=per_problem(solution.absolute_residual),
        kept=tuple(packing.unpack(state) for state in solution.kept),
    )
    if solution.result is Result.NONFINITE and options.nonfinite == "raise":
        others = "" if packing.batch_size == 1 else "; error.solution and nonfinite='keep' give the other problems"
        raise ConvergenceError(f"{solution.message}{others}", solution)
    if solution.message:
        report(solution.message, solution, options.on_failure)
    return solution


@torch.no_grad()
def _is_random(problem: Problem, z: Tensor) -> bool:
    """Return whether two evaluations at one point differ by a tenth of the residual or more."""
    (a, g, _), (b, _, _) = problem.evaluate(z), problem.evaluate(z)
    return bool((safe_two_norm(a - b) > 0.1 * safe_two_norm(g)).any())


def _refuse_transforms(adjoint: Adjoint) -> None:
    """Raise where a `torch.func` transform would break in the middle of a solve, or drop a derivative."""
    if not torch._C._are_functorch_transforms_active():  # there is no public name for this question
        return
    stack = torch._C._functorch.get_interpreter_stack() or ()  # pyright: ignore[reportAttributeAccessIssue]
    active = {str(level.key()).rpartition(".")[2] for level in stack}
    if isinstance(adjoint, BackpropAdjoint) and "Vmap" not in active:
        return
    raise NotImplementedError(
        f"torch.func transforms ({', '.join(sorted(active))}) cannot pass through an equilibrium; use "
        "torch.autograd.grad, torch.autograd.functional.jacobian, or hvp with "
        "ImplicitAdjoint(twice_differentiable=True), put batches into z0 in place of vmap, or take BackpropAdjoint() "
        "for grad, vjp and jvp"
    )
