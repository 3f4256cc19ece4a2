"""Table 4: what do training and inference of a DEQ cost beside those of the stacks of its cell, at which perplexity?

    deepeq bench runtime --out DIR [--runs DIR] [--minutes M]

Trains, on Penn Treebank, small DEQs and the weight-tied stacks of the same cells with 2 to 18 layers: the same tokens
in the same order, the same optimizer, each Transformer at the learning rate that suits its depth, the DEQ with weight
normalization besides. Transformers read characters, where more layers pay within so few tokens; perplexities are those
of a token, a character there and a word in the other family. Then the networks take turns, in one process: inference
over the first validation tokens, and a few training steps each, several rounds. A ratio is the median over rounds of
the time of the DEQ over that of the stack in the same round; above 1 the DEQ is slower. Steps of the DEQ are timed at
the end of training, where its solves take longest. Inference is timed at several tolerances, where a batch waits for
its slowest sample, and with a few steps of plain iteration at most, each with the perplexity that is reached. A depth
of the paper that is not trained, 70 layers of TrellisNet, is timed too: the cell of the deepest stack, stacked higher.
It has no perplexity.

Networks are timed with the threads that torch takes here; the seconds of the runs are those of when they were trained.
"""

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from _report import command, markdown, origin, parser, write
from _runs import Outcome, Planned, outcomes, quality, train_all
from matplotlib.figure import Figure
from ptb import TRANSFORMER, TRELLISNET, small

from deepeq import DEQ, FixedPointIteration, Solver, Unrolled
from deepeq.data import Batches, Corpus
from deepeq.data.segments import SegmentStream
from deepeq.models import LanguageModel, TiedNetwork
from deepeq.train import RunFolder, load_config
from deepeq.train.config import RunConfig
from deepeq.train.cores import Cores, evaluation_core
from deepeq.train.devices import make_fabric
from deepeq.train.evaluation import evaluate
from deepeq.train.metrics import Averages
from deepeq.train.metrics import quality as measured_quality
from deepeq.train.step import Step

INFERENCE_RTOL, INFERENCE_STEPS = (1e-1, 1e-2, 1e-3), (12, 14, 16)
CHARACTERS_STEPS = 2400
# Of the stacks by depth; the DEQ has the recipe's, 2e-3. In trials of up to 1,200 steps 16 layers fell behind at 1.4e-3
# and failed at 2e-3; 4 layers were better at 2e-3 than at 1e-3 and 2.8e-3; 2 and 8 layers were not tried. With the
# weight normalization of the DEQ, at 2e-3, 4 layers were worse, and 16 layers behind those without at 1e-3.
CHARACTERS_RATES = {2: "2e-3", 4: "2e-3", 8: "1.4e-3", 16: "1e-3", 18: "1e-3"}
Core = DEQ | Unrolled


class Family(NamedTuple):
    """A DEQ and the stacks of its cell."""

    name: str
    label: str
    training: tuple[str, int]  # recipe and optimizer steps
    depths: Mapping[int, tuple[str, ...]]  # of the stacks, with options of each
    paper_depth: int  # that the paper compares with
    paper: dict[str, float]  # ratios of table 4
    options: tuple[str, ...] = ()  # of all runs
    equilibrium: tuple[str, ...] = ()  # of the DEQ

    def runs(self) -> list[Planned]:
        stacks = [
            small(
                f"{self.name}_{depth}_layers",
                f"{self.label}, {depth} layers, tied",
                self.training,
                depth,
                self.options + options,
            )
            for depth, options in self.depths.items()
        ]
        options = self.options + self.equilibrium
        return [*stacks, small(f"{self.name}_deq", f"DEQ-{self.label}", self.training, options=options)]


