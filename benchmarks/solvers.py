"""How many evaluations and how much time do solvers need, beside torchdeq 0.1.0?

    python benchmarks/solvers.py --out DIR [--cells transformer mlp] [--repetitions 5] [--threads 1] [--alone]

Every solver gets the same map, first state, tolerance and step limit, on five cells: two that were trained on text
(`cells/`), a multiscale convolution, a graph as one coupled problem, and a small MLP. Solvers take turns in one
process, and times are medians. The residual is that of the worst sample at the state that the solver returned,
evaluated again. Every solve of torchdeq has the settings that were best for it: its Anderson acceleration was tried
with histories of 6 and 20, and the faster one that reaches the tolerance counts.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from _cells import CELLS, Map, make
from _harness import Benchmark, in_turns, markdown
from matplotlib.figure import Figure
from torch import Tensor, nn

import deepeq
from deepeq import GMRES, Anderson, Broyden, FixedPointIteration, Solver

TOLERANCES = {"forward": (1e-2, 1e-3, 1e-5), "backward": (1e-1, 1e-3)}
MAX_STEPS = 80
SOLVERS: Mapping[str, Mapping[str, Solver]] = {
    "forward": {
        "Anderson()": Anderson(),
        "Anderson(projection='type_ii')": Anderson(projection="type_ii"),
        "Anderson(history_size=10)": Anderson(history_size=10),
        "Broyden()": Broyden(),
        "FixedPointIteration()": FixedPointIteration(),
    },
    "backward": {"GMRES()": GMRES(restart=100), "Anderson()": Anderson(), "Broyden()": Broyden()},
}
PEERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "torchdeq broyden": ("broyden", {}),
    "torchdeq anderson, m=6": ("anderson", {"m": 6}),
    "torchdeq anderson, m=20": ("anderson", {"m": 20}),
}
DEFAULT = {"forward": "Anderson()", "backward": "GMRES()"}
Solve = Callable[[Map, Tensor], Tensor]


def with_deepeq(solver: Solver, f: Map, z0: Tensor) -> Tensor:
    """Solve with a solver of this library."""
    return deepeq.fixed_point(f, z0, solver=solver, on_failure="ignore", nonfinite="keep", verify=False).value


def with_torchdeq(name: str, options: Mapping[str, Any], tolerance: float, f: Map, z0: Tensor) -> Tensor:
    """Solve with a solver of torchdeq."""
    get_solver = import_module("torchdeq.solver").get_solver  # an extra that only this comparison needs
    return get_solver(name)(f, z0, max_iter=MAX_STEPS, tol=tolerance, stop_mode="rel", **options)[0]


def candidates(direction: str, tolerance: float, *, peers: bool) -> dict[str, Solve]:
    """Return how to solve to a tolerance, by the name of the solver, with those of torchdeq if asked."""
    own = SOLVERS[direction].items()
    made: dict[str, Solve] = {
        name: partial(with_deepeq, replace(solver, rtol=tolerance, max_steps=MAX_STEPS)) for name, solver in own
    }
    if peers:
        made |= {name: partial(with_torchdeq, *peer, tolerance) for name, peer in PEERS.items()}
    return made


class Counted:
    """A map that counts its calls, and keeps the worst residual of each."""

    def __init__(self, f: Map) -> None:
        self._f, self.residuals = f, []

    def __call__(self, z: Tensor) -> Tensor:
        fz = self._f(z)
        self.residuals.append(worst_residual(fz, z))
        return fz


def worst_residual(fz: Tensor, z: Tensor) -> float:
    """Return the largest relative residual of a batch."""
    return float(
        (torch.linalg.vector_norm((fz - z).double(), dim=1) / torch.linalg.vector_norm(fz.double(), dim=1)).max()
    )


def compare(f: Map, z0: Tensor, direction: str, repetitions: int, *, peers: bool) -> list[dict[str, Any]]:
    """Return a row for each tolerance and solver.

    Args:
        f: The map of states `(B, N)`.
        z0: First state.
        direction: "forward" or "backward", which decides the solvers and the tolerances.
        repetitions: Number of timed rounds.
        peers: Whether torchdeq is compared too.
    """
    rows = []
    for tolerance in TOLERANCES[direction]:
        solves, counts = candidates(direction, tolerance, peers=peers), {}
        for name, solve in solves.items():
            counted = Counted(f)
            value = solve(counted, z0)
            residual = worst_residual(f(value), value)
            counts[name] = len(counted.residuals)
            rows.append(
                {
                    "solver": name,
                    "rtol": tolerance,
                    "evaluations": counts[name],
                    "worst_residual": residual if math.isfinite(residual) else None,
                    "reached": residual <= 1.05 * tolerance,
                    "residuals": [float(f"{r:.2e}") for r in counted.residuals] if tolerance == 1e-5 else None,
                }
            )
        most = max(counts.values())
        calls = {name: partial(solve, f, z0) for name, solve in solves.items()}
        seconds = in_turns(calls | {"bare": lambda v=value, n=most: [f(v) for _ in range(n)]}, repetitions)
        middle = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
        for row in rows[-len(solves) :]:
            row["seconds"] = float(f"{middle[row['solver']]:.4g}")
            row["time_over_bare_evaluations"] = round(row["seconds"] * most / middle["bare"] / row["evaluations"], 2)
    return rows


def backward_map(f: Map, z0: Tensor) -> Map:
    """Return `u -> J^T u + v` at the equilibrium, for a random `v`."""
    solver = Anderson(rtol=1e-5, max_steps=100)
    z = deepeq.fixed_point(f, z0, solver=solver, on_failure="ignore").value.detach().requires_grad_()
    with torch.enable_grad():
        fz = f(z)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    return lambda u: torch.autograd.grad(fz, z, u, retain_graph=True)[0] + v


class _Shifted(nn.Module):
    """A map with one parameter vector, as the cell of a layer."""

    def __init__(self, f: Map, width: int) -> None:
        super().__init__()
        self._f, self.shift = f, nn.Parameter(torch.zeros(width))

    def forward(self, z: Tensor, x: None = None) -> Tensor:
        return self._f(z) + self.shift


def training_step(f: Map, z0: Tensor, repetitions: int) -> dict[str, Any]:
    """Return the seconds of forward to 1e-2 and backward to 1e-1, here and with torchdeq's `ift=True`."""
    get_deq, cell = import_module("torchdeq").get_deq, _Shifted(f, z0.shape[1])
    backward = deepeq.ImplicitAdjoint(solver=GMRES(rtol=1e-1, max_steps=30), on_failure="ignore")
    layer = deepeq.Equilibrium(solver=Anderson(rtol=1e-2), adjoint=backward, on_failure="ignore")
    limits = {"f_max_iter": 30, "b_max_iter": 30, "f_tol": 1e-2, "b_tol": 1e-1}
    modes = {"f_stop_mode": "rel", "b_stop_mode": "rel"}
    peer = get_deq(f_solver="broyden", b_solver="broyden", ift=True, **limits, **modes)
    peer.train()
    calls = {
        "deepeq": lambda: layer.solve(cell, z0).value.square().sum().backward(),
        "torchdeq": lambda: peer(cell, z0)[0][-1].square().sum().backward(),
    }
    with torch.enable_grad():
        seconds = in_turns(calls, repetitions)
    middle = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    return {name: float(f"{value:.4g}") for name, value in middle.items()} | {
        "ratio": round(middle["deepeq"] / middle["torchdeq"], 3)
    }


