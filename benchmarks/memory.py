"""How much memory does a training step of a DEQ take, compared with the tied stack of its cell (tables 2 and 3)?

    python benchmarks/memory.py --out DIR [--recipes NAME ...] [--batch_size 15] [--length 150]

Forward and backward of one step at the paper's sizes, without embedding, softmax and optimizer: random inputs `(B, T,
d_input)`, the memory of an earlier segment, and the sum of the output as the loss. The peak contains the parameters of
the cell, their gradients, the activations and the histories of both solvers. Solvers take all their steps: none reaches
its tolerance. The paper's stacks of layers that are not tied are measured too.

On a GPU the peak is `torch.cuda.max_memory_allocated`. Elsewhere it is counted: after each operator, the bytes of the
storages that operators have made and that are still alive, each once. The count needs only shapes, so tensors have no
data, and a solver that asks whether it is done gets the answer no. This gives the same number as a run with data, in
seconds. The operators are those of a CPU, where attention whose bias needs a gradient is not fused. Not counted is what
an operator needs for itself while it runs. While operators are watched, autograd adds gradients into new tensors
instead of in place, so the count is an upper bound. `check` compares counts with the resident memory of a process that
computes the same.

`less_by` is the fraction of the peak of the tied stack that a network does not need. In the paper the stack is that of
its table, with layers that are not tied where it has no tied one. GB are 1e9 bytes.
"""

import gc
import json
import re
import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _harness import RECIPES, Benchmark, in_own_process, markdown, resident_bytes
from matplotlib.figure import Figure
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import LayerNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from deepeq import GMRES, Broyden, Equilibrium, ImplicitAdjoint, Pieces, Solution, Solver, Stack
from deepeq.models import CellConfig, LayerStack, TiedNetwork, TransformerConfig, TrellisConfig
from deepeq.train import load_config

HISTORIES = (5, 10, 20, 30)
PARTS = (3, 15)  # numbers of pieces of a segment
SHOWN = 5  # the history of the rows with other variants, and of the figure
OUT_OF_REACH = 1e-30  # an absolute tolerance that no solve reaches


class Comparison(NamedTuple):
    """A row of the paper's tables; memory in GB."""

    depth: int
    paper_deq: float
    paper_tied: float | None = None
    paper_checkpointed: float | None = None
    untied_recipe: str | None = None
    paper_untied: float | None = None


COMPARISONS = {
    "ptb_trellisnet": Comparison(60, 1.2, 8.5),
    "wikitext103_trellisnet": Comparison(70, 3.3, 24.7, 5.2),
    "wikitext103_transformer_small": Comparison(16, 1.1, 6.8, None, "wikitext103_transformer_xl_4_layers", 4.8),
    "wikitext103_transformer_medium": Comparison(16, 2.7, None, None, "wikitext103_transformer_xl_16_layers", 8.5),
    "wikitext103_transformer_adaptive": Comparison(
        18, 3.7, None, None, "wikitext103_transformer_xl_18_layers_adaptive", 9.0
    ),
}


class Size(NamedTuple):
    """Size of the inputs of a step."""

    batch_size: int
    length: int


class Count(NamedTuple):
    """Bytes of a training step."""

    start: int  # before it: parameters, inputs, memory
    parameters: int
    gradients: int  # after it
    gradients_at_peak: int | None  # those alive at the peak; None where this is not known
    peak: int
    evaluations: int  # of f in the forward pass

    def row(self) -> dict[str, Any]:
        gradients = self.gradients if self.gradients_at_peak is None else self.gradients_at_peak
        return self._asdict() | {"rest_at_peak": self.peak - self.parameters - gradients}


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that operators made inside the mode and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._now, self._peak_at = 0, 0
        self._storages: dict[int, tuple[int, int]] = {}  # by address of the storage: bytes, when it was made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._now += 1
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        if self.live > self.peak:
            self.peak, self._peak_at = self.live, self._now
        return result

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak, self._peak_at = self.live, self._now

    def lived_at_peak(self, tensor: Tensor) -> bool:
        """Return whether the storage of a tensor that is alive now was there at the peak."""
        return self._storages[tensor.untyped_storage()._cdata][1] <= self._peak_at

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = storage.nbytes(), self._now
            self.live += storage.nbytes()
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._storages.pop(key)[0]


