"""What does each remark of the paper's appendices D and E on training do in a small run?

    python benchmarks/ablation.py --out DIR [--runs DIR] [--minutes M] [--seeds 0 1 2] [--steps N]

The text is the documentation that every CPython carries, as characters. There are three bases, and variants that differ
from their base in one setting: a DEQ-Transformer (recipes/two_cores/pydoc_transformer.yaml without its Jacobian
penalty, pretrained as a stack of two layers), a DEQ-TrellisNet solved in pieces of four positions, and an explicit
stack of eight tied layers. A base and its variants see the same batches in the same order. The training after the
pretraining is cut into quarters, and solver steps are averaged over each. For an equilibrium in pieces, they are those
of the slowest piece forward, and of the mean piece backward. `passes` is the cost of an optimizer step without a clock:
evaluations of the cell plus products with its Jacobian, or twice the number of layers of a stack. For pieces it is an
upper bound. It leaves out what a Jacobian penalty costs, two passes at every other step. After the training, on
validation text: solver steps with and without the masks of dropout; steps of each sample of a batch beside those of the
slowest one, for which the others wait; how much the last layer of a stack changes the state.

Seconds are those of training, whatever else the machine did, without evaluation, reading the text and starting up. One
seed, the default, cannot tell a small effect from chance, and segments are far shorter than the paper's.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from _harness import Benchmark, markdown
from _runs import Outcome, Planned, add_options, continue_later, runs_folder, train_all
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from deepeq import Equilibrium, Solution, Solver

STEPS, LOG_EVERY, NUM_BATCHES = 240, 5, 16

REMARKS = {
    "dropout": "One dropout mask for all steps makes the equilibrium slower to find; without it, in evaluation, it is "
    "easier (appendix E, other deep techniques)",
    "weight norm": "Steps grow over the training (section 5, convergence to equilibrium); weight normalization slows "
    "the growth, forward and backward (appendix E, other deep techniques)",
    "pretraining": "Training a shallow tied stack first makes training faster (appendix E, warmup)",
    "pieces": "A long sequence is easier to solve in pieces, above all early in training (appendix E, subsequences)",
    "imbalance": "Samples of a batch need different numbers of steps and wait for the slowest; the imbalance is small "
    "(appendix E, imbalances within minibatches)",
    "auxiliary losses": "Losses at intermediate layers of a stack act like solving for an equilibrium: states that are "
    "stable from layer to layer (appendix D)",
    "Jacobian penalty": "Not in the paper: a penalty on the Jacobian at the equilibrium keeps it easy to find",
}

# Recipe, options, and number of layers of an explicit stack, for each base.
BASES: dict[str, tuple[str, str, int | None]] = {
    "transformer": (
        "two_cores/pydoc_transformer",
        "--equilibrium.jacobian_weight 0.0 --equilibrium.pretrain_fraction 0.25 --equilibrium.pretrain_depth 2",
        None,
    ),
    "trellisnet": (
        "two_cores/ptb_trellisnet",
        "--data.corpus pydoc --data.unit character --train.batch_size 16 --model.layer.init_args.weight_norm false",
        None,
    ),
    "stack": ("two_cores/pydoc_transformer", "--model.auxiliary_weight 0.2", 8),
}


class Variant(NamedTuple):
    """A base, or what differs from it in one setting."""

    base: str
    name: str
    label: str
    remark: str = ""  # key of REMARKS; empty for a base
    option: str = ""  # of `deepeq train`, with its value

    def planned(self, *, seed: int, steps: int) -> Planned:
        """Return the run to train."""
        recipe, options, depth = BASES[self.base]
        name = f"{self.name}_{steps}_steps_seed_{seed}"  # another length must not find a finished run
        intervals = f"--train.steps {steps} --train.eval_every {steps} --train.checkpoint_every {steps // 4}"
        intervals += f" --train.log_every {LOG_EVERY} --train.seed {seed} --run.name {name}"
        words = tuple(f"{intervals} {options} {self.option}".split())
        return Planned(name=name, label=self.label, recipe=recipe, depth=depth, options=words)


LAYER = "--model.layer.init_args"
VARIANTS = [
    Variant("transformer", "transformer", "Transformer: base"),
    Variant("transformer", "dropout", "Transformer: dropout 0.1", "dropout", f"{LAYER}.hidden_dropout 0.1"),
    Variant("transformer", "weight_norm", "Transformer: weight norm", "weight norm", f"{LAYER}.weight_norm true"),
    Variant("transformer", "cold", "Transformer: no pretraining", "pretraining", "--equilibrium.pretrain_fraction 0.0"),
    Variant("transformer", "penalty", "Transformer: penalty", "Jacobian penalty", "--equilibrium.jacobian_weight 0.15"),
    Variant("trellisnet", "trellisnet", "TrellisNet: base"),
    Variant("trellisnet", "whole", "TrellisNet: in one piece", "pieces", "--equilibrium.piece_len null"),
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
    idle: float  # fraction of the evaluations of samples that were already done


def imbalance(num_steps: Tensor) -> Imbalance:
    """Return the imbalance of the steps of each sample, `(batches, B)`."""
    steps = num_steps.double()
    most = steps.amax(dim=1)
    return Imbalance(
        float(steps.mean()),
        float(steps.std(dim=1, correction=0).mean()),
        float((steps.amin(dim=1) / most).mean()),
        float(1 - steps.sum() / (most.sum() * steps.shape[1])),
    )


@torch.no_grad()
def solutions(benchmark: Benchmark, run: Path, *, solver: Solver | None = None, masks: bool = False) -> list[Solution]:
    """Return the solves of a trained model on validation text, in batches as in training.

    Args:
        benchmark: The benchmark.
        run: The run folder.
        solver: Solver of the whole segment; None for that of evaluation, or the layers of a stack.
        masks: Whether dropout is on.
    """
    torch.manual_seed(0)
    trained, corpus = benchmark.open_text_model(run)
    config, model, how = trained.config, trained.model.train(masks), trained.how
    if solver is not None:
        how = Equilibrium(solver=solver, on_failure="ignore", verify=False)
    batches = corpus.stream("valid", batch_size=config.train.batch_size, segment_len=config.train.segment_len)
    memory, found = None, []
    for tokens, targets in islice(batches, NUM_BATCHES):
        output = model(tokens.to(model.device), memory, targets.to(model.device), how=how)
        memory = output.memory
        found.append(output.solution)
    return found


def measure(benchmark: Benchmark, variant: Variant, run: Path, solver: Solver | None) -> dict[str, Any]:
    """Return what is measured after a training with this solver."""

    def steps(**settings: Any) -> Tensor:
        return torch.stack([each.num_steps for each in solutions(benchmark, run, **settings)])  # (batches, B)

    if variant.base == "stack":
        residuals = torch.stack([each.relative_residual for each in solutions(benchmark, run)])
        return {"last_layer_residual": float(residuals.mean())}
    if variant.remark == "dropout":
        found = {"with_masks": steps(masks=True), "without_masks": steps()}
        return {f"steps_{name}": float(counts.double().mean()) for name, counts in found.items()}
    if variant.name in IMBALANCE_OF:
        found = zip(TOLERANCES, (steps(solver=solver), steps()), strict=True)
        return {name: {**imbalance(counts)._asdict(), "num_steps": counts.tolist()} for name, counts in found}
    return {}


def describe(benchmark: Benchmark, variant: Variant, outcome: Outcome) -> dict[str, Any]:
    """Return everything about a finished run of one seed."""
    config, result = outcome.config, outcome.result
    rows = [row for row in outcome.rows if row["split"] == "train"]
    values = {
        "valid_bits_per_character": result["valid_bits_per_character"],
        "train_seconds": rows[-1]["seconds"],
        "tokens": outcome.tokens,
        "num_threads": result["num_threads"],
        "seed": result["seed"],
    } | measure(benchmark, variant, runs_folder(benchmark) / outcome.name, config.equilibrium.solver)
    if config.model.depth:
        return values | {"passes": 2.0 * config.model.depth}
    # Pretraining goes back through each layer of its stack once.
    passes = mean(row["forward_steps"] + row.get("backward_steps", row["forward_steps"]) for row in rows)
    solved = [row for row in rows if not row["pretraining"]]
    curve = {name: [row[name] for row in solved] for name in ("step", "forward_steps", "backward_steps")}
    for way in WAYS:
        values[f"{way}_steps"] = quarters(curve["step"], curve[f"{way}_steps"])
        values[f"{way}_unconverged"] = mean(row[f"{way}_unconverged"] for row in solved)
        values[f"worst_{way}_residual"] = max(row[f"{way}_residual"] for row in solved)
    return values | {"passes": passes, "curve": curve}


def quarters(steps: Sequence[int], values: Sequence[float]) -> list[float]:
    """Return means over the four quarters of the training after the pretraining.

    Args:
        steps: Last optimizer step of each row of metrics.
        values: Value of each row.
    """
    first = steps[0] - LOG_EVERY
    parts: list[list[float]] = [[], [], [], []]
    for step, value in zip(steps, values, strict=True):
        parts[min(3, 4 * (step - first - 1) // (steps[-1] - first))].append(value)
    return [mean(part) for part in parts]


def merged(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means over seeds with standard deviations, and the worst residuals; curves are those of the first seed."""
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
    """Return the remarks, the training, and what was measured after it."""
    columns = ("variant", "remark", "valid bits per character", "+-", "forward steps, by quarter", "backward")
    columns += ("unconverged forward", "backward", "worst residual forward", "backward", "passes", "seconds", "tokens")
    lines, spreads, notes = [], [], ""
    for row in rows.values():
        label, bits = row["label"], row["valid_bits_per_character"]
        steps = [" ".join(f"{value:.1f}" for value in row.get(f"{way}_steps", ())) for way in WAYS]
        fractions = [f"{row[f'{way}_unconverged']:.1%}" if f"{way}_steps" in row else None for way in WAYS]
        worst = [row.get(f"worst_{way}_residual") for way in WAYS]
        head = (label, row["remark"], bits, row.get("valid_bits_per_character_deviation"), *steps, *fractions, *worst)
        lines.append((*head, row["passes"], row["train_seconds"], f"{row['tokens']:,}"))
        for name in (name for name in TOLERANCES if name in row):
            spreads.append((label, name.replace("_", " "), *(row[name][field] for field in Imbalance._fields)))
        if "steps_with_masks" in row:
            found = f"{row['steps_with_masks']:.1f} steps with masks, {row['steps_without_masks']:.1f} without"
            notes += f"\n{label}: {found}, to the tolerance of evaluation.\n"
        if "last_layer_residual" in row:
            notes += f"\n{label}: the last layer changes the state by {row['last_layer_residual']:.3g} of its norm.\n"
    samples = ("samples of a batch", "solved to", "mean steps", "deviation", "fewest / most", "evaluations when done")
    parts = (markdown(("remark", "in short"), REMARKS.items()), markdown(columns, lines), markdown(samples, spreads))
    return "\n".join(parts) + notes


