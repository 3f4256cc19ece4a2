"""Tables 2 and 3: language models that are trained on the same text for as many tokens, side by side."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _report import command, markdown, origin, parser, write
from _runs import Outcome, Planned, outcomes, train_all
from matplotlib.figure import Figure


def compare(name: str, question: str, plans: Mapping[str, Sequence[Planned]], paper: Mapping[str, float]) -> None:
    """Train what is planned for a size, and report what is finished.

    Args:
        name: Of the benchmark.
        question: Its documentation.
        plans: Runs by `--size`.
        paper: Test perplexities of the paper, by the name of a run at the paper's size.
    """
    options = parser(name, question)
    options.add_argument("--runs", type=Path, help="folder of the runs (default: OUT/runs)")
    options.add_argument("--size", choices=tuple(plans), default="two_cores", help="which recipes")
    options.add_argument("--only", nargs="+", default=[], help="names of runs, for some of them alone")
    options.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    arguments = options.parse_args()
    chosen = _chosen(name, plans[arguments.size], arguments)
    folder = arguments.runs or arguments.out / "runs"
    finished = train_all(chosen, folder, minutes=arguments.minutes)
    done = outcomes(chosen, folder)
    if not done:
        sys.exit(f"{name}: no run is finished yet; go on with the same command")
    published = paper if arguments.size == "paper" else {}
    result = origin(command(name, arguments, hidden=("runs", "minutes"))) | {
        "finished": finished,
        "models": {outcome.name: describe(outcome, published.get(outcome.name)) for outcome in done},
    }
    write(arguments.out, name, result, table=table(result), figure=draw(done))
    if not finished:
        sys.exit(f"{name}: {len(done)} of {len(chosen)} runs are finished; go on with the same command")


def describe(outcome: Outcome, paper: float | None) -> dict[str, Any]:
    """A row of the table."""
    kept = (
        "num_params",
        "num_params_non_embedding",
        "num_steps",
        "train_seconds",
        "test_forward_steps",
        "test_unconverged",
        "peak_memory_mb",
        "num_threads",
        "seed",
    )
    values = {name: outcome.result[name] for name in kept if name in outcome.result}
    return {
        "label": outcome.label,
        "tokens": outcome.tokens,
        "valid_perplexity": outcome.quality("valid"),
        "test_perplexity": outcome.quality("test"),
        "paper_test_perplexity": paper,
        **values,
        "validations": [
            {"tokens": tokens, "seconds": seconds, "perplexity": perplexity}
            for tokens, seconds, perplexity in outcome.valid
        ],
    }


def table(result: Mapping[str, Any]) -> str:
    columns = ("network", "parameters", "without embedding", "tokens", "valid", "test", "paper, test", "seconds")
    fields = (
        "label",
        "num_params",
        "num_params_non_embedding",
        "tokens",
        "valid_perplexity",
        "test_perplexity",
        "paper_test_perplexity",
        "train_seconds",
    )
    return markdown(columns, [[model[field] for field in fields] for model in result["models"].values()])


def draw(done: Sequence[Outcome]) -> Figure:
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    against_tokens, against_time = figure.subplots(1, 2, sharey=True)
    for outcome in done:
        tokens, seconds, perplexities = zip(*outcome.valid, strict=True)
        against_tokens.plot([count / 1e6 for count in tokens], perplexities, "o-", markersize=4, label=outcome.label)
        against_time.plot([count / 60 for count in seconds], perplexities, "o-", markersize=4)
    against_tokens.set(title="At equal tokens", xlabel="million tokens", ylabel="validation perplexity", yscale="log")
    against_time.set(title="At equal time", xlabel="minutes of training, validation included")
    for axes in (against_tokens, against_time):
        axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _chosen(name: str, plans: Sequence[Planned], arguments: argparse.Namespace) -> list[Planned]:
    names = [plan.name for plan in plans]
    unknown = [only for only in arguments.only if only not in names]
    if unknown:
        sys.exit(f"{name}: --only {' '.join(unknown)} is no run of --size {arguments.size}: {', '.join(names)}")
    return [plan for plan in plans if not arguments.only or plan.name in arguments.only]
