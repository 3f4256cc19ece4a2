"""Table 4: what do training and inference of a DEQ cost beside those of the stacks of its cell, at which perplexity?

    python benchmarks/runtime.py --out DIR [--runs DIR] [--minutes M]

Trains, on Penn Treebank, small DEQs and the weight-tied stacks of the same cells with 2 to 18 layers: the same tokens
in the same order, the same optimizer, each Transformer at the learning rate that suits its depth, and the DEQ with
weight normalization as well. Transformers read characters, where more layers pay within so few tokens. Perplexities are
per token: per character there, per word in the other family.

Then the networks take turns in one process, for several rounds: inference over the first validation tokens, and a few
training steps each. A ratio is the median over rounds of the time of the DEQ divided by that of the stack in the same
round; above 1 the DEQ is slower. The training steps are the last ones of the run, where the solves take longest.
Inference is timed at several tolerances, where a batch waits for its slowest sample, and with at most a few steps of
plain iteration, each with the perplexity that it reaches. A depth of the paper that is not trained, 70 layers of
TrellisNet, is timed too: the cell of the deepest stack, stacked higher. It has no perplexity.

Networks are timed with the threads that torch takes here; the seconds of the runs are those of their training.
"""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from _harness import Benchmark, in_turns, markdown, median_ratio
from _runs import Outcome, Planned, add_options, quality, runs_folder, train_all
from lightning.fabric import Fabric
from matplotlib.figure import Figure
from ptb import TRANSFORMER, TRELLISNET, small

from deepeq import FixedPointIteration, Solver, Stack
from deepeq.data import Corpus, SegmentStream
from deepeq.deq import How
from deepeq.models import LanguageModel
from deepeq.train import RunConfig, RunFolder, Trainer, evaluate, quality_metrics

INFERENCE_RTOL, INFERENCE_STEPS = (1e-1, 1e-2, 1e-3), (12, 14, 16)
CHARACTERS_STEPS = 2400
# Learning rates of the stacks by depth; the DEQ has the recipe's, 2e-3. LOG.md has the trials.
CHARACTERS_RATES = {2: "2e-3", 4: "2e-3", 8: "1.4e-3", 16: "1e-3", 18: "1e-3"}
CHARACTERS = """--data.corpus folder --data.unit character --model.input_dropout 0.0 --model.output_dropout 0.0
    --train.eval_batch_size 64"""
# Pretraining grows the stack from 2 to 12 layers. Evaluation at rtol=0.01, where Anderson acceleration is the cheapest.
CHARACTERS_DEQ = """--model.layer.init_args.weight_norm true --equilibrium.pretrain_depth 2
    --equilibrium.pretrain_depth_schedule deepeq.train.Geometric --equilibrium.pretrain_depth_schedule.end 6.0
    --equilibrium.jacobian_weight 0.03 --equilibrium.backward_solver.init_args.max_steps 12
    --equilibrium.solver.init_args.max_steps 16 --equilibrium.solver.init_args.history_size 5
    --equilibrium.eval_solver deepeq.Anderson --equilibrium.eval_solver.rtol 1e-2
    --equilibrium.eval_solver.max_steps 40 --equilibrium.eval_solver.history_size 5"""


class Family(NamedTuple):
    """A DEQ and the stacks of its cell."""

    name: str
    label: str
    training: tuple[str, int]  # recipe and number of optimizer steps
    depths: Mapping[int, tuple[str, ...]]  # of the stacks, with the options of each
    paper_depth: int  # that the paper compares with
    paper: dict[str, float]  # ratios of table 4
    options: tuple[str, ...] = ()  # of all runs
    equilibrium: tuple[str, ...] = ()  # of the DEQ

    def runs(self) -> list[Planned]:
        """Return the runs to train, the DEQ last."""
        planned = [
            small(f"{self.name}_{n}_layers", f"{self.label}, {n} layers, tied", self.training, n, self.options + own)
            for n, own in self.depths.items()
        ]
        options = self.options + self.equilibrium
        return [*planned, small(f"{self.name}_deq", f"DEQ-{self.label}", self.training, options=options)]


def families() -> dict[str, Family]:
    """Return what is compared; the characters are those of the folder `ptb` in the folder that DEEPEQ_DATA names."""
    folder = Path(os.environ.get("DEEPEQ_DATA", "data")) / "ptb"
    characters = (*CHARACTERS.split(), "--data.folder", str(folder), "--train.eval_every", str(CHARACTERS_STEPS))
    rates = {depth: ("--optimizer.lr", rate) for depth, rate in CHARACTERS_RATES.items()}
    training, paper = (TRANSFORMER[0], CHARACTERS_STEPS), {"training": 2.82, "inference": 1.76}
    deq = tuple(CHARACTERS_DEQ.split())
    words = {"training": 2.40, "inference": 1.64}
    return {
        "characters": Family("characters", "Transformer (characters)", training, rates, 18, paper, characters, deq),
        "trellisnet": Family("trellisnet", "TrellisNet (words)", TRELLISNET, {8: ()}, 70, words),
    }