class _NeverDone(TorchDispatchMode):
    """Answer for tensors without data: no number is true, and what is evaluated twice is the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False
        if func in (torch.ops.aten.allclose.default, torch.ops.aten.equal.default):
            return True
        return func(*args, **(kwargs or {}))


Make = Callable[[], TiedNetwork | LayerStack]


class Step:
    """A training step of a network, and what is there before it."""

    def __init__(self, make: Make, size: Size) -> None:
        self.network = network = make().train()
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, LayerNorm):
                    # With equal weights the sum of a normalized output has only a gradient of rounding errors, and the
                    # backward solve would have nothing to find.
                    module.weight.uniform_(0.5, 1.5)
        config = network.cell.config if isinstance(network, TiedNetwork) else network.cells[0].config
        assert isinstance(config, TransformerConfig | TrellisConfig)
        self.x = torch.randn(*size, config.widths[0])
        self.memory = self._earlier(
            torch.randn(size.batch_size, max(size.length, _memory_len(config)), *self.x.shape[2:])
        )
        self.evaluations = 0

    @torch.no_grad()
    def _earlier(self, x: Tensor) -> Any:
        """Return the memory of an earlier segment, with first states in place of equilibria."""
        if isinstance(self.network, LayerStack):
            return self.network(x).memory
        cell = self.network.cell
        return cell.extend_memory(None, x, cell.initial_state(x), length=cell.memory_length())

    def run(self) -> None:
        output = self.network(self.x, self.memory)
        # As in training, where the memory of the next segment replaces this one's.
        self.memory = pytree.tree_map_only(Tensor, Tensor.detach, output.memory)
        self.evaluations = len(getattr(self.network, "cells", ())) or output.solution.num_evals
        output.value.sum().backward()


def _memory_len(config: CellConfig) -> int:
    return config.memory_len if isinstance(config, TransformerConfig) else 0


def count(make: Make, size: Size, *, data: bool = False) -> Count:
    """Return the bytes of a step, from shapes or, with the same result, from data."""
    gc.collect()
    with ExitStack() as modes:
        if not data:
            modes.enter_context(FakeTensorMode())
            modes.enter_context(_NeverDone())
        counter = modes.enter_context(LiveBytes())
        step = Step(make, size)
        counter.restart()
        start = counter.live
        step.run()
    parameters = list(step.network.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    at_peak = sum(gradient.nbytes for gradient in gradients if counter.lived_at_peak(gradient))
    return Count(start, _bytes(parameters), _bytes(gradients), at_peak, counter.peak, step.evaluations)


def allocated_on_gpu(make: Make, size: Size) -> Count:
    """Return the bytes of a step that the allocator of the GPU gave."""
    with torch.device("cuda"):
        torch.ones(8, 8).matmul(torch.ones(8, 8))  # the workspace of the library of matrix products is not the step's
        before = torch.cuda.memory_allocated()
        step = Step(make, size)
        start = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        step.run()
        peak = torch.cuda.max_memory_allocated() - before
    parameters = list(step.network.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return Count(start, _bytes(parameters), _bytes(gradients), None, peak, step.evaluations)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def stack(config: CellConfig, depth: int, *, checkpoint: bool = False) -> Make:
    """Return how to make a stack of tied layers."""

    def make() -> TiedNetwork:
        return TiedNetwork(config.build(), Stack(depth=depth, checkpoint=checkpoint))

    return make


def equilibrium(
    config: CellConfig,
    solver: Solver,
    backward: Solver,
    *,
    checkpoint: bool = False,
    piece_len: int | None = None,
    on_backward: Callable[[Solution], None] | None = None,
) -> Make:
    """Return how to make an equilibrium whose solvers take all their steps.

    Args:
        config: The cell.
        solver: Forward solver.
        backward: Backward solver.
        checkpoint: Whether the backward pass evaluates the cell again.
        piece_len: Length of the pieces; None for a whole segment.
        on_backward: Receives the Solution of each backward solve.
    """
    solver, backward = (replace(rule, rtol=0.0, atol=OUT_OF_REACH) for rule in (solver, backward))

    def make() -> TiedNetwork:
        adjoint = ImplicitAdjoint(solver=backward, checkpoint=checkpoint, on_failure="ignore", callback=on_backward)
        how = Equilibrium(solver=solver, adjoint=adjoint, on_failure="ignore", verify=False)
        return TiedNetwork(config.build(), how if piece_len is None else Pieces(equilibrium=how, length=piece_len))

    return make


def broyden(steps: int, history_size: int) -> Broyden:
    """Return a solver of some steps, with a history that is not longer."""
    return Broyden(max_steps=steps, history_size=min(history_size, steps))


def networks(name: str, size: Size, max_steps: int | None) -> Iterable[tuple[dict[str, Any], Make]]:
    """Yield the networks of a comparison, each with its description; the others are compared with the first one."""
    paper, loaded = COMPARISONS[name], load_config(RECIPES / f"{name}.yaml")
    config, solver, backward = loaded.model.layer, loaded.equilibrium.solver, loaded.equilibrium.backward_solver
    assert isinstance(config, CellConfig)
    assert solver is not None
    assert backward is not None
    steps, products = (min(rule.max_steps, max_steps or rule.max_steps) for rule in (solver, backward))
    layers = f"{paper.depth} tied layers"
    yield {"network": layers, "paper_gb": paper.paper_tied}, stack(config, paper.depth)
    described = {"network": f"{layers}, checkpointing", "paper_gb": paper.paper_checkpointed}
    yield described, stack(config, paper.depth, checkpoint=True)
    if paper.untied_recipe:
        other = load_config(RECIPES / f"{paper.untied_recipe}.yaml").model
        layer, depth = other.layer, other.depth
        assert isinstance(layer, TransformerConfig)
        described = {"network": f"{depth} layers of their own", "paper_gb": paper.paper_untied}
        yield described, partial(LayerStack, layer, depth)
    for history in (*HISTORIES, None):
        rules = broyden(steps, history or steps), broyden(products, history or products)
        used = {"history": rules[0].num_stored, "backward_history": rules[1].num_stored, "steps": steps}
        label = f"DEQ, history {history or 'of all steps'}"
        yield {"network": label, "paper_gb": None if history else paper.paper_deq} | used, equilibrium(config, *rules)
        if history == SHOWN:
            gmres = GMRES(max_steps=products, restart=history)
            yield {"network": f"{label}, GMRES backward"} | used, equilibrium(config, rules[0], gmres)
            yield {"network": f"{label}, checkpoint=True"} | used, equilibrium(config, *rules, checkpoint=True)
            for parts in PARTS:
                piece_len = -(-size.length // parts)
                described = {"network": f"{label}, pieces of {piece_len}"} | used
                yield described, equilibrium(config, *rules, piece_len=piece_len)


def measure(names: Iterable[str], size: Size, max_steps: int | None) -> list[dict[str, Any]]:
    """Return a row for each network of each comparison."""
    measured, rows = allocated_on_gpu if torch.cuda.is_available() else count, []
    for name in names:
        reference, paper = None, COMPARISONS[name].paper_tied or COMPARISONS[name].paper_untied
        for described, make in networks(name, size, max_steps):
            row: dict[str, Any] = {"recipe": name} | described | measured(make, size).row()
            reference = reference or row["peak"]
            row["less_by"] = 1.0 - row["peak"] / reference
            if paper and row.get("paper_gb"):
                row["paper_less_by"] = 1.0 - row["paper_gb"] / paper
            rows.append(row)
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def curve(name: str, size: Size, depths: Iterable[int], steps: Iterable[int]) -> dict[str, dict[int, int]]:
    """Return peaks of the cell of a recipe, by depth or number of steps."""
    measured = allocated_on_gpu if torch.cuda.is_available() else count
    config = load_config(RECIPES / f"{name}.yaml").model.layer
    assert isinstance(config, CellConfig)

    def deq(steps: int, history_size: int) -> Make:
        return equilibrium(config, broyden(steps, history_size), broyden(steps, history_size))

    families: dict[str, tuple[Iterable[int], Callable[[int], Make]]] = {
        "tied layers": (depths, lambda depth: stack(config, depth)),
        "tied layers, checkpointing": (depths, lambda depth: stack(config, depth, checkpoint=True)),
        f"DEQ, history {SHOWN}": (steps, lambda number: deq(number, SHOWN)),
        "DEQ, history of all steps": (steps, lambda number: deq(number, number)),
    }
    return {
        label: {number: measured(make(number), size).peak for number in numbers}
        for label, (numbers, make) in families.items()
    }


# A small cell, many samples: activations of hundreds of MB that take a few seconds.
CHECK_SIZE = Size(60, 150)
CHECK_CONFIG = TrellisConfig(d_input=32, d_hidden=128, d_output=32, hidden_dropout=0.1)
CHECKS = {
    "6 tied layers": stack(CHECK_CONFIG, 6),
    "DEQ, 8 steps": equilibrium(CHECK_CONFIG, broyden(8, 8), broyden(8, 8)),
}


def resident_growth(make: Make, size: Size) -> int:
    """Return by how many bytes a step raises the peak of the resident memory above what was there before it."""
    Step(make, Size(1, 2)).run()  # loads and builds what the first step needs
    step = Step(make, size)
    before = resident_bytes(peak=False)
    step.run()
    return resident_bytes(peak=True) - before


def check() -> list[dict[str, Any]]:
    """Return counts beside the resident memory of processes; none where there is no /proc."""
    rows = []
    for name, make in CHECKS.items() if Path("/proc/self/status").exists() else ():
        counted = count(make, CHECK_SIZE)
        # Blocks of any size go back to the system at once, as in the count.
        resident = in_own_process(__file__, "--resident", name, MALLOC_MMAP_THRESHOLD_="65536")
        growth = counted.peak - counted.start
        rows.append({"network": name, "counted": growth, "resident": resident, "ratio": growth / resident})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


COLUMNS = {
    "recipe": ("recipe", "", 1.0),
    "network": ("network", "", 1.0),
    "parameters (MB)": ("parameters", ".0f", 1e6),
    "gradients (MB)": ("gradients", ".0f", 1e6),
    "of them at the peak (MB)": ("gradients_at_peak", ".0f", 1e6),
    "activations and histories at the peak (MB)": ("rest_at_peak", ".0f", 1e6),
    "peak (GB)": ("peak", ".2f", 1e9),
    "less by (%)": ("less_by", ".1f", 1e-2),
    "paper (GB)": ("paper_gb", ".1f", 1.0),
    "paper, less by (%)": ("paper_less_by", ".1f", 1e-2),
}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return a row for each network."""

    def cell(value: Any, kind: str, unit: float) -> str:
        if isinstance(value, str) or value is None:
            return value or ""
        return f"{value / unit:{kind}}"

    lines = [[cell(row.get(name), kind, unit) for name, kind, unit in COLUMNS.values()] for row in rows]
    return markdown(list(COLUMNS), lines)


