"""What does each remark of the paper's appendices D and E on training do in a small run?

    deepeq bench ablation --out DIR [--runs DIR] [--minutes M] [--seeds 0 1 2] [--steps N]

Characters of the text that every CPython carries; three bases, and variants that differ from theirs in one setting:
a DEQ-Transformer (the quickstart without its Jacobian penalty, begun as a stack of two layers), a DEQ-TrellisNet solved
in pieces of four positions, and an explicit stack of eight tied layers. A base and its variants see the same batches in
the same order. What is trained after the shallow stack is cut into quarters, over each of which solver steps are
averaged; those of an equilibrium in pieces are of its slowest piece forward, of the mean piece backward. `passes` tells
the cost of an optimizer step without a clock: evaluations of the cell and products with its Jacobian, or twice the
layers of a stack. For pieces it is an upper bound, and what a Jacobian penalty costs, two passes at every other step,
is left out. Afterwards, on validation text: solver steps with and without the masks of dropout; steps of each sample of
a batch beside those of the slowest one, for which the others wait; how much the last layer of a stack changes.

Seconds are those of training, on whatever else the machine did; evaluation, reading the text and starting up are not
counted. One seed, the default, cannot tell a small effect from chance, and segments are far shorter than the paper's.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from _report import command, markdown, origin, parser, write
from _runs import Planned, train_all
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from deepeq import DEQ
from deepeq.data import Corpus
from deepeq.models import TiedNetwork
from deepeq.solution import Solution
from deepeq.solvers import Solver
from deepeq.train import RunFolder, load_config
from deepeq.train.metrics import read_metrics

STEPS, LOG_EVERY, NUM_BATCHES = 240, 5, 16

REMARKS = {
    "dropout": "One dropout mask for all steps makes the equilibrium slower to find; without it, in evaluation, it is "
    "easier (appendix E, other deep techniques)",
    "weight norm": "Steps grow over the training (section 5, convergence to equilibrium); weight normalization slows "
    "the growth, forward and backward (appendix E, other deep techniques)",
    "warm-up": "Training a shallow tied stack first makes training faster (appendix E, warmup)",
    "pieces": "A long sequence is easier to solve in pieces, above all early in training (appendix E, subsequences)",
    "imbalance": "Samples of a batch need different numbers of steps and wait for the slowest; the imbalance is small "
    "(appendix E, imbalances within minibatches)",
    "auxiliary losses": "Losses at intermediate layers of a stack act like solving for an equilibrium: states that are "
    "stable from layer to layer (appendix D)",
    "Jacobian penalty": "Not in the paper: a penalty on the Jacobian at the equilibrium keeps it easy to find",
}

# Recipe, options and depth of an explicit stack, for each base.
BASES: dict[str, tuple[str, str, int | None]] = {
    "transformer": (
        "quickstart",
        "--equilibrium.jacobian_weight 0.0 --equilibrium.warm_up_share 0.25 --equilibrium.warm_up_depth 2",
        None,
    ),
    "trellisnet": (
        "two_cores/ptb_trellisnet",
        "--data.corpus pydoc --data.level character --train.batch_size 16 --model.layer.init_args.weight_norm false",
        None,
    ),
    "stack": ("quickstart", "--model.auxiliary_weight 0.2", 8),
}


class Variant(NamedTuple):
    """A base, or what differs from it in one setting."""

    base: str
    name: str
    label: str
    remark: str | None = None  # key of REMARKS; None for a base
    option: str = ""  # of `deepeq train`, with its value

    def planned(self, *, seed: int, steps: int) -> Planned:
        recipe, options, depth = BASES[self.base]
        name = f"{self.name}_{steps}_steps_seed_{seed}"  # another length must not find a finished run
        rhythm = f"--train.steps {steps} --train.eval_every {steps} --train.checkpoint_every {steps // 4}"
        rhythm += f" --train.log_every {LOG_EVERY} --train.seed {seed} --run.name {name}"
        words = tuple(f"{rhythm} {options} {self.option}".split())
        return Planned(name=name, label=self.label, recipe=recipe, depth=depth, options=words)


LAYER = "--model.layer.init_args"
VARIANTS = [
    Variant("transformer", "transformer", "Transformer: base"),
    Variant("transformer", "dropout", "Transformer: dropout 0.1", "dropout", f"{LAYER}.hidden_dropout 0.1"),
    Variant("transformer", "weight_norm", "Transformer: weight norm", "weight norm", f"{LAYER}.weight_norm true"),
    Variant("transformer", "cold", "Transformer: no warm-up", "warm-up", "--equilibrium.warm_up_share 0.0"),
    Variant("transformer", "penalty", "Transformer: penalty", "Jacobian penalty", "--equilibrium.jacobian_weight 0.15"),
    Variant("trellisnet", "trellisnet", "TrellisNet: base"),
    Variant("trellisnet", "whole", "TrellisNet: in one piece", "pieces", "--equilibrium.subsequence_len null"),
    Variant("trellisnet", "normalized", "TrellisNet: weight norm", "weight norm", f"{LAYER}.weight_norm true"),
    Variant("stack", "stack", "8 layers: base"),
    Variant("stack", "auxiliary", "8 layers: auxiliary losses", "auxiliary losses", "--model.auxiliary_every 2"),
]
WAYS, TOLERANCES = ("forward", "backward"), ("tolerance_of_training", "tolerance_of_evaluation")
IMBALANCE_OF = ("transformer", "penalty", "whole")


class Imbalance(NamedTuple):
    """How the samples of batches that were solved together differ in steps."""

    mean_steps: float
    mean_deviation: float  # standard deviation within a batch, averaged over batches
    fewest_over_most: float  # averaged over batches
    idle: float  # share of the evaluations of a sample that came after it was done


def imbalance(num_steps: Tensor) -> Imbalance:
    """Of the steps of each sample, `(batches, B)`."""
    steps = num_steps.double()
    most = steps.amax(dim=1)
    return Imbalance(
        float(steps.mean()),
        float(steps.std(dim=1, correction=0).mean()),
        float((steps.amin(dim=1) / most).mean()),
        float(1 - steps.sum() / (most.sum() * steps.shape[1])),
    )


@torch.no_grad()
def solutions(run: Path, *, solver: Solver | None = None, masks: bool = False) -> list[Solution]:
    """Solves of a trained model on validation text, in batches as in training.

    Args:
        run: Its folder.
        solver: Of the whole segment; None for the one of evaluation, or the layers of a stack.
        masks: Whether dropout is on.
    """
    torch.manual_seed(0)
    config, _, model = RunFolder(run).load_model()
    corpus = RunFolder(run).load_corpus(config)
    assert isinstance(corpus, Corpus)
    assert isinstance(model.network, TiedNetwork)
    model.train(masks)
    if solver is not None:
        model.network.core = DEQ(model.network.cell, solver=solver, on_failure="ignore", verify=False)
    batches = corpus.stream("valid", batch_size=config.train.batch_size, segment_len=config.train.segment_len)
    memory, found = None, []
    for tokens, targets in islice(batches, NUM_BATCHES):
        output = model(tokens, memory, targets)
        memory = output.memory
        found.append(output.solution)
    return found


def measure(variant: Variant, run: Path, solver: Solver | None) -> dict[str, Any]:
    """What is looked at after the training, which had this solver."""

    def steps(**how: Any) -> Tensor:
        return torch.stack([solution.num_steps for solution in solutions(run, **how)])  # (batches, B)

    if variant.base == "stack":
        residuals = torch.stack([solution.relative_residual for solution in solutions(run)])
        return {"last_layer_residual": float(residuals.mean())}
    if variant.remark == "dropout":
        found = {name: steps(masks=masks) for name, masks in (("with_masks", True), ("without_masks", False))}
        return {f"steps_{name}": float(of.double().mean()) for name, of in found.items()}
    if variant.name in IMBALANCE_OF:
        found = zip(TOLERANCES, (steps(solver=solver), steps()), strict=True)
        return {name: {**imbalance(of)._asdict(), "num_steps": of.tolist()} for name, of in found}
    return {}


def describe(variant: Variant, run: Path) -> dict[str, Any]:
    """A finished run, of one seed."""
    folder = RunFolder(run)
    config, result = load_config(folder.config, complete=True), json.loads(folder.result.read_text())
    rows = [row for row in read_metrics(folder.metrics) if row["split"] == "train"]
    values = {
        "valid_bits_per_character": result["valid_bits_per_character"],
        "train_seconds": rows[-1]["seconds"],
        "tokens": result["num_steps"] * config.train.batch_size * config.train.segment_len,
        "num_threads": result["num_threads"],
        "seed": result["seed"],
    } | measure(variant, run, config.equilibrium.solver)
    if config.model.depth:
        return values | {"passes": 2.0 * config.model.depth}
    # The shallow stack goes back through each of its layers once.
    passes = mean(row["forward_steps"] + row.get("backward_steps", row["forward_steps"]) for row in rows)
    solved = [row for row in rows if not row["warm_up"]]
    curve = {name: [row[name] for row in solved] for name in ("step", "forward_steps", "backward_steps")}
    for way in WAYS:
        values[f"{way}_steps"] = quarters(curve["step"], curve[f"{way}_steps"])
        values[f"{way}_unconverged"] = mean(row[f"{way}_unconverged"] for row in solved)
        values[f"worst_{way}_residual"] = max(row[f"{way}_residual"] for row in solved)
    return values | {"passes": passes, "curve": curve}


def quarters(steps: Sequence[int], values: Sequence[float]) -> list[float]:
    """Means over the four quarters of the steps, which are those after the warm-up, each the last of a row."""
    first = steps[0] - LOG_EVERY
    parts: list[list[float]] = [[], [], [], []]
    for step, value in zip(steps, values, strict=True):
        parts[min(3, 4 * (step - first - 1) // (steps[-1] - first))].append(value)
    return [mean(part) for part in parts]


def merged(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds with standard deviations, and the worst residuals; a curve and samples are the first seed's."""
    values = dict(runs[0])
    for name, value in runs[0].items():
        parts = [run[name] for run in runs]
        if isinstance(value, list):
            values[name] = [mean(quarter) for quarter in zip(*parts, strict=True)]
        elif isinstance(value, float):
            values[name] = max(parts) if name.startswith("worst") else mean(parts)
            if len(runs) > 1 and not name.startswith("worst"):
                values[f"{name}_deviation"] = stdev(parts)
    return values | {"seeds": [run["seed"] for run in runs]}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The remarks, the training, and what was looked at afterwards."""
    columns = ("variant", "remark", "valid bits a character", "+-", "forward steps, by quarter", "backward")
    columns += ("unconverged forward", "backward", "worst residual forward", "backward", "passes", "seconds", "tokens")
    lines, spreads, notes = [], [], ""
    for row in rows.values():
        label, bits = row["label"], row["valid_bits_per_character"]
        steps = [" ".join(f"{value:.1f}" for value in row.get(f"{way}_steps", ())) for way in WAYS]
        shares = [f"{row[f'{way}_unconverged']:.1%}" if f"{way}_steps" in row else None for way in WAYS]
        worst = [row.get(f"worst_{way}_residual") for way in WAYS]
        head = (label, row["remark"], bits, row.get("valid_bits_per_character_deviation"), *steps, *shares, *worst)
        lines.append((*head, row["passes"], row["train_seconds"], f"{row['tokens']:,}"))
        for name in (name for name in TOLERANCES if name in row):
            fields = (row[name][field] for field in Imbalance._fields)
            spreads.append((label, name.replace("_", " "), *fields))
        if "steps_with_masks" in row:
            found = f"{row['steps_with_masks']:.1f} steps with masks, {row['steps_without_masks']:.1f} without"
            notes += f"\n{label}: {found}, to the tolerance of evaluation.\n"
        if "last_layer_residual" in row:
            notes += f"\n{label}: the last layer changes its state by {row['last_layer_residual']:.3g} of its norm.\n"
    text = markdown(("remark", "in short"), REMARKS.items()) + "\n" + markdown(columns, lines)
    columns = ("samples of a batch", "solved to", "mean steps", "deviation", "fewest / most", "evaluations when done")
    return f"{text}\n{markdown(columns, spreads)}{notes}"


def draw(rows: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A panel of steps for each remark and base, one of samples in a batch, one of quality."""
    figure = Figure(figsize=(16, 8), layout="constrained")
    panels = iter(figure.subplots(2, 4).flat)
    for variant in (variant for variant in VARIANTS if variant.remark and variant.base != "stack"):
        axes = next(panels)
        title = f"{variant.remark[0].upper()}{variant.remark[1:]} ({variant.label.split(':')[0]})"
        axes.set(title=title, xlabel="optimizer step", ylabel="steps of a solve (mean over samples)")
        for index, row in enumerate(rows[name] for name in (variant.base, variant.name) if name in rows):
            curve = row["curve"]
            axes.plot(curve["step"], curve["forward_steps"], color=f"C{index}", label=row["label"])
            axes.plot(curve["step"], curve["backward_steps"], ":", color=f"C{index}")
            axes.legend(title="solid: forward, dotted: backward", fontsize=8, title_fontsize=8, loc="upper left")
        axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
        axes.grid(alpha=0.3)
    _draw_imbalance(next(panels), rows)
    _draw_quality(next(panels), rows)
    return figure