class Contestant(NamedTuple):
    """A trained network, and what is timed of it."""

    outcome: Outcome | None  # None where the depth was not trained
    label: str
    config: RunConfig
    trainer: Trainer
    inference: Mapping[str, How | None]  # by the name of the setting


def enter(
    benchmark: Benchmark, outcome: Outcome, folder: Path, corpus: Corpus, *, depth: int | None = None
) -> Contestant:
    """Return a trained network, ready for more steps of its training.

    Args:
        benchmark: The benchmark.
        outcome: The run.
        folder: Where it is.
        corpus: Its text.
        depth: Number of layers of another stack of its cell; None for the network that was trained.
    """
    trained, _ = benchmark.open_text_model(folder / outcome.name)
    config, label = trained.config, outcome.label
    inference: dict[str, How | None] = {"": None}
    if depth is not None:
        config, label = replace(config, model=replace(config.model, depth=depth)), f"{depth} layers, not trained"
        inference = {"": Stack(depth=depth)}
    elif config.model.depth == 0:
        solver = config.equilibrium.eval_solver
        assert solver is not None
        settings: dict[str, Solver] = {f"rtol={r:g}": replace(solver, rtol=r, atol=0.0) for r in INFERENCE_RTOL}
        settings |= {f"{n}_plain_steps": FixedPointIteration(rtol=1e-2, max_steps=n) for n in INFERENCE_STEPS}
        equilibrium = config.equilibrium
        inference = {name: replace(equilibrium, eval_solver=each).evaluation_how() for name, each in settings.items()}
    fabric = Fabric(accelerator="cuda" if torch.cuda.is_available() else "cpu", devices=1)
    with tempfile.TemporaryDirectory() as unused:
        trainer = Trainer(config, RunFolder(Path(unused)), corpus, fabric)
    trainer.model.load_state_dict(trained.model.state_dict())
    return Contestant(None if depth else outcome, label, config, trainer, inference)


def take_turns(
    contestants: Sequence[Contestant], corpus: Corpus, *, rounds: int, steps: int, max_tokens: int
) -> list[dict[str, Any]]:
    """Return the seconds of each network in each round, and what its inference and its solves measured.

    Args:
        contestants: The networks.
        corpus: Their text.
        rounds: Number of rounds.
        steps: Number of training steps in a round.
        max_tokens: Number of validation tokens of a pass of inference.
    """
    passes, training, values = {}, {}, {}
    for index, (_, _, config, trainer, inference) in enumerate(contestants):
        sizes = {"batch_size": config.train.batch_size, "segment_len": config.train.segment_len}
        batches = SegmentStream(corpus.valid[: max_tokens + 1], **sizes)
        for name, how in inference.items():
            passes[index, name] = partial(_infer, trainer.model, batches, how, values.setdefault((index, name), {}))
        # The last steps of the run once more, at the learning rate of its end.
        turns = iter(range(config.train.steps - (rounds + 1) * steps, config.train.steps))
        training[index] = partial(_train, trainer, turns, steps)
    print("runtime: inference", file=sys.stderr)
    inference_seconds = in_turns(passes, rounds)  # before training steps change the weights
    print("runtime: training", file=sys.stderr)
    step_seconds = in_turns(training, rounds)
    measured = []
    for index, contestant in enumerate(contestants):
        settings = {}
        for name in contestant.inference:
            found = values[index, name]
            solves = {key: value for key, value in found.items() if key.startswith("forward_")}
            perplexity = quality(quality_metrics(corpus.unit, found["nll"]))
            settings[name] = {"seconds": inference_seconds[index, name], "perplexity": perplexity, **solves}
        solves = {key: value for key, value in contestant.trainer.averages.compute().items() if "ward_" in key}
        seconds = [each / steps for each in step_seconds[index]]
        measured.append({"step_seconds": seconds, "inference": settings, "solves": solves})
    return measured


def _infer(model: LanguageModel, batches: SegmentStream, how: How | None, values: dict[str, Any]) -> None:
    values.update(evaluate(model.eval(), batches, how=how))


def _train(trainer: Trainer, turns: Any, steps: int) -> None:
    for _ in range(steps):
        trainer.optimizer_step.run(next(turns), [])