def families() -> dict[str, Family]:
    """What is compared; the characters are those of the folder ptb in the one that DEEPEQ_DATA names."""
    folder = Path(os.environ.get("DEEPEQ_DATA", "data")) / "ptb"
    characters = ("--data.corpus", "folder", "--data.folder", str(folder), "--data.level", "character")
    characters += ("--model.input_dropout", "0.0", "--model.output_dropout", "0.0", "--train.eval_batch_size", "64")
    characters += ("--train.eval_every", str(CHARACTERS_STEPS))
    # The shallow stack grows from 2 to 12 layers. Evaluation at rtol=0.01, where Anderson acceleration is the cheapest.
    deq = "--model.layer.init_args.weight_norm true --equilibrium.warm_up_depth 2"
    deq += " --equilibrium.warm_up_depth_schedule deepeq.train.Geometric --equilibrium.warm_up_depth_schedule.end 6.0"
    deq += " --equilibrium.jacobian_weight 0.03 --equilibrium.backward.init_args.max_steps 12"
    deq += " --equilibrium.solver.init_args.max_steps 16 --equilibrium.solver.init_args.history_size 5"
    deq += " --equilibrium.evaluation deepeq.Anderson --equilibrium.evaluation.rtol 1e-2"
    deq += " --equilibrium.evaluation.max_steps 40 --equilibrium.evaluation.history_size 5"
    return {
        "characters": Family(
            "characters",
            "Transformer (characters)",
            (TRANSFORMER[0], CHARACTERS_STEPS),
            {depth: ("--optimizer.lr", rate) for depth, rate in CHARACTERS_RATES.items()},
            18,
            {"training": 2.82, "inference": 1.76},
            characters,
            tuple(deq.split()),
        ),
        "trellisnet": Family(
            "trellisnet", "TrellisNet (words)", TRELLISNET, {8: ()}, 70, {"training": 2.40, "inference": 1.64}
        ),
    }


class Contestant(NamedTuple):
    """A trained network, and what is timed of it."""

    outcome: Outcome | None  # None where the depth was not trained
    label: str
    depth: int  # 0 for an equilibrium
    config: RunConfig
    model: LanguageModel
    step: Step
    averages: Averages  # of the steps
    training_core: Core | None
    inference: Mapping[str, Core | None]  # by the name of the setting

    def infer(self, setting: str, batches: Batches) -> tuple[float, dict[str, Any]]:
        """Seconds of a pass over a text, and what it measures."""
        wear(self.model.eval(), self.inference[setting])
        start = time.perf_counter()
        values = evaluate(self.model, batches)
        return time.perf_counter() - start, values

    def train(self, steps: Iterable[int]) -> float:
        """Seconds of optimizer steps."""
        wear(self.model, self.training_core)
        start = time.perf_counter()
        for step in steps:
            self.step.take(step, [])
        return time.perf_counter() - start


def wear(model: LanguageModel, core: Core | None) -> None:
    if core is not None:
        assert isinstance(model.network, TiedNetwork)
        model.network.core = core


def enter(outcome: Outcome, folder: Path, corpus: Corpus, *, depth: int | None = None) -> Contestant:
    """Load a trained network, ready for more steps of its training; its cell as another stack if a depth is given."""
    config, _, model = RunFolder(folder / outcome.name).load_model()
    train, averages = config.train, Averages()
    cores = Cores.of(model, config, lambda solution: averages.add_solution("backward", solution))
    batches = corpus.stream("train", batch_size=train.batch_size, segment_len=train.segment_len)
    core: Core | None = cores and cores.train
    inference: dict[str, Core | None] = {"": None}
    if depth is not None:
        assert isinstance(model.network, TiedNetwork)
        core = Unrolled(model.network.cell, depth)
        inference = {"": core}
    elif cores is not None:
        assert isinstance(model.network, TiedNetwork)
        solver = config.equilibrium.evaluation
        assert solver is not None
        settings: dict[str, Solver] = {f"rtol={r:g}": replace(solver, rtol=r, atol=0.0) for r in INFERENCE_RTOL}
        settings |= {f"{n}_plain_steps": FixedPointIteration(rtol=1e-2, max_steps=n) for n in INFERENCE_STEPS}
        inference = {
            name: evaluation_core(model.network, replace(config.equilibrium, evaluation=setting))
            for name, setting in settings.items()
        }
    step = Step(model, config, batches, make_fabric(train), averages)
    label = outcome.label if depth is None else f"{depth} layers, not trained"
    trained = outcome if depth is None else None
    return Contestant(trained, label, depth or config.model.depth, config, model, step, averages, core, inference)


