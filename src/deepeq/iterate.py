"""The search loop: it evaluates `f`, measures residuals, and decides when each problem is done."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deepeq.diagnosis import explain_inconsistency, explain_nonfinite, explain_steps
from deepeq.modes import Modes
from deepeq.problem import Measured, Measures, Problem
from deepeq.rows import Counted, Rows
from deepeq.scaling import power_of_two
from deepeq.solution import Result, Solution
from deepeq.solvers.base import Solver

OnStep = Callable[[int, Tensor, Tensor], None]
"""Receives the step (counted from 1), the point `(B, N)` and the relative residuals `(B,)` after each evaluation."""


def iterate(
    problem: Problem,
    solver: Solver,
    z0: Tensor,
    *,
    check_every: int | None = None,
    keep: Sequence[int] = (),
    on_step: OnStep | None = None,
    measures: Measures | None = None,
    confirm: bool = True,
    advance: bool = False,
) -> Solution:
    """Return the best point that `solver` finds, problem by problem.

    Each step evaluates `f` once, measures the residual of each problem, keeps the point that is nearest to its
    tolerance (`z0` included), freezes the problems that are done, and asks the solver for the next point. A problem
    that is done never changes again, whatever its batch mates need. The loop ends when all are done, or at
    `max_steps`. It does not raise when a problem fails; errors of `f` and of the rule pass through.

    Whether problems that finished at different steps are independent is checked at the end, from the last evaluation
    where it was made at the returned state, else by one more (`problem.verify`).

    Args:
        problem: What is searched for.
        solver: The rule and its tolerances.
        z0: First point, `(B, N)`.
        check_every: Steps between two looks at whether all problems are done: one on the CPU, four elsewhere, where
            each look waits for the device.
        keep: Steps, counted from 1, whose points are returned in `kept`; where the search ended earlier, the value.
        on_step: Observer of each step.
        measures: Computes the residuals. Pass one if you measure the returned state again, so that both measurements
            compare with the same first value.
        confirm: Make the evaluation that `problem.verify` asks for. Pass False to evaluate the returned state yourself.
        advance: Return the point that would be evaluated next in the place of the best one.

    Returns:
        A Solution with a `(B, N)` value, and pairs of points and their `f(z)` (or None) in `kept`.
    """
    check_every = check_every or (1 if z0.device.type == "cpu" else 4)
    measures = measures or Measures(problem, solver)
    modes = Modes.now(z0.device.type)
    evaluate = Counted(modes.keep(problem.evaluate))
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    with modes.algebra():
        z = _with_version_counter(z0)
        # A search that is to go on from its last point stops nowhere earlier.
        search = _Search(z, solver, min_steps=solver.max_steps + 1 if advance else solver.min_steps)
        rule, unit, state, rows = solver, None, None, Rows(problem, solver, modes)
        for step in range(1, solver.max_steps + 1):
            known = problem.first if step == 1 else None
            fz, g, measured = rows.evaluate(z, evaluate) if known is None else problem.complete(known, z)
            search.record(z, measures(fz, measured))
            if on_step is not None:
                on_step(step, z, search.log[-1].relative)
            if step in keep:
                kept[step] = (z, fz)
            if (step == solver.max_steps and not advance) or (step % check_every == 0 and search.all_done()):
                break
            if step == 1:
                unit = unit_of(g)
                if unit is not None and solver.atol:  # one unit for all, in which the rule knows the tolerance
                    unit = unit.amax().reshape(1, 1)
                    rule = replace(solver, atol=solver.atol / float(unit))
                rule = rule.bind(evaluate.residual_in(unit))
                state = rule.init(z if unit is None else z / unit)
            if step % check_every == 0:
                state = rows.shrink(search.running, state, fz)
            z_next, state = rows.next(rule, (z, fz, g), unit, state)
            z = _with_version_counter(search.next_point(z_next))
            del z_next, fz, g, measured  # so that the next evaluation has their memory
        solution, joint = search.outcome(problem, evaluate.count)
        if advance:
            return solution._replace(value=z, kept=tuple(kept.get(step, (z, None)) for step in keep))
        if rows.function is not None:
            joint = None  # the last evaluations did not see all problems
        if problem.verify and joint is None and confirm:
            fz, _, measured = evaluate(search.value)
            joint = measures(fz, measured)
            solution = solution._replace(num_evals=evaluate.count)
        if problem.verify and joint is not None:
            solution = reconcile(solution, joint, problem)
    return solution._replace(kept=tuple(kept.get(step, (search.value, None)) for step in keep))


class _Search:
    """The best points so far, and which problems are still running."""

    def __init__(self, z0: Tensor, solver: Solver, min_steps: int) -> None:
        self.value, self._min_steps = z0, min_steps
        self.log: list[Measured] = []
        self._solver, self._may_look = solver, z0.device.type == "cpu"
        self.running = torch.ones(len(z0), dtype=torch.bool, device=z0.device)
        self._best_error = torch.full((len(z0),), torch.inf, device=z0.device)
        self._ran: list[Tensor] = []  # which problems took part in each step
        self._improved: list[Tensor] = []  # which problems took their value from each step
        self._num_nonfinite = torch.zeros(len(z0), dtype=torch.int64, device=z0.device)  # consecutive ones

    def record(self, z: Tensor, measured: Measured) -> None:
        """Note the residuals of a point, keep it where it is the best one, and see which problems are done."""
        self.log.append(measured)
        error, _, _, distance, total = measured
        reached, active = error <= 1.0, self.running & (total < torch.inf)
        # Far away a relative residual can be small, so the absolute one must not have grown either.
        better = (error <= self._best_error) & ((distance <= self.log[0].distance) | reached) & active
        self._best_error = torch.where(better, error, self._best_error)
        self.value = self._choose(better, z, self.value)
        self._ran.append(self.running)
        self._improved.append(better)
        patience = self._solver.nonfinite_patience
        if patience and len(self.log) > 1:
            self._num_nonfinite = torch.where(self.running & ~active, self._num_nonfinite + 1, 0)
            active = self.running & (self._num_nonfinite <= patience)
        if len(self.log) >= self._min_steps:
            reached = self._best_error <= 1.0 if self._min_steps else reached
            active = active & ~reached
        self.running = active

    def all_done(self) -> bool:
        return bool((~self.running).all())

    def next_point(self, z_next: Tensor) -> Tensor:
        """Return the next point, with the problems that are done at their values."""
        return self._choose(self.running, z_next, self.value)

    def _choose(self, mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if self._may_look:  # cheaper than copying
            if mask.all():
                return a
            if (~mask).all():
                return b
        return torch.where(mask.unsqueeze(1), a, b)

    def outcome(self, problem: Problem, num_evals: int) -> tuple[Solution, Measured | None]:
        """Return the solution, and the residuals of all problems together where its value was evaluated as one point.

        A problem that was done stayed at its value while others went on, so the step that the last of them took its
        value from has measured all.
        """
        dtype, size = self.value.dtype, len(self.value)
        if not self.log:
            unknown = self.value.new_full((size,), torch.inf)
            steps = torch.zeros(size, dtype=torch.int64, device=self.value.device)
            history = unknown.new_zeros((0, size))
            solution = Solution(
                self.value, unknown, unknown < 0, steps, num_evals, Result.MAX_STEPS, history, absolute_residual=unknown
            )
            return solution._replace(message=explain_steps(solution, self._solver, history)), None
        number = torch.arange(1, len(self.log) + 1, device=self.value.device).unsqueeze(1)  # of each step
        num_steps = torch.stack(self._ran).sum(dim=0)
        best_step = (torch.stack(self._improved) * number).amax(dim=0)  # 0: the first point was not finite
        _, relative, absolute, _, total = (torch.stack(rows) for rows in zip(*self.log, strict=True))
        best = (best_step - 1).clamp_min(0).unsqueeze(0)
        relative = relative.masked_fill(~(total < torch.inf), torch.nan)
        converged = self._best_error <= 1.0
        if len(self.log) < self._min_steps:
            converged = torch.zeros_like(converged)
        solution = Solution(
            self.value,
            relative.gather(0, best).squeeze(0).to(dtype),
            converged,
            num_steps,
            num_evals,
            Result.CONVERGED,
            relative.gather(0, torch.minimum(number, num_steps) - 1).to(dtype),
            absolute.gather(0, best).squeeze(0).to(dtype),
        )
        broken = ~converged & ~self.running
        if bool(broken.any()):
            message = explain_nonfinite(solution, broken, problem.name)
            solution = solution._replace(result=Result.NONFINITE, message=message)
        elif not bool(converged.all()):
            message = explain_steps(
                solution,
                self._solver,
                absolute,
                kind="linear" if problem.linear else "root" if problem.root else "fixed point",
                resolution=problem.resolution,
            )
            solution = solution._replace(result=Result.MAX_STEPS, message=message)
        last = int(best_step.max()) if size else 0
        together = (best_step == last) | (~self.running & (num_steps < last))
        return solution, self.log[last - 1] if last and bool(together.all()) else None


def _with_version_counter(z: Tensor) -> Tensor:
    """Return a tensor whose changes in place can be detected; inference tensors are copied."""
    return z.clone() if z.is_inference() else z


def reconcile(solution: Solution, joint: Measured, problem: Problem) -> Solution:
    """Return the solution with what one evaluation of all problems together says of it.

    Problems that are solved one by one, although they depend on each other, reach their tolerances at different times,
    and the earlier ones are wrong when the later ones have moved. If a problem has lost its tolerance, no problem is
    called converged. If its value is not finite, only that problem is not. In both cases, and where only the numbers
    differ, the new residuals are reported.

    Args:
        solution: What the search claims.
        joint: What the evaluation of all problems at the returned state measured.
        problem: The map that was solved.
    """
    dtype = solution.value.dtype
    # One map may take different kernels with gradients and without; of a root, the first residual is no measure of it.
    noise = 0.0 if problem.root else max(30 * torch.finfo(dtype).eps, problem.resolution)
    claimed, reported = solution.converged, solution.relative_residual
    nonfinite = claimed & ~(joint.total < torch.inf)
    # The distance is more than 1.01 times the tolerance, and the noise besides.
    lost = claimed & ~nonfinite & (1.01 / joint.error + noise / joint.relative < 1.0)
    change = (joint.relative - reported).abs()  # NaN where a problem is not finite
    moved = (joint.absolute - solution.absolute_residual).abs()
    stale = (change > 1e-3 * reported + noise) | (moved > 1e-3 * solution.absolute_residual + noise * joint.total)
    if not bool((nonfinite | lost | stale).any()):
        return solution
    differs = lost | (~claimed & (change > 0.1 * reported + noise))
    solution = solution._replace(
        relative_residual=torch.where(stale | nonfinite, joint.relative.to(dtype), reported),
        absolute_residual=torch.where(stale, joint.absolute.to(dtype), solution.absolute_residual),
        converged=torch.zeros_like(claimed) if bool(lost.any()) else claimed & ~nonfinite,
    )
    message = solution.message
    if bool(nonfinite.any()):
        message = explain_nonfinite(solution, nonfinite, problem.name, at_end=True)
    elif bool(differs.any()):
        message = explain_inconsistency(solution, problem.name)
    result = solution.result
    if bool(nonfinite.any()):
        result = Result.NONFINITE
    elif result is Result.CONVERGED and not bool(solution.converged.all()):
        result = Result.MAX_STEPS
    return solution._replace(result=result, message=message)


def unit_of(g: Tensor) -> Tensor | None:
    """Return powers of two that bring `g` near one, `(B, 1)`; None where all of it is near enough.

    Squares of numbers around 1e-25 and 1e25 leave the range of float32. A power of two changes no digit.
    """
    if not g.numel():
        return None
    unit = power_of_two(g.detach().abs().amax(dim=1, keepdim=True))
    return unit if bool(((unit > 2.0**20) | (unit < 2.0**-20)).any()) else None