def draw(result: dict[str, Any]) -> Figure:
    """Return a figure of the peaks of each recipe, and of those of one cell by depth and number of steps."""
    rows, curve_recipe, peaks = result["rows"], result["curve"]["recipe"], result["curve"]["peaks"]
    sizes = re.findall(r"--(?:batch_size|length) (\d+)", result["command"])
    figure = Figure(figsize=(17.0, 7.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    kinds = ("tied layers", "tied layers, checkpointing", f"DEQ, history {SHOWN}", "DEQ, history of all steps")
    width = 0.8 / len(kinds)
    for index, kind in enumerate(kinds):
        chosen = [row for row in rows if row["network"].lstrip("0123456789 ") == kind]
        places = [recipes.index(row["recipe"]) + (index - 1.5) * width for row in chosen]
        bars = left.bar(places, [row["peak"] / 1e9 for row in chosen], width, label=kind, color=f"C{index}")
        left.bar_label(bars, fmt="%.2g")
        marked = [(place, row["paper_gb"]) for place, row in zip(places, chosen, strict=True) if row.get("paper_gb")]
        left.plot([place for place, _ in marked], [value for _, value in marked], "k_", markersize=11)
    left.plot([], [], "k_", markersize=11, label="the same in the paper")
    depths = [COMPARISONS[recipe].depth for recipe in recipes]
    labels = [recipe.replace("_", "\n") + f"\n({depth} layers)" for recipe, depth in zip(recipes, depths, strict=True)]
    left.set_xticks(range(len(recipes)), labels)
    left.set(yscale="log", title="batch {}, length {}".format(*sizes))
    left.margins(y=0.3)
    right.margins(y=0.2)
    for index, (label, values) in enumerate(peaks.items()):
        counts, gigabytes = [int(count) for count in values], [peak / 1e9 for peak in values.values()]
        right.plot(counts, gigabytes, "o-", color=f"C{index}", label=label)
    right.set(xscale="log", yscale="log", xlabel="layers, or steps forward and backward", title=curve_recipe)
    for axes in (left, right):
        axes.set_ylabel("peak memory of a training step (GB, lower is better)")
        axes.grid(alpha=0.3, which="both")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(ncols=2, loc="upper left")
    left.grid(visible=False, axis="x")
    right.xaxis.set_major_formatter("{x:g}")
    return figure


def main() -> None:
    benchmark = Benchmark("memory", __doc__, draw)
    options = benchmark.parser
    options.add_argument("--recipes", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), help="what to compare")
    options.add_argument("--batch_size", type=int, default=15)
    options.add_argument("--length", type=int, default=150, help="number of positions")
    options.add_argument("--max_steps", type=int, help="largest number of steps of a solver (default: the recipe's)")
    options.add_argument("--curve_recipe", choices=COMPARISONS, default="wikitext103_trellisnet")
    options.add_argument("--curve_depths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 70])
    options.add_argument("--curve_steps", type=int, nargs="+", default=[2, 5, 10, 20, 50])
    options.add_argument("--resident", choices=CHECKS, help="print one half of a check, measured in this process")
    arguments = benchmark.parse()
    torch.manual_seed(0)
    if arguments.resident:
        print(resident_growth(CHECKS[arguments.resident], CHECK_SIZE))
        return
    size = Size(arguments.batch_size, arguments.length)
    rows = measure(arguments.recipes, size, arguments.max_steps)
    peaks = curve(arguments.curve_recipe, size, arguments.curve_depths, arguments.curve_steps)
    on_gpu = torch.cuda.is_available()
    result = {
        "measured": "torch.cuda.max_memory_allocated" if on_gpu else "counted from shapes, float32, CPU operators",
        "seed": 0,
        "converged": "no solve: each takes all its steps",
        "rows": rows,
        "curve": {"recipe": arguments.curve_recipe, "peaks": peaks},
        "check": [] if on_gpu else check(),
    }
    benchmark.report(result, table(rows))


if __name__ == "__main__":
    main()