def compare(plan: Family, contestants: Sequence[Contestant], measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the curve of perplexity against time, and the ratios of table 4."""
    networks = []
    for contestant, row in zip(contestants, measured, strict=True):
        outcome, config = contestant.outcome, contestant.config
        # All steps at the price of the last ones: an upper bound for a DEQ, whose first steps are cheaper.
        seconds = config.train.steps * median(row["step_seconds"])
        described = {"label": contestant.label, "depth": config.model.depth, "training_seconds": seconds}
        if outcome is None:
            for setting in row["inference"].values():
                del setting["perplexity"]
        else:
            described |= {
                "name": outcome.name,
                "tokens": outcome.tokens,
                "valid_perplexity": outcome.quality("valid"),
                "test_perplexity": outcome.quality("test"),
                "num_params": outcome.result["num_params"],
                "run_seconds": outcome.result["train_seconds"],
                "run_threads": outcome.result["num_threads"],
            }
        networks.append(described | row)
    equilibrium = next(network for network in networks if not network["depth"])
    by_depth = {network["depth"]: network for network in networks if network["depth"]}
    perplexities = {depth: by_depth[depth]["valid_perplexity"] for depth in plan.depths}
    gains = (
        {f"{n}_layers": perplexities[4] / value - 1 for n, value in perplexities.items()} if 4 in perplexities else None
    )
    against = {f"{depth}_layers": versus(equilibrium, network) for depth, network in by_depth.items()}
    return {"networks": networks, "better_than_4_layers_by": gains, "against": against, "paper": plan.paper}


def versus(equilibrium: Mapping[str, Any], stack: Mapping[str, Any]) -> dict[str, Any]:
    """Return ratios of time, beside those of the perplexities that were reached."""
    whole, settings = stack["inference"][""], equilibrium["inference"]
    ratios = {
        "training": median_ratio(equilibrium["step_seconds"], stack["step_seconds"]),
        "inference": {
            name: {"ratio": median_ratio(each["seconds"], whole["seconds"])} for name, each in settings.items()
        },
    }
    if "valid_perplexity" in stack:
        ratios["valid_perplexity_ratio"] = equilibrium["valid_perplexity"] / stack["valid_perplexity"]
        for name, value in settings.items():
            ratios["inference"][name]["perplexity_ratio"] = value["perplexity"] / whole["perplexity"]
    return ratios


def table(result: Mapping[str, Any]) -> str:
    """Return a row for each network."""
    rows = []
    for family in result["families"].values():
        for network in family["networks"]:
            inference = {name: median(setting["seconds"]) for name, setting in network["inference"].items()}
            seconds = ", ".join(f"{value:.3g} {name}".strip() for name, value in inference.items())
            row = [network["label"], network.get("valid_perplexity"), network.get("test_perplexity")]
            row += [network["training_seconds"], seconds, None, None]
            if against := family["against"].get(f"{network['depth']}_layers"):
                ratios = ", ".join(f"{each['ratio']:.2f} {name}" for name, each in against["inference"].items())
                row[-2:] = against["training"], ratios
            rows.append(row)
    columns = ("network", "valid perplexity", "test perplexity", "s training", "s inference")
    return markdown((*columns, "DEQ / this, training", "DEQ / this, inference"), rows)


def draw(result: Mapping[str, Any]) -> Figure:
    """Return a figure of perplexity against seconds of training, with a panel for each family."""
    figure = Figure(figsize=(13.0, 5.2), layout="constrained")
    panels = figure.subplots(1, len(result["families"]), squeeze=False)[0]
    for axes, family in zip(panels, result["families"].values(), strict=True):
        networks = [network for network in family["networks"] if "valid_perplexity" in network]
        points = {n["depth"]: (n["training_seconds"], n["valid_perplexity"]) for n in networks}
        deq, stacks = points.pop(0), sorted(points.items())
        axes.plot(
            *zip(*(point for _, point in stacks), strict=True), "o-", label="weight-tied stacks, with their layers"
        )
        for depth, point in stacks:
            axes.annotate(str(depth), point, textcoords="offset points", xytext=(3, 6))
        axes.plot(*([value] for value in deq), "*", markersize=14, label="DEQ")
        title = f"{networks[0]['label'].split(',')[0]}, {networks[0]['tokens'] / 1e6:.1f} M tokens"
        axes.set(title=title, xlabel="seconds of training", ylabel="validation perplexity (lower is better)")
        axes.margins(0.2)
        axes.legend()
    return figure


def main() -> None:
    plans, benchmark = families(), Benchmark("runtime", __doc__, draw)
    options = benchmark.parser
    add_options(benchmark)
    options.add_argument("--families", nargs="+", choices=tuple(plans), default=list(plans), help="which cells")
    options.add_argument("--rounds", type=int, default=5, help="turns of each network")
    options.add_argument("--steps", type=int, default=6, help="training steps of a turn")
    options.add_argument("--max_tokens", type=int, default=20_000, help="validation tokens of a pass of inference")
    arguments = benchmark.parse()
    chosen, folder = [plans[name] for name in arguments.families], runs_folder(benchmark)
    done, finished = train_all(benchmark, [run for family in chosen for run in family.runs()])
    if not finished:
        benchmark.stop("not all runs are finished; continue with the same command")
    sizes = {"rounds": arguments.rounds, "steps": arguments.steps, "max_tokens": arguments.max_tokens}
    measured = {}
    for family in chosen:
        own = [outcome for outcome in done if outcome.name in {run.name for run in family.runs()}]
        _, corpus = benchmark.open_text_model(folder / own[0].name)
        contestants = [enter(benchmark, outcome, folder, corpus) for outcome in own]
        if family.paper_depth not in family.depths:
            deepest = next(outcome for outcome in own if outcome.name.endswith(f"_{max(family.depths)}_layers"))
            contestants.append(enter(benchmark, deepest, folder, corpus, depth=family.paper_depth))
        measured[family.name] = compare(family, contestants, take_turns(contestants, corpus, **sizes))
    result = {"families": measured}
    benchmark.report(result, table(result))


if __name__ == "__main__":
    main()
