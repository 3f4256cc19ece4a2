"""How an equilibrium is found and differentiated: each adjoint runs the search and attaches gradients to its result."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint as recompute

from deepeq.checks import check_choice, check_count
from deepeq.diagnosis import OnFailure, explain_nonfinite, report
from deepeq.implicit import ImplicitFunction, LinearSolve, Rule
from deepeq.iterate import OnStep, iterate, reconcile
from deepeq.modes import Modes
from deepeq.packing import Map, Packing
from deepeq.problem import Measured, Measures, Problem
from deepeq.scaling import unit_of_gradients
from deepeq.solution import ConvergenceError, Result, Solution
from deepeq.solvers import GMRES, Solver


class Adjoint(ABC):
    """A way to find an equilibrium and to make it differentiable.

    Adjoints return the same value, the solver's, and differ in its gradient, unless a class says otherwise. They follow
    `torch.is_grad_enabled()`, and reach every tensor that `f` touches.
    """

    @abstractmethod
    def solve(
        self, problem: Problem, z0: Tensor, solver: Solver, *, keep: Sequence[int] = (), on_step: OnStep | None = None
    ) -> Solution:
        """Return the Solution of a packed problem, differentiable if gradients are enabled.

        Args:
            problem: The map of packed states `(B, N)`, with its norm.
            z0: First state, `(B, N)`.
            solver: Solver of the forward search.
            keep: Steps whose states are returned too.
            on_step: Called after each step of the search.
        """


@dataclass(frozen=True, kw_only=True)
class ImplicitAdjoint(Adjoint):
    """Exact gradients by the implicit function theorem: `dl/d(.) = u^T df/d(.)` at `z*`, with `u = J^T u + dl/dz*`.

    Between forward and backward lives one graph of `f` (at `z*`), whatever the number of steps. The backward solves the
    linear fixed point for `u` with products `J^T u` of that graph, then sends `u` through it once for the gradients of
    everything that `f` touches. The gradient is as exact as that solve, and as `z*` itself. The value does not depend
    on `z0`, which gets no gradient.

    Raises in the backward pass:
        ConvergenceError: A gradient or a product is not finite, or the solve missed its tolerance with
            `on_failure="raise"`.
        RuntimeError: Second derivatives are asked for without `twice_differentiable`.

    References:
        Bai, Kolter, Koltun (2019), theorem 1 and eq. 11.
    """

    solver: Solver = field(default_factory=GMRES)
    """Solver of the backward fixed point. Its `atol` is in units of the largest component of a problem's `dl/dz*`. Its
    `rtol` is at least twice the rounding of the type that `f` works in, the limit of products."""
    on_failure: OnFailure = "warn"
    """What happens when the backward solve misses its tolerance."""
    callback: Callable[[Solution], None] | None = None
    """Receives the backward Solution, whose value `u` is packed as `(B, N)`."""
    checkpoint: bool = False
    """Drop even the one graph, and evaluate `f` twice more in the backward pass."""
    twice_differentiable: bool = False
    """Allow second derivatives (`create_graph=True`), at the price of a second graph of `f`."""

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver={self.solver!r} of ImplicitAdjoint must be a Solver, such as GMRES()")
        check_choice("on_failure", self.on_failure, OnFailure)
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback={self.callback!r} of ImplicitAdjoint must be a function of a Solution")
        if self.checkpoint and self.twice_differentiable:
            raise ValueError("checkpoint=True keeps no graph to differentiate twice; set twice_differentiable=False")

    def solve(
        self, problem: Problem, z0: Tensor, solver: Solver, *, keep: Sequence[int] = (), on_step: OnStep | None = None
    ) -> Solution:
        backward = replace(self.solver, rtol=max(self.solver.rtol, 2.0 * problem.resolution))
        measures = Measures(problem, solver)
        solution = _search(problem, z0, solver, measures, keep, on_step)
        adjoint_solve = partial(self._adjoint_solve, backward, solution.value, problem.sizes, problem.verify)
        return _attach(problem, solution, measures, solver, adjoint_solve, self.checkpoint, self.twice_differentiable)

    def _adjoint_solve(
        self, solver: Solver, z: Tensor, sizes: Sequence[int], verify: bool, product: Map, v: Tensor
    ) -> Tensor:
        # The equation is linear: solved for v of size one, it does not lose small or large gradients to the range of
        # float32, and its tolerances do not depend on the scale of the loss.
        unit = unit_of_gradients(product, v, z, () if solver.needs_symmetry else sizes)
        v = v / unit
        relative = unit / unit.amax() if unit.numel() else unit  # linear: one common factor changes nothing
        norm = Packing.norm_of_parts(sizes)
        backward = Problem(
            function=lambda u: product(u * relative) / relative + v,
            norm=norm,
            first=v,
            verify=verify,
            linear=True,
            name="the backward map J^T u + v",
        )
        solution = iterate(backward, solver, torch.zeros_like(v))
        solution = solution._replace(
            value=solution.value * unit, absolute_residual=solution.absolute_residual * unit.amax(dim=1)
        )
        if self.callback is not None:
            self.callback(solution)
        message = f"backward pass: {solution.message}"
        if solution.result is Result.NONFINITE:
            raise ConvergenceError(message, solution)
        if solution.message:
            report(f"{message}. Gradients are less exact than asked for", solution, self.on_failure)
        return solution.value


@dataclass(frozen=True, kw_only=True)
class NeumannAdjoint(Adjoint):
    """Gradients from the first `terms` terms of the Neumann series `u = v + J^T v + ...`, for `terms - 1` products.

    Biased, and divergent in `terms` where the spectral radius of `J` exceeds one. One term is Jacobian-free
    backpropagation.

    References:
        Fung et al. (2022), JFB, AAAI 36. Geng et al. (2021), On training implicit models, NeurIPS, eq. 12.
    """

    terms: int = 1
    """Terms of the series, `v` included."""

    def __post_init__(self) -> None:
        check_count("terms", self.terms, least=1, owner=self)

    def solve(
        self, problem: Problem, z0: Tensor, solver: Solver, *, keep: Sequence[int] = (), on_step: OnStep | None = None
    ) -> Solution:
        measures = Measures(problem, solver)
        solution = _search(problem, z0, solver, measures, keep, on_step)
        return _attach(problem, solution, measures, solver, partial(self._adjoint_solve, solution))

    def _adjoint_solve(self, solution: Solution, product: Map, v: Tensor) -> Tensor:
        u = v
        for _ in range(self.terms - 1):
            u = product(u) + v
        if not bool(torch.isfinite(u).all()):
            raise ConvergenceError(
                f"the series of NeumannAdjoint(terms={self.terms}) is not finite: the gradient that came in is not, or "
                "the spectral radius of the map exceeds one, so take fewer terms or ImplicitAdjoint()",
                solution,
            )
        return u


@dataclass(frozen=True, kw_only=True)
class PhantomAdjoint(Adjoint):
    """Gradients of a few damped steps taken at the equilibrium: `z <- damping z + (1 - damping) f(z)`, `steps` times.

    Biased and cheap: no backward solve, `steps` graphs of `f`. One undamped step is Jacobian-free backpropagation.

    With `returns="last"` the value is the state after these steps, with gradients or without. Together with
    `max_steps=0` of the solver, or a small limit and a warm start, this is truncated backpropagation. The residual is
    then that of the state before the last step, and nothing is called converged or warns. The steps go on from the
    point that the solver would have evaluated next: `FixedPointIteration(max_steps=n)` makes `n` plain steps before.

    References:
        Geng et al. (2021), On training implicit models, NeurIPS, eq. 9 (unrolling-based phantom gradient).
    """

    steps: int = 1
    """Applications of `f` that are differentiated."""
    damping: float = 0.0
    """Fraction of the old iterate that a step keeps; 0 means none."""
    returns: Literal["equilibrium", "last"] = "equilibrium"
    """The value: the solver's equilibrium, or the last differentiated iterate."""

    def __post_init__(self) -> None:
        check_count("steps", self.steps, least=1, owner=self)
        if not 0.0 <= self.damping < 1.0:
            raise ValueError(f"damping={self.damping!r} of PhantomAdjoint must lie in [0, 1); 0 means none")
        if self.returns not in ("equilibrium", "last"):
            raise ValueError(f"returns={self.returns!r} of PhantomAdjoint must be 'equilibrium' or 'last'")

    def solve(
        self, problem: Problem, z0: Tensor, solver: Solver, *, keep: Sequence[int] = (), on_step: OnStep | None = None
    ) -> Solution:
        measures = Measures(problem, solver)
        last = self.returns == "last"
        solution = _search(problem, z0, solver, measures, keep, on_step, confirm=not last, advance=last)
        if not last and not torch.is_grad_enabled():
            return _with_kept_states(problem, solution)
        z, joint = tracked(solution.value), None
        for step in range(self.steps):
            fz, _, measured = problem.evaluate(z)
            if last or step == 0:
                joint = measures(fz, measured)
            z = fz.lerp(z, self.damping) if self.damping else fz
        assert joint is not None
        solution = solution._replace(num_evals=solution.num_evals + self.steps)
        if not last:
            solution = _confirmed(solution, joint, problem, solver)
            if not solution.message and not bool(torch.isfinite(z).all()):
                message = "the steps of PhantomAdjoint overflow, and so does its gradient: take fewer steps, or damping"
                solution = solution._replace(message=message)
            # The phantom steps give the gradient alone: the value, and with it the residual, is the solver's.
            return _with_kept_states(problem, solution, ImplicitFunction.apply(z, solution.value, Rule(None)))
        relative, absolute = joint.relative.to(z.dtype), joint.absolute.to(z.dtype)
        solution = solution._replace(
            relative_residual=relative, absolute_residual=absolute, converged=torch.zeros_like(solution.converged)
        )
        if solution.result is not Result.NONFINITE:
            solution = solution._replace(result=Result.MAX_STEPS, message="")
        return _with_kept_states(problem, solution, z if torch.is_grad_enabled() else z.clone())


