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
        benchmark.report({"finished": finished, "models": models}, table, draw(done))
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


def draw(done: Sequence[Outcome]) -> Figure:
    """Return a figure of validation perplexity against tokens and against time."""
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