def ratios(rows: Sequence[dict[str, Any]], direction: str) -> list[dict[str, Any]]:
    """Return, for each tolerance, the time of the default over that of torchdeq's Broyden and of its fastest."""
    found = []
    for tolerance in TOLERANCES[direction]:
        of = {row["solver"]: row for row in rows if row["rtol"] == tolerance}
        own, peers = of[DEFAULT[direction]], [of[name] for name in PEERS if name in of and of[name]["reached"]]
        ratio: dict[str, Any] = {"direction": direction, "rtol": tolerance, "reached": own["reached"]}
        if "torchdeq broyden" in of:
            ratio["over_broyden"] = round(own["seconds"] / of["torchdeq broyden"]["seconds"], 3)
            fastest = min((row["seconds"] for row in peers), default=None)
            ratio["over_fastest_that_reaches"] = None if fastest is None else round(own["seconds"] / fastest, 3)
        found.append(ratio | {"time_over_bare_evaluations": own["time_over_bare_evaluations"]})
    return found


def draw(result: dict[str, Any]) -> Figure:
    """Return the worst residual against the evaluations, a panel for each cell."""
    cells = result["cells"]
    figure = Figure(figsize=(11.0, 7.0), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True).flatten()
    shown = ("Anderson()", "Anderson(projection='type_ii')", "Broyden()", "torchdeq broyden", "torchdeq anderson, m=6")
    for panel, (name, cell) in zip(panels, cells.items(), strict=False):
        for color, solver in enumerate(shown):
            row = next((r for r in cell["forward"] if r["solver"] == solver and r["residuals"]), None)
            if row is not None:
                style = ":" if solver.startswith("torchdeq") else "-"
                best = [min(row["residuals"][: k + 1]) for k in range(len(row["residuals"]))]
                panel.semilogy(range(1, len(best) + 1), best, style, color=f"C{color}", label=solver)
        panel.set(title=name, xlabel="evaluations of f", ylim=(3e-6, 2.0))
    for panel in panels[::3]:
        panel.set_ylabel("best residual of the worst\nsample, lower is better")
    for panel in panels[len(cells) :]:
        panel.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower right", bbox_to_anchor=(0.98, 0.1))
    return figure