@dataclass(frozen=True, kw_only=True)
class BackpropAdjoint(Adjoint):
    """Gradients by backpropagation through every step of the solver: memory grows with the steps.

    An option where few steps are taken. `z0` gets a gradient too, and where a problem starts at its equilibrium, its
    value is `z0` and nothing else gets one.
    """

    def solve(
        self, problem: Problem, z0: Tensor, solver: Solver, *, keep: Sequence[int] = (), on_step: OnStep | None = None
    ) -> Solution:
        if torch.is_grad_enabled() and not solver.differentiable:
            raise TypeError(
                f"BackpropAdjoint cannot differentiate the steps of {type(solver).__name__}; use ImplicitAdjoint(), or "
                "another solver"
            )
        solution = iterate(problem, solver, tracked(z0), keep=keep, on_step=on_step)
        kept = tuple(z if fz is None else fz for z, fz in solution.kept)
        return solution._replace(value=solution.value.clone(), kept=kept)


def tracked(z: Tensor) -> Tensor:
    """Return `z` such that autograd records what `f` does with it.

    An `f` that hides its parameters from autograd, as reentrant checkpointing does, gets its gradients only where its
    argument asks for one.
    """
    # Inside a transform of torch.func, which BackpropAdjoint allows, a tensor may not be asked for gradients.
    if not torch.is_grad_enabled() or z.requires_grad or torch._C._are_functorch_transforms_active():
        return z
    return z.detach().requires_grad_()