def take_turns(
    contestants: Sequence[Contestant], corpus: Corpus, *, rounds: int, steps: int, max_tokens: int
) -> list[dict[str, Any]]:
    """Seconds of each network in each round: a training step, and a pass over the first tokens of validation text."""
    measured: list[dict[str, Any]] = [
        {"step_seconds": [], "inference": {name: {"seconds": []} for name in contestant.inference}}
        for contestant in contestants
    ]
    for turn in range(rounds):  # before training steps change the weights
        for contestant, row in zip(contestants, measured, strict=True):
            train = contestant.config.train
            batches = SegmentStream(
                corpus.valid[: max_tokens + 1], batch_size=train.batch_size, segment_len=train.segment_len
            )
            for name, setting in row["inference"].items():
                seconds, values = contestant.infer(name, batches)
                setting["seconds"].append(seconds)
                setting["perplexity"] = quality(measured_quality(corpus.level, values["nll"]))
                setting |= {key: value for key, value in values.items() if key.startswith("forward_")}
        print(f"runtime: inference, round {turn + 1} of {rounds}", file=sys.stderr)
    for turn in range(rounds + 1):
        for contestant, row in zip(contestants, measured, strict=True):
            # The last steps of the run once more, at the learning rate of its end.
            first = contestant.config.train.steps - (rounds + 1 - turn) * steps
            seconds = contestant.train(range(first, first + steps))
            if turn:  # the first round warms up
                row["step_seconds"].append(seconds / steps)
    for contestant, row in zip(contestants, measured, strict=True):
        solves = {key: value for key, value in contestant.averages.compute().items() if "ward_" in key}
        row["solves"] = solves
    return measured


