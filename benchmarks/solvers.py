"""How many evaluations and how much time do solvers need on a trained cell, beside torchdeq 0.1.0?

    python benchmarks/solvers.py --run RUN_DIR --out benchmarks/results

Every solver gets the same cell, inputs and first state. Time is a ratio: that of the solve over that of the same
number of bare evaluations of f (or of bare vector-Jacobian products), taken in turns in one process; medians over the
repetitions. A residual is that of the worst sample at the point which the solver returned, evaluated anew.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchdeq.solver import get_solver

import deepeq
from deepeq.data import load_corpus
from deepeq.models import TiedNetwork
from deepeq.solvers import Solver
from deepeq.train import RunFolder, load_config

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
MAX_STEPS = 80


def trained_map(run: Path) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The map of the third validation segment of a run, with its memory, and zeros to start from."""
    config, _, model = RunFolder(run).load_model()
    assert isinstance(model.network, TiedNetwork)
    batches = load_corpus(config.data).stream("valid", batch_size=16, segment_len=config.train.segment_len)
    memory = None
    for index in range(2):
        memory = model(batches.segment(index)[0], memory).memory
    return model.network.core.prepare(model.embedding(batches.segment(2)[0]), memory=memory)


def worst_residual(f: Callable[[Tensor], Tensor], z: Tensor) -> float:
    fz = f(z).flatten(1)
    return float(((fz - z.flatten(1)).norm(dim=1) / fz.norm(dim=1)).max())


def solve_with(solver: Solver, f: Callable[[Tensor], Tensor], z0: Tensor) -> tuple[Tensor, int]:
    solution = deepeq.fixed_point(f, z0, solver=solver, on_failure="ignore", verify=False)
    return solution.value, solution.num_evals


def solve_with_torchdeq(
    name: str, tolerance: float
) -> Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, int]]:
    def solve(f: Callable[[Tensor], Tensor], z0: Tensor) -> tuple[Tensor, int]:
        count = 0

        def counted(z: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return f(z)

        value, _, _ = get_solver(name)(counted, z0, max_iter=MAX_STEPS, tol=tolerance, stop_mode="rel")
        return value, count

    return solve


def measure(
    solve: Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, int]],
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    repetitions: int,
) -> dict[str, float]:
    value, num_evals = solve(f, z0)
    ratios = []
    for _ in range(repetitions):
        start = time.perf_counter()
        solve(f, z0)
        middle = time.perf_counter()
        for _ in range(num_evals):
            f(value)
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return {
        "evaluations": num_evals,
        "worst_residual": worst_residual(f, value),
        "time_over_bare_evaluations": round(statistics.median(ratios), 2),
    }


def compare(f: Callable[[Tensor], Tensor], z0: Tensor, solvers: list[Solver], repetitions: int) -> list[dict]:
    rows = []
    for tolerance in TOLERANCES:
        candidates = {
            f"deepeq {solver}".replace(f"rtol={solver.rtol}, atol=0.0, max_steps={solver.max_steps}, ", ""): (
                partial(solve_with, replace(solver, rtol=tolerance, max_steps=MAX_STEPS))
            )
            for solver in solvers
        }
        candidates |= {f"torchdeq {name}": solve_with_torchdeq(name, tolerance) for name in ("broyden", "anderson")}
        for name, solve in candidates.items():
            row: dict = {"solver": name, "rtol": tolerance}
            try:
                row |= measure(solve, f, z0, repetitions)
                row["reached"] = row["worst_residual"] <= 1.05 * tolerance
            except deepeq.ConvergenceError as error:
                row |= {"reached": False, "error": str(error).split(":")[0]}
            rows.append(row)
            print(json.dumps(row))
    return rows


def backward_map(f: Callable[[Tensor], Tensor], z0: Tensor) -> Callable[[Tensor], Tensor]:
    """`u -> J^T u + v` at the equilibrium, for a random `v`."""
    z = deepeq.fixed_point(f, z0, solver=deepeq.Broyden(rtol=1e-5, max_steps=100)).value.detach().requires_grad_()
    with torch.enable_grad():
        fz = f(z)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    return lambda u: torch.autograd.grad(fz, z, u, retain_graph=True)[0] + v


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--out", type=Path, required=True, help="folder for solvers.json")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)  # as training does
    f, z0 = trained_map(arguments.run)
    nonlinear: list[Solver] = [
        deepeq.FixedPointIteration(),
        deepeq.Anderson(),
        deepeq.Anderson(history_size=20),
        deepeq.Broyden(history_size=100),
        deepeq.Broyden(history_size=10),
        deepeq.Broyden(history_size=100, line_search_steps=3),
    ]
    linear: list[Solver] = [
        deepeq.GMRES(restart=100),
        deepeq.Anderson(history_size=80),
        deepeq.Broyden(history_size=100),
        deepeq.FixedPointIteration(),
    ]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    result = {
        "command": f"python benchmarks/solvers.py --run RUN_DIR --out {arguments.out}",
        "recipe": load_config(arguments.run / "config.yaml").run.name,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "hardware": f"{processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "state": list(z0.shape),
        "forward": compare(f, z0, nonlinear, arguments.repetitions),
        "backward": compare(backward_map(f, z0), torch.zeros_like(z0), linear, arguments.repetitions),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "solvers.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