def _search(
    problem: Problem,
    z0: Tensor,
    solver: Solver,
    measures: Measures,
    keep: Sequence[int],
    on_step: OnStep | None,
    *,
    confirm: bool = True,
    advance: bool = False,
) -> Solution:
    """Return the solution without a graph; where a graph is to be built, its evaluation confirms the residuals."""
    confirm = confirm and not torch.is_grad_enabled()
    with torch.no_grad():
        z0 = z0.detach()
        solution = iterate(
            problem,
            solver,
            z0,
            keep=keep,
            on_step=on_step,
            measures=measures,
            confirm=confirm,
            advance=advance,
        )
    if forward_ad.unpack_dual(solution.value).tangent is not None:
        raise NotImplementedError(
            "forward-mode derivatives of an equilibrium are supported by BackpropAdjoint only; use reverse mode"
        )
    if torch.is_autocast_enabled(z0.device.type):
        # Casts of parameters that autocast cached just now carry no graph; reused outside, they would lose gradients.
        torch.clear_autocast_cache()
    # A copy of z0, which its owner may change before the backward pass.
    value = solution.value.clone() if solution.value is z0 else solution.value
    return solution._replace(value=value.detach())


def _confirmed(solution: Solution, joint: Measured, problem: Problem, solver: Solver) -> Solution:
    """Return the solution with what the evaluation that builds the graph says of it."""
    if solver.max_steps == 0:  # nothing was measured before
        dtype = solution.value.dtype
        solution = solution._replace(
            relative_residual=joint.relative.to(dtype), absolute_residual=joint.absolute.to(dtype)
        )
        broken = torch.isnan(joint.relative)
        if bool(broken.any()):
            first = solution._replace(num_steps=solution.num_steps + 1)
            message = explain_nonfinite(first, broken, problem.name)
            solution = solution._replace(result=Result.NONFINITE, message=message)
        return solution
    return reconcile(solution, joint, problem) if problem.verify else solution