def draw(result: dict[str, Any]) -> Figure:
    """Return a figure with panels of steps for each remark and base, of samples in a batch, and of quality."""
    rows = result["variants"]
    figure = Figure(figsize=(24, 11.5), layout="constrained")
    panels = iter(figure.subplots(2, 4).flat)
    for variant in (variant for variant in VARIANTS if variant.remark and variant.base != "stack"):
        axes, remark = next(panels), variant.remark
        title = f"{remark[0].upper()}{remark[1:]} ({variant.label.split(':')[0]})"
        axes.set(title=title, xlabel="optimizer step", ylabel="steps of a solve (mean over samples)")
        for index, row in enumerate(rows[name] for name in (variant.base, variant.name) if name in rows):
            curve = row["curve"]
            axes.plot(curve["step"], curve["forward_steps"], color=f"C{index}", label=row["label"])
            axes.plot(curve["step"], curve["backward_steps"], ":", color=f"C{index}")
            axes.legend(title="solid: forward, dotted: backward", loc="upper left")
        axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    _draw_imbalance(next(panels), rows)
    _draw_quality(next(panels), rows)
    return figure


def _draw_imbalance(axes: Axes, rows: Mapping[str, Mapping[str, Any]]) -> None:
    axes.set(title="Imbalance", xlabel="steps of a sample / most in its batch", ylabel="fraction of the samples")
    bins = [index / 20 for index in range(21)]
    for index, row in enumerate(row for row in rows.values() if "tolerance_of_evaluation" in row):
        steps = torch.tensor(row["tolerance_of_evaluation"]["num_steps"]).double()
        ratios = (steps / steps.amax(dim=1, keepdim=True)).flatten().tolist()
        weights = [1 / len(ratios)] * len(ratios)
        label = f"{row['label']}, mean {float(steps.mean()):.1f}"
        axes.hist(ratios, bins=bins, weights=weights, histtype="step", color=f"C{index}", linewidth=1.5, label=label)
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    axes.legend(title="tolerance of evaluation", loc="upper left")