def report(plan: Family, contestants: Sequence[Contestant], measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The curve of perplexity against time, and the ratios of table 4."""
    networks = []
    for contestant, row in zip(contestants, measured, strict=True):
        outcome = contestant.outcome
        # All steps at the price of the last ones: an upper bound for a DEQ, whose first steps are cheaper.
        seconds = contestant.config.train.steps * median(row["step_seconds"])
        described = {"label": contestant.label, "depth": contestant.depth, "training_seconds": seconds}
        if outcome is not None:
            described |= {
                "name": outcome.name,
                "tokens": outcome.tokens,
                "valid_perplexity": outcome.quality("valid"),
                "test_perplexity": outcome.quality("test"),
                "num_params": outcome.result["num_params"],
                "run_seconds": outcome.result["train_seconds"],
                "run_threads": outcome.result["num_threads"],
            }
        else:
            for setting in row["inference"].values():
                del setting["perplexity"]
        networks.append(described | row)
    equilibrium = next(network for network in networks if not network["depth"])
    by_depth = {network["depth"]: network for network in networks if network["depth"]}
    perplexities = {depth: by_depth[depth]["valid_perplexity"] for depth in plan.depths}
    shallow = perplexities.get(4)
    return {
        "networks": networks,
        "better_than_4_layers_by": shallow
        and {f"{n}_layers": shallow / value - 1 for n, value in perplexities.items()},
        "against": {f"{depth}_layers": versus(equilibrium, network) for depth, network in by_depth.items()},
        "paper": plan.paper,
    }


def versus(equilibrium: Mapping[str, Any], stack: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios of time, beside those of the perplexities that were reached."""
    whole, settings = stack["inference"][""], equilibrium["inference"]
    ratios = {
        "training": paired(equilibrium["step_seconds"], stack["step_seconds"]),
        "inference": {name: {"ratio": paired(value["seconds"], whole["seconds"])} for name, value in settings.items()},
    }
    if "valid_perplexity" in stack:
        ratios["valid_perplexity_ratio"] = equilibrium["valid_perplexity"] / stack["valid_perplexity"]
        for name, value in settings.items():
            ratios["inference"][name]["perplexity_ratio"] = value["perplexity"] / whole["perplexity"]
    return ratios


def paired(some: Sequence[float], others: Sequence[float]) -> float:
    return median(a / b for a, b in zip(some, others, strict=True))


def table(result: Mapping[str, Any]) -> str:
    rows = []
    for family in result["families"].values():
        for network in family["networks"]:
            against = family["against"].get(f"{network['depth']}_layers")
            inference = {name: median(setting["seconds"]) for name, setting in network["inference"].items()}
            rows.append(
                [
                    network["label"],
                    network.get("valid_perplexity"),
                    network.get("test_perplexity"),
                    network["training_seconds"],
                    ", ".join(f"{seconds:.3g} {name}".strip() for name, seconds in inference.items()),
                    against and against["training"],
                    against
                    and ", ".join(f"{value['ratio']:.2f} {name}" for name, value in against["inference"].items()),
                ]
            )
    columns = (
        "network",
        "valid perplexity",
        "test perplexity",
        "s training",
        "s inference",
        "DEQ / this, training",
        "DEQ / this, inference",
    )
    return markdown(columns, rows)


def draw(result: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    for axes, family in zip(
        figure.subplots(1, len(result["families"]), squeeze=False)[0], result["families"].values(), strict=True
    ):
        networks = [network for network in family["networks"] if "valid_perplexity" in network]
        times = [network["training_seconds"] for network in networks]
        stacks = sorted(
            (n["depth"], t, n["valid_perplexity"]) for n, t in zip(networks, times, strict=True) if n["depth"]
        )
        axes.plot(*list(zip(*stacks, strict=True))[1:], "o-", label="weight-tied stacks, with their layers")
        for depth, seconds, perplexity in stacks:
            axes.annotate(str(depth), (seconds, perplexity), textcoords="offset points", xytext=(3, 6))
        for network, seconds in zip(networks, times, strict=True):
            if not network["depth"]:
                axes.plot([seconds], [network["valid_perplexity"]], "*", markersize=14, label="DEQ")
        axes.set(
            title=f"{networks[0]['label'].split(',')[0]}, {networks[0]['tokens'] / 1e6:.1f} M tokens",
            xlabel="seconds of training",
            ylabel="validation perplexity",
        )
        axes.grid(alpha=0.3)
        axes.margins(0.2)
        axes.legend()
    return figure


def main() -> None:
    plans = families()
    options = parser("runtime", __doc__ or "")
    options.add_argument("--runs", type=Path, help="folder of the runs (default: OUT/runs)")
    options.add_argument("--families", nargs="+", choices=tuple(plans), default=list(plans), help="which cells")
    options.add_argument("--rounds", type=int, default=5, help="turns of each network")
    options.add_argument("--steps", type=int, default=6, help="training steps of a turn")
    options.add_argument("--max_tokens", type=int, default=20_000, help="validation tokens of a pass of inference")
    options.add_argument("--minutes", type=float, help="train for so long and stop; the same command goes on")
    arguments = options.parse_args()
    folder = arguments.runs or arguments.out / "runs"
    chosen = [plans[name] for name in arguments.families]
    if not train_all([run for family in chosen for run in family.runs()], folder, minutes=arguments.minutes):
        sys.exit("runtime: not all runs are finished; go on with the same command")
    torch.set_flush_denormal(True)  # as training does
    result = origin(command("runtime", arguments, hidden=("runs", "minutes"))) | {"families": {}}
    for name, family in zip(arguments.families, chosen, strict=True):
        done = outcomes(family.runs(), folder)
        corpus = RunFolder(folder / done[0].name).load_corpus(load_config(RunFolder(folder / done[0].name).config))
        assert isinstance(corpus, Corpus)
        contestants = [enter(outcome, folder, corpus) for outcome in done]
        if family.paper_depth not in family.depths:
            deepest = next(outcome for outcome in done if outcome.name.endswith(f"_{max(family.depths)}_layers"))
            contestants.append(enter(deepest, folder, corpus, depth=family.paper_depth))
        measured = take_turns(
            contestants, corpus, rounds=arguments.rounds, steps=arguments.steps, max_tokens=arguments.max_tokens
        )
        result["families"][name] = report(family, contestants, measured)
    write(arguments.out, "runtime", result, table=table(result), figure=draw(result))


if __name__ == "__main__":
    main()