def _with_kept_states(problem: Problem, solution: Solution, value: Tensor | None = None) -> Solution:
    """Return the solution with its value, and its kept points as states: `f` of each, differentiable through `f`."""
    # A copy: without a graph the value may be z0 itself, or what f returned last.
    value = value if value is not None else torch.clone(solution.value)
    kept, num_evals = [], solution.num_evals
    for point, fz in solution.kept:
        if fz is None:  # the search had ended
            kept.append(value.clone())
        elif torch.is_grad_enabled():
            kept.append(problem(tracked(point)))
            num_evals += 1
        else:
            kept.append(fz)
    return solution._replace(value=value, kept=tuple(kept), num_evals=num_evals)


def _attach(
    problem: Problem,
    solution: Solution,
    measures: Measures,
    solver: Solver,
    adjoint_solve: LinearSolve,
    checkpoint: bool = False,
    twice: bool = False,
) -> Solution:
    """Return the solution with a differentiable value: one evaluation of `f` with a graph (two if `twice`)."""
    if not torch.is_grad_enabled():
        return _with_kept_states(problem, solution)
    z = solution.value.requires_grad_()
    evaluate = problem.evaluate
    fz, _, measured = recompute(evaluate, z, use_reentrant=False) if checkpoint else evaluate(z)
    solution = solution._replace(value=z.detach(), num_evals=solution.num_evals + 1)
    solution = _confirmed(solution, measures(fz, measured), problem, solver)
    rule = Rule(adjoint_solve, Modes.now(z.device.type).keep(problem.__call__) if checkpoint else None)
    if not twice:
        return _with_kept_states(problem, solution, ImplicitFunction.apply(fz, z, rule))
    # The first value has right first derivatives only. Evaluating f there connects z* to its own dependence on the
    # parameters, and the second node's gradient, (u, v - u), then has right derivatives itself.
    first = ImplicitFunction.apply(fz, z, Rule(adjoint_solve, linear=True))
    value = ImplicitFunction.apply(problem(first), first, Rule(adjoint_solve, connected=True))
    return _with_kept_states(problem, solution._replace(num_evals=solution.num_evals + 1), value)