def _draw_quality(axes: Axes, rows: Mapping[str, Mapping[str, Any]]) -> None:
    axes.set(title="Quality at equal tokens of a base", xlabel="validation bits per character (lower is better)")
    colors = [f"C{list(BASES).index(row['base'])}" for row in rows.values()]
    labels, bits = [row["label"] for row in rows.values()], [row["valid_bits_per_character"] for row in rows.values()]
    spread = [row.get("valid_bits_per_character_deviation", 0.0) for row in rows.values()]
    bars = axes.barh(labels, bits, xerr=spread if any(spread) else None, color=colors, alpha=0.6)
    axes.bar_label(bars, fmt=" %.2f")
    axes.set_xlim(0, 1.15 * max(bits))
    axes.invert_yaxis()


def main() -> None:
    benchmark = Benchmark("ablation", __doc__, draw)
    options = benchmark.parser
    add_options(benchmark)
    options.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds, whose mean is taken")
    options.add_argument("--steps", type=int, default=STEPS, help="number of optimizer steps of each run")
    arguments = benchmark.parse()
    steps, seeds = arguments.steps, arguments.seeds
    if steps < 8 * LOG_EVERY or steps % (4 * LOG_EVERY):
        options.error(f"--steps {steps} must be a multiple of {4 * LOG_EVERY}, at least {8 * LOG_EVERY}")
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        options.error(f"--seeds {seeds} must be different and >= 0")
    plans = [(variant, variant.planned(seed=seed, steps=steps)) for seed in seeds for variant in VARIANTS]
    outcomes, finished = train_all(benchmark, [plan for _, plan in plans])
    trained, rows = {outcome.name: outcome for outcome in outcomes}, {}
    for variant in VARIANTS:
        own = [trained[plan.name] for of, plan in plans if of is variant and plan.name in trained]
        about = {"label": variant.label, "base": variant.base, "remark": variant.remark or None}
        if own:
            rows[variant.name] = about | merged([describe(benchmark, variant, outcome) for outcome in own])
    if rows:
        benchmark.report({"finished": finished, "remarks": REMARKS, "variants": rows}, table(rows))
    continue_later(benchmark, len(outcomes), len(plans))


if __name__ == "__main__":
    main()
