"""Tables 2 and 3: language models that are trained on the same text for equally many tokens, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from _harness import Benchmark, markdown
from _runs import Outcome, Planned, add_options, continue_later, train_all
from matplotlib.figure import Figure

KEPT = ("num_params", "num_params_non_embedding", "num_steps", "train_seconds", "test_forward_steps")
KEPT += ("test_unconverged", "peak_memory_mb", "num_threads", "seed")
COLUMNS = {
    "network": "label",
    "parameters": "num_params",
    "without embedding": "num_params_non_embedding",
    "tokens": "tokens",
    "valid": "valid_perplexity",
    "test": "test_perplexity",
    "paper, test": "paper_test_perplexity",
    "seconds": "train_seconds",
}


def compare(benchmark: Benchmark, plans: Mapping[str, Sequence[Planned]], paper: Mapping[str, float]) -> None:
    """Train the runs that are planned for a size, and report those that are finished.

    Args:
        benchmark: The benchmark.
        plans: Runs by `--size`.
        paper: Test perplexities of the paper, by the name of a run at the paper's size.
    """
    add_options(benchmark, sizes=plans)
    benchmark.parser.add_argument("--only", nargs="+", default=[], help="names of some runs; default all of them")
    arguments = benchmark.parse()
    names = [plan.name for plan in plans[arguments.size]]
    if unknown := [only for only in arguments.only if only not in names]:
        benchmark.stop(f"--only {' '.join(unknown)} is no run of --size {arguments.size}: {', '.join(names)}")
    chosen = [plan for plan in plans[arguments.size] if not arguments.only or plan.name in arguments.only]
    done, finished = train_all(benchmark, chosen)
    if done:
        published = paper if arguments.size == "paper" else {}
        models = {outcome.name: describe(outcome, published.get(outcome.name)) for outcome in done}
        table = markdown(list(COLUMNS), [[row[field] for field in COLUMNS.values()] for row in models.values()])
        benchmark.report({"finished": finished, "models": models}, table)
    continue_later(benchmark, len(done), len(chosen))


def describe(outcome: Outcome, paper: float | None) -> dict[str, Any]:
    """Return a row of the table."""
    names = ("tokens", "seconds", "perplexity")
    return {
        "label": outcome.label,
        "tokens": outcome.tokens,
        "valid_perplexity": outcome.quality("valid"),
        "test_perplexity": outcome.quality("test"),
        "paper_test_perplexity": paper,
        **{name: outcome.result[name] for name in KEPT if name in outcome.result},
        "validations": [dict(zip(names, values, strict=True)) for values in outcome.valid],
    }


def draw(result: dict[str, Any]) -> Figure:
    """Return a figure of validation perplexity against tokens and against time."""
    figure = Figure(figsize=(11.0, 5.4), layout="constrained")
    against_tokens, against_time = figure.subplots(1, 2, sharey=True)
    last = [model["validations"][-1]["perplexity"] for model in result["models"].values()]
    most = 2.5 * max(last)  # what lies far above would squeeze the other curves
    for model in result["models"].values():
        rows = model["validations"]
        perplexities = [row["perplexity"] for row in rows]
        against_tokens.plot([row["tokens"] / 1e6 for row in rows], perplexities, "o-", label=model["label"])
        against_time.plot([row["seconds"] / 60 for row in rows], perplexities, "o-")
    quality = "validation perplexity (lower is better)"
    against_tokens.set(title="At equal tokens", xlabel="million tokens", ylabel=quality, yscale="log")
    against_time.set(title="At equal time", xlabel="minutes of training, validation included")
    for axes in (against_tokens, against_time):
        axes.set_ylim(0.9 * min(last), most)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    above = any(row["perplexity"] > most for model in result["models"].values() for row in model["validations"])
    title = "curves that leave the picture are far above it; see the table" if above else None
    figure.legend(loc="outside lower center", ncols=2, title=title)
    return figure
