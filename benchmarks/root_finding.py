"""How many systems of equations does each solver solve, with how many evaluations, and what does it claim?

    python benchmarks/root_finding.py --out DIR [--peers scipy jaxopt optimistix] [--problems NAME ...]

The systems are those of `_root_problems.py`, in float64, one at a time. The result of a solver is evaluated again: it
is solved if `||g(z)|| <= 1e-6` (Euclidean norm, in the units of the problem), and solved in the relative sense if
`||g(z)|| <= 1e-6 max(1, ||g(z0)||)`. A claim is false if a solver reports success and neither holds. Every solver is
asked for an absolute 5e-8, and `root_find` without a solver for its default, which is relative to `||g(z0)||`. Simple
systems in units of their own count as solved if `||g(z)|| <= 1e-6 ||g(z0)||`; the tolerance that is asked for is 1e-8
times `||g(z0)||`.

Evaluations are calls of `g`; in deepeq they include those for the scale, for products with the Jacobian, and for the
check at the end. SciPy's solvers see `g` as a function of NumPy arrays without derivatives. Those of jaxopt and
optimistix see a function of JAX arrays; optimistix computes the Jacobian in forward mode, and neither library counts
evaluations. Each of their solves compiles its system first, which takes seconds. The libraries of `--peers` must be
installed.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from _harness import Benchmark, markdown
from _root_problems import PROBLEMS, ROOTLESS, SHIFTED, Problem
from matplotlib.figure import Figure

import deepeq
from deepeq.solvers import Anderson, Broyden, NewtonKrylov, Solver

TOLERANCE = 1e-6
ASKED = 5e-8
ASKED_SHIFTED = 1e-8
PEERS = ("scipy", "jaxopt", "optimistix")


class Answer(NamedTuple):
    """What a solver returned."""

    z: Any  # N numbers
    claimed: bool
    evaluations: int | None


Method = Callable[[Problem, float], Answer]
"""From a problem and an absolute tolerance to an answer."""


def with_deepeq(make: Callable[[float], Solver | None]) -> Method:
    """Return `root_find` with the solver that `make` returns for an absolute tolerance."""

    @torch.no_grad()
    def solve(problem: Problem, atol: float) -> Answer:
        solution = deepeq.root_find(problem.g, problem.z0, solver=make(atol), on_failure="ignore", nonfinite="keep")
        return Answer(solution.value[0].numpy(), bool(solution.converged.all()), solution.num_evals)

    return solve


def with_scipy(name: str) -> Method:
    """Return a method of `scipy.optimize.root`."""

    def solve(problem: Problem, atol: float) -> Answer:
        root, count = import_module("scipy.optimize").root, 0

        def function(x: Any) -> Any:
            nonlocal count
            count += 1
            return problem.function(np, np.asarray(x, dtype=float))

        # hybr has a tolerance for x only, and none for g.
        options = {"xtol": 1e-10} if name == "hybr" else {"fatol": atol, "maxiter": 200}
        result = root(function, np.array(problem.start), method=name, options=options)
        return Answer(result.x, bool(result.success), count)

    return solve


def with_jaxopt(name: str) -> Method:
    """Return Broyden's method or Anderson acceleration of jaxopt."""

    def solve(problem: Problem, atol: float) -> Answer:
        jnp, jaxopt = import_module("jax.numpy"), import_module("jaxopt")
        start = jnp.asarray(problem.start)
        if name == "Broyden":
            solver = jaxopt.Broyden(lambda x: problem.function(jnp, x), tol=atol, maxiter=200)
        else:
            solver = jaxopt.AndersonAcceleration(lambda x: x + problem.function(jnp, x), tol=atol, maxiter=200)
        z, state = solver.run(start)
        return Answer(np.asarray(z), bool(state.error <= atol), None)

    return solve


def with_optimistix(name: str) -> Method:
    """Return a root finder of optimistix by the name of its class."""

    def solve(problem: Problem, atol: float) -> Answer:
        jnp, optimistix = import_module("jax.numpy"), import_module("optimistix")
        solver = getattr(optimistix, name)(rtol=1e-10, atol=atol)
        solution = optimistix.root_find(
            lambda x, _: problem.function(jnp, x), solver, jnp.asarray(problem.start), max_steps=200, throw=False
        )
        return Answer(np.asarray(solution.value), bool(solution.result == optimistix.RESULTS.successful), None)

    return solve


def methods(peers: Sequence[str]) -> dict[str, Method]:
    """Return the methods of this library and of some others, by name."""
    made = {
        "root_find, default": with_deepeq(lambda _: None),
        "NewtonKrylov": with_deepeq(lambda atol: NewtonKrylov(rtol=0.0, atol=atol)),
        "Broyden": with_deepeq(lambda atol: Broyden(rtol=0.0, atol=atol, max_steps=200)),
        "Broyden, line search": with_deepeq(
            lambda atol: Broyden(rtol=0.0, atol=atol, max_steps=200, history_size=100, line_search_steps=5)
        ),
        "Anderson": with_deepeq(lambda atol: Anderson(rtol=0.0, atol=atol, max_steps=200)),
    }
    if "scipy" in peers:
        made |= {f"SciPy {name}": with_scipy(name) for name in ("hybr", "krylov", "broyden1", "anderson")}
    if set(peers) & {"jaxopt", "optimistix"}:
        import_module("jax").config.update("jax_enable_x64", True)
    if "jaxopt" in peers:
        made |= {f"jaxopt {name}": with_jaxopt(name) for name in ("Broyden", "AndersonAcceleration")}
    if "optimistix" in peers:
        made |= {f"optimistix {name}": with_optimistix(name) for name in ("Newton", "LevenbergMarquardt")}
    return made


