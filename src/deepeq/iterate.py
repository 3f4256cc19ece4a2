"""The only loop that evaluates `f`."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepeq.norms import ratio, two_norm
from deepeq.solution import Result, Solution
from deepeq.solvers.base import Solver

Map = Callable[[Tensor], Tensor]


def iterate(
    f: Map, solver: Solver, z0: Tensor, *, f_z0: Tensor | None = None, check_every: int | None = None
) -> Solution:
    """The best point that `solver` finds for `z = f(z)`, sample by sample.

    Each step evaluates `f` once, measures `||f(z) - z||` for each sample, keeps the point that is nearest to its
    tolerance (`z0` included), freezes the samples that are done, and asks the solver for the next point. A sample
    that is done never changes again, whatever its batch mates need. The loop ends when all are done, at `max_steps`,
    or at a non-finite value, and raises nothing.

    Args:
        f: Map `(B, N) -> (B, N)`.
        solver: The rule and its tolerances.
        z0: First point, `(B, N)`.
        f_z0: `f(z0)` where it is known without an evaluation; the first step is then free, and counts.
        check_every: Steps between two looks at whether all samples are done: one on the CPU, four elsewhere, where each
            look waits for the device.

    Returns:
        A Solution with a `(B, N)` value.
    """
    check_every = check_every or (1 if z0.device.type == "cpu" else 4)
    f = in_current_autocast(f, z0.device.type)
    batch_size = z0.shape[0]
    done = torch.zeros(batch_size, dtype=torch.bool, device=z0.device)
    best = torch.full((batch_size,), torch.inf, dtype=z0.dtype, device=z0.device)
    num_steps = torch.zeros(batch_size, dtype=torch.int64, device=z0.device)
    z, value, residual, trace, num_evals = z0, z0, best, [], 0
    broken = torch.zeros_like(done)
    with torch.autocast(z0.device.type, enabled=False):
        state = solver.init(z0)
        for step in range(solver.max_steps):
            if step == 0 and f_z0 is not None:
                fz = f_z0
            else:
                fz, num_evals = f(z), num_evals + 1
            with torch.no_grad():
                distance, scale = two_norm(fz - z), two_norm(fz)
                error = ratio(distance, solver.atol + solver.rtol * scale)  # at most 1 where converged
                broken = broken | (~done & ~torch.isfinite(distance))
                better = ~done & (error <= best)
                best = torch.where(better, error, best)
                residual = torch.where(better, ratio(distance, scale), residual)
                relative = ratio(distance, scale).masked_fill(broken, torch.nan)
                trace.append(torch.where(done, trace[-1], relative) if trace else relative)
                num_steps += ~done
                done = done | (error <= 1.0) | broken
            value = torch.where(better.unsqueeze(1), z, value)
            if step + 1 == solver.max_steps or ((step + 1) % check_every == 0 and bool(done.all() | broken.any())):
                break
            z_next, state = solver.step(z, fz, state)
            z = torch.where(done.unsqueeze(1), z, z_next)
    converged = best <= 1.0
    result = Result.CONVERGED if bool(converged.all()) else Result.MAX_STEPS
    if bool(broken.any()):
        result = Result.NONFINITE
    return Solution(value, residual, converged, num_steps, num_evals, result, torch.stack(trace))


def in_current_autocast(f: Map, device_type: str) -> Map:
    """`f` under the autocast setting of now, wherever it is called: solver algebra runs without autocast."""
    if not torch.is_autocast_enabled(device_type):
        return f
    dtype, cache = torch.get_autocast_dtype(device_type), torch.is_autocast_cache_enabled()

    def evaluate(z: Tensor) -> Tensor:
        with torch.autocast(device_type, dtype=dtype, cache_enabled=cache):
            return f(z)

    return evaluate