def table(result: dict[str, Any]) -> str:
    """Return the ratios, and a row for each solve."""
    fields = ("direction", "rtol", "reached", "over_broyden", "over_fastest_that_reaches", "time_over_bare_evaluations")
    cells = result["cells"].items()
    rows = [[name, *(ratio.get(field) for field in fields)] for name, cell in cells for ratio in cell["ratios"]]
    text = markdown(("cell", *(field.replace("_", " ") for field in fields)), rows) + "\n"
    fields = ("solver", "rtol", "evaluations", "worst_residual", "reached", "seconds", "time_over_bare_evaluations")
    rows = [
        [name, direction, *(row.get(field) for field in fields)]
        for name, cell in cells
        for direction in SOLVERS
        for row in cell[direction]
    ]
    return text + markdown(("cell", "solve", *(field.replace("_", " ") for field in fields)), rows)


def main() -> None:
    benchmark = Benchmark("solvers", __doc__, draw)
    benchmark.parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    benchmark.parser.add_argument("--repetitions", type=int, default=5)
    benchmark.parser.add_argument("--threads", type=int, default=1)
    benchmark.parser.add_argument("--alone", action="store_true", help="leave torchdeq out")
    arguments = benchmark.parse()
    torch.set_num_threads(arguments.threads)
    cells: dict[str, Any] = {}
    for name in arguments.cells:
        (f, z0), peers = make(name), not arguments.alone
        cell: dict[str, Any] = {"state": list(z0.shape)}
        maps = {"forward": f, "backward": backward_map(f, z0)}
        with torch.no_grad():
            for direction, each in maps.items():
                print(f"{name}, {direction}", file=sys.stderr)
                cell[direction] = compare(each, torch.zeros_like(z0), direction, arguments.repetitions, peers=peers)
        cell["ratios"] = [ratio for direction in maps for ratio in ratios(cell[direction], direction)]
        if peers:
            cell["training_step"] = training_step(f, z0, arguments.repetitions)
        cells[name] = cell
    result = {"cells": cells}
    benchmark.report(result, table(result))


if __name__ == "__main__":
    main()
