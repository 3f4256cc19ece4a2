"""How many evaluations and how much time do solvers need on a trained cell, beside torchdeq 0.1.0?

    python benchmarks/solvers.py --out DIR --run RUN_DIR [--repetitions 5]

Every solver gets the same cell, inputs and first state. Time is a ratio: that of the solve over that of the same number
of bare evaluations of f (or of bare vector-Jacobian products), taken in turns in one process; medians over the
repetitions. The residual is that of the worst sample at the state that the solver returned, evaluated again.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from _harness import Benchmark, in_turns, markdown, median_ratio
from torch import Tensor

import deepeq
from deepeq import GMRES, Anderson, Broyden, FixedPointIteration, Solver
from deepeq.cell import prepare
from deepeq.models import TiedNetwork

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
MAX_STEPS = 80
SHARED = ("rtol", "atol", "max_steps", "min_steps")  # fields that all solvers have
NONLINEAR: Sequence[Solver] = (
    FixedPointIteration(),
    Anderson(),
    Anderson(history_size=20),
    Broyden(history_size=100),
    Broyden(history_size=10),
    Broyden(history_size=100, line_search_steps=3),
)
LINEAR: Sequence[Solver] = (
    GMRES(restart=100),
    Anderson(history_size=80),
    Broyden(history_size=100),
    FixedPointIteration(),
)

Map = Callable[[Tensor], Tensor]
Solve = Callable[[Map, Tensor], tuple[Tensor, int]]
"""From a map and a first state to a state and the number of evaluations."""


def trained_map(benchmark: Benchmark, run: Path) -> tuple[Map, Tensor]:
    """Return the map of the third validation segment of a run, with its memory, and zeros to start from."""
    trained, corpus = benchmark.open_text_model(run)
    model, network = trained.model, trained.model.network
    if not isinstance(network, TiedNetwork):
        benchmark.stop(f"{run} must be the run of an equilibrium or of a weight-tied stack")
    batches = corpus.stream("valid", batch_size=16, segment_len=trained.config.train.segment_len)
    segments, memory = [batches.segment(index)[0].to(model.device) for index in range(3)], None
    for tokens in segments[:2]:
        memory = model(tokens, memory, how=trained.how).memory
    return prepare(network.cell, model.embedding(segments[2]), memory=memory)


def worst_residual(f: Map, z: Tensor) -> float:
    """Return the largest relative residual of a batch."""
    fz = f(z).flatten(1)
    return float(((fz - z.flatten(1)).norm(dim=1) / fz.norm(dim=1)).max())


def with_deepeq(solver: Solver, f: Map, z0: Tensor) -> tuple[Tensor, int]:
    """Solve with a solver of this library."""
    solution = deepeq.fixed_point(f, z0, solver=solver, on_failure="ignore", verify=False)
    return solution.value, solution.num_evals


def with_torchdeq(name: str, tolerance: float, f: Map, z0: Tensor) -> tuple[Tensor, int]:
    """Solve with a solver of torchdeq."""
    get_solver = import_module("torchdeq.solver").get_solver  # an extra that only this comparison needs

    count = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return f(z)

    value, _, _ = get_solver(name)(counted, z0, max_iter=MAX_STEPS, tol=tolerance, stop_mode="rel")
    return value, count


def measure(solve: Solve, f: Map, z0: Tensor, repetitions: int) -> dict[str, Any]:
    """Return the evaluations, the residual and the relative time of a solve."""
    value, num_evals = solve(f, z0)
    calls = {"solve": lambda: solve(f, z0), "bare": lambda: [f(value) for _ in range(num_evals)]}
    seconds = in_turns(calls, repetitions)
    return {
        "evaluations": num_evals,
        "worst_residual": worst_residual(f, value),
        "time_over_bare_evaluations": round(median_ratio(seconds["solve"], seconds["bare"]), 2),
    }


def candidates(solvers: Sequence[Solver], tolerance: float, *, peers: bool) -> dict[str, Solve]:
    """Return how to solve to a tolerance, by the name of the solver, with those of torchdeq if asked."""
    made: dict[str, Solve] = {}
    for solver in solvers:
        own = [f"{name}={value}" for name, value in vars(solver).items() if name not in SHARED]
        made[f"deepeq {type(solver).__name__}({', '.join(own)})"] = partial(
            with_deepeq, replace(solver, rtol=tolerance, max_steps=MAX_STEPS)
        )
    names = ("broyden", "anderson") if peers else ()
    return made | {f"torchdeq {name}": partial(with_torchdeq, name, tolerance) for name in names}


def compare(f: Map, z0: Tensor, solvers: Sequence[Solver], repetitions: int, *, peers: bool) -> list[dict[str, Any]]:
    """Return a row for each tolerance and solver.

    Args:
        f: The map.
        z0: First state.
        solvers: Solvers of this library, whose tolerance and step limit are replaced.
        repetitions: Number of timed rounds.
        peers: Whether torchdeq is compared too.
    """
    rows = []
    for tolerance in TOLERANCES:
        for name, solve in candidates(solvers, tolerance, peers=peers).items():
            row: dict[str, Any] = {"solver": name, "rtol": tolerance}
            print(f"{name} to {tolerance:g}", file=sys.stderr)
            try:
                row |= measure(solve, f, z0, repetitions)
                row["reached"] = row["worst_residual"] <= 1.05 * tolerance
            except deepeq.ConvergenceError as error:
                row |= {"reached": False, "error": str(error).split(":")[0]}
            rows.append(row)
    return rows


def backward_map(f: Map, z0: Tensor) -> Map:
    """Return `u -> J^T u + v` at the equilibrium, for a random `v`."""
    z = deepeq.fixed_point(f, z0, solver=Broyden(rtol=1e-5, max_steps=100)).value.detach().requires_grad_()
    with torch.enable_grad():
        fz = f(z)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z.device)
    return lambda u: torch.autograd.grad(fz, z, u, retain_graph=True)[0] + v


def table(result: dict[str, Any]) -> str:
    """Return a row for each solve."""
    fields = ("solver", "rtol", "evaluations", "worst_residual", "time_over_bare_evaluations", "reached")
    rows = [[way, *(row.get(field) for field in fields)] for way in ("forward", "backward") for row in result[way]]
    return markdown(("solve", *(field.replace("_", " ") for field in fields)), rows)


@torch.no_grad()
def main() -> None:
    benchmark = Benchmark("solvers", __doc__)
    benchmark.parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    benchmark.parser.add_argument("--repetitions", type=int, default=5)
    benchmark.parser.add_argument("--alone", action="store_true", help="leave torchdeq out")
    arguments = benchmark.parse()
    f, z0 = trained_map(benchmark, arguments.run)
    repetitions, peers = arguments.repetitions, not arguments.alone
    result = {
        "state": list(z0.shape),
        "forward": compare(f, z0, NONLINEAR, repetitions, peers=peers),
        "backward": compare(backward_map(f, z0), torch.zeros_like(z0), LINEAR, repetitions, peers=peers),
    }
    benchmark.report(result, table(result))


if __name__ == "__main__":
    main()