def norm_of_g(problem: Problem, z: Any) -> float:
    """Return the Euclidean norm of `g` at a point."""
    with torch.no_grad():
        g = problem.g(torch.from_numpy(np.array(z, dtype=float)).reshape(1, -1))
    return float(torch.linalg.vector_norm(g))


def measure(problem: Problem, method: Method, *, own_units: bool = False) -> dict[str, Any]:
    """Return what a method answers and whether it is true.

    Args:
        problem: The system.
        method: The method.
        own_units: Whether the tolerance is relative to the norm at the start.
    """
    first = norm_of_g(problem, problem.start)
    try:
        z, claimed, evaluations = method(problem, ASKED_SHIFTED * first if own_units else ASKED)
    except Exception as error:  # peers raise errors of many kinds on overflow
        print(f"{problem.name}: {error!r}", file=sys.stderr)
        return {"norm": None, "claimed": False, "solved": False, "relative": False, "error": type(error).__name__}
    norm = norm_of_g(problem, z)
    relative = norm <= TOLERANCE * (first if own_units else max(1.0, first))
    return {
        "norm": norm if np.isfinite(norm) else None,
        "claimed": claimed,
        "solved": relative if own_units else norm <= TOLERANCE,
        "relative": relative,
        "evaluations": evaluations,
    }


def summary(result: dict[str, Any]) -> str:
    """Return a row for each method."""
    rows = []
    for name in result["methods"]:
        own = [problem["answers"][name] for problem in result["problems"]]
        shifted = [problem["answers"][name] for problem in result["shifted"]]
        everything = own + shifted + [problem["answers"][name] for problem in result["rootless"]]
        solved = [answer["evaluations"] for answer in own if answer["solved"]]
        false = sum(answer["claimed"] and not (answer["relative"] or answer["solved"]) for answer in everything)
        evaluations = None if None in solved else sum(solved)
        counts = (sum(answer[key] for answer in own) for key in ("solved", "relative"))
        rows.append((name, *counts, evaluations, sum(answer["solved"] for answer in shifted), false))
    columns = (
        "solver",
        f"solved of {len(result['problems'])}",
        "relative to the start",
        "evaluations for the solved",
        f"own units, of {len(result['shifted'])}",
        "false claims",
    )
    return markdown(columns, rows)


def table(result: dict[str, Any]) -> str:
    """Return the summary, and a row for each system."""
    names = result["methods"]
    rows = []
    for group in ("problems", "rootless"):
        for problem in result[group]:
            rows.append((problem["name"], *(_cell(problem["answers"][name]) for name in names)))
    return (
        f"{summary(result)}\nEvaluations (or a +, where they are not counted) where solved; r: in the relative sense "
        f"only; -: not; !: a false claim. The last {len(result['rootless'])} have no root.\n\n"
        f"{markdown(('problem', *names), rows)}"
    )


def _cell(answer: dict[str, Any]) -> str:
    if answer["solved"]:
        return str(answer["evaluations"] or "+")
    if answer["relative"]:
        return f"{answer['evaluations'] or '+'} r"
    return "!" if answer["claimed"] else "-"


LINES = {"SciPy": "--", "optimistix": ":", "jaxopt": "-.", "torchdeq": "-.", "": "-"}
"""Line style of each library in the figure."""


def draw(result: dict[str, Any]) -> Figure:
    """Return a figure of the number of solved systems against evaluations."""
    figure = Figure(figsize=(11.0, 5.5), layout="constrained")
    axes = figure.add_subplot()
    drawn: dict[str, int] = {}  # number of curves of each library, which has a line style of its own
    for name in result["methods"]:
        library = next((peer for peer in LINES if name.startswith(peer)), "")
        answers = [problem["answers"][name] for problem in result["problems"]]
        solved = sorted(answer["evaluations"] for answer in answers if answer["solved"] and answer["evaluations"])
        if solved:
            color = f"C{drawn.setdefault(library, 0)}"
            drawn[library] += 1
            axes.step(solved, range(1, len(solved) + 1), LINES[library], where="post", color=color, label=name)
    axes.set(
        xscale="log",
        xlabel="evaluations of g",
        ylabel=f"systems solved of {len(result['problems'])} (higher is better)",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def run(problems: Sequence[Problem], made: dict[str, Method], *, own_units: bool = False) -> list[dict[str, Any]]:
    """Return the answers of all methods to each system; arguments as in `measure`."""
    measured = []
    for problem in problems:
        print(problem.name, file=sys.stderr)
        answers = {name: measure(problem, method, own_units=own_units) for name, method in made.items()}
        measured.append(
            {"name": problem.name, "source": problem.source, "size": len(problem.start), "answers": answers}
        )
    return measured


def main() -> None:
    benchmark = Benchmark("root_finding", __doc__, draw)
    names = [problem.name for problem in (*PROBLEMS, *SHIFTED, *ROOTLESS)]
    options = benchmark.parser
    options.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="libraries to compare with")
    options.add_argument("--problems", nargs="+", choices=names, metavar="NAME", help="names of some systems")
    arguments = benchmark.parse()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    torch.set_flush_denormal(False)  # systems in tiny units need them
    made = methods(arguments.peers)

    def chosen(problems: Sequence[Problem]) -> list[Problem]:
        return [problem for problem in problems if arguments.problems is None or problem.name in arguments.problems]

    result = {
        "tolerance": TOLERANCE,
        "methods": list(made),
        "problems": run(chosen(PROBLEMS), made),
        "shifted": run(chosen(SHIFTED), made, own_units=True),
        "rootless": run(chosen(ROOTLESS), made),
    }
    benchmark.report(result, table(result))


if __name__ == "__main__":
    main()