def _draw_imbalance(axes: Axes, rows: Mapping[str, Mapping[str, Any]]) -> None:
    axes.set(title="Imbalance", xlabel="steps of a sample / most in its batch", ylabel="share of the samples")
    bins = [index / 20 for index in range(21)]
    for index, row in enumerate(row for row in rows.values() if "tolerance_of_evaluation" in row):
        steps = torch.tensor(row["tolerance_of_evaluation"]["num_steps"]).double()
        shares = (steps / steps.amax(dim=1, keepdim=True)).flatten().tolist()
        weights = [1 / len(shares)] * len(shares)
        label = f"{row['label']}, mean {float(steps.mean()):.1f}"
        axes.hist(shares, bins=bins, weights=weights, histtype="step", color=f"C{index}", linewidth=1.5, label=label)
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    axes.legend(title="tolerance of evaluation", fontsize=8, title_fontsize=8, loc="upper left")


def _draw_quality(axes: Axes, rows: Mapping[str, Mapping[str, Any]]) -> None:
    axes.set(title="Quality at equal tokens of a base", xlabel="validation bits a character")
    colors = [f"C{list(BASES).index(row['base'])}" for row in rows.values()]
    labels, bits = [row["label"] for row in rows.values()], [row["valid_bits_per_character"] for row in rows.values()]
    spread = [row.get("valid_bits_per_character_deviation", 0.0) for row in rows.values()]
    bars = axes.barh(labels, bits, xerr=spread if any(spread) else None, color=colors, alpha=0.6)
    axes.bar_label(bars, fmt=" %.2f", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlim(0, 1.15 * max(bits))
    axes.invert_yaxis()


def main() -> None:
    options = parser("ablation", __doc__ or "")
    options.add_argument("--runs", type=Path, help="folder of the runs (default: OUT/runs)")
    options.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    options.add_argument("--seeds", type=int, nargs="+", default=[0], help="of which the mean is taken")
    options.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each run")
    arguments = options.parse_args()
    _check(options, arguments)
    torch.set_flush_denormal(True)  # as training does
    folder = arguments.runs or arguments.out / "runs"
    plans = [(variant, variant.planned(seed=s, steps=arguments.steps)) for s in arguments.seeds for variant in VARIANTS]
    finished = train_all([plan for _, plan in plans], folder, minutes=arguments.minutes)
    rows = {}
    for variant in VARIANTS:
        own = [folder / plan.name for planned, plan in plans if planned is variant]
        done = [describe(variant, run) for run in own if RunFolder(run).result.exists()]
        if done:
            rows[variant.name] = {"label": variant.label, "base": variant.base, "remark": variant.remark} | merged(done)
    if rows:
        line = command("ablation", arguments, hidden=("runs", "minutes"))
        result = origin(line) | {"finished": finished, "remarks": REMARKS, "variants": rows}
        write(arguments.out, "ablation", result, table=table(rows), figure=draw(rows))
    if not finished:
        sys.exit(f"ablation: {len(rows)} of {len(VARIANTS)} variants are finished; go on with the same command")


def _check(options: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.steps < 8 * LOG_EVERY or arguments.steps % (4 * LOG_EVERY):
        options.error(f"--steps {arguments.steps} must be a multiple of {4 * LOG_EVERY}, at least {8 * LOG_EVERY}")
    if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds) < 0:
        options.error(f"--seeds {arguments.seeds} must be different and >= 0")


if __name__ == "__main__":
    main()
