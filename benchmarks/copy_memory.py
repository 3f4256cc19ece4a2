"""Table 1: how well do a DEQ-Transformer, a TCN, an LSTM and a GRU remember ten digits over T = 400 blanks?

    python benchmarks/copy_memory.py --out DIR [--size paper] [--minutes M]

Trains the four recipes on 20,000 sequences and tests on 2,000 others, the paper's data. The loss is the mean
cross-entropy in nats over all 420 positions of a sequence. `--size two_cores` has the same task and networks of the
same size, but fewer training steps and looser solves than `--size paper`.
"""

from typing import Any

from _harness import Benchmark, markdown
from _runs import Outcome, Planned, add_options, continue_later, train_all
from matplotlib.figure import Figure

from deepeq.data import copy_memory_baseline

PAPER = {"copy_memory": 3.5e-6, "copy_memory_tcn": 2.7e-5, "copy_memory_lstm": 0.0501, "copy_memory_gru": 0.0491}
LABELS = {
    "copy_memory": "DEQ-Transformer",
    "copy_memory_tcn": "TCN",
    "copy_memory_lstm": "LSTM",
    "copy_memory_gru": "GRU",
}
KEPT = ("test_loss", "valid_loss", "num_params", "num_steps", "train_seconds", "num_threads", "seed")
KEPT += ("test_forward_steps", "test_unconverged")  # of the equilibrium
COLUMNS = {
    "network": "label",
    "parameters": "num_params",
    "test loss": "test_loss",
    "paper": "paper_loss",
    "steps": "num_steps",
    "seconds": "train_seconds",
    "threads": "num_threads",
}


def describe(outcome: Outcome, tokens_per_sequence: int) -> dict[str, Any]:
    """Return what table 1 says about a network, and what its training took."""
    values = {name: outcome.result[name] for name in KEPT if name in outcome.result}
    sequences = outcome.tokens // tokens_per_sequence
    rows = [row for row in outcome.rows if row["split"] == "train"]
    curve = {"step": [row["step"] for row in rows], "nll": [row["nll"] for row in rows]}
    about = {"label": outcome.label, "paper_loss": PAPER[outcome.name], "sequences": sequences}
    return about | values | {"curve": curve}


def draw(result: dict[str, Any]) -> Figure:
    """Return a figure of the training losses, with the test losses at their ends."""
    figure = Figure(figsize=(11.0, 5.0), layout="constrained")
    axes = figure.add_subplot(title=f"Copy memory, T = {result['blank_len']}", xlabel="optimizer step", yscale="log")
    axes.set_ylabel("loss in nats per position (lower is better)")
    for index, model in enumerate(result["models"].values()):
        axes.plot(*model["curve"].values(), label=f"{model['label']}, training", color=f"C{index}")
        axes.plot(model["num_steps"], model["test_loss"], "*", markersize=14, color=f"C{index}")
    axes.axhline(result["baseline_loss"], color="0.5", linestyle=":", label=f"no memory, {result['baseline_loss']:.3g}")
    axes.axhline(PAPER["copy_memory"], color="black", linestyle="--", linewidth=1, label="DEQ-Transformer in the paper")
    axes.plot([], [], "*", markersize=14, color="black", label="test loss")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def main() -> None:
    benchmark = Benchmark("copy_memory", __doc__, draw)
    add_options(benchmark, sizes=("two_cores", "paper"))
    prefix = "" if benchmark.parse().size == "paper" else "two_cores/"
    plans = [Planned(name=name, label=label, recipe=prefix + name) for name, label in LABELS.items()]
    done, _ = train_all(benchmark, plans)
    continue_later(benchmark, len(done), len(plans))
    data = plans[0].config().data.copy_memory
    baseline = copy_memory_baseline(data.blank_len)
    models = {outcome.name: describe(outcome, data.blank_len + 20) for outcome in done}
    result = {
        "blank_len": data.blank_len,
        "num_train": data.num_train,
        "num_test": data.num_test,
        "baseline_loss": baseline,
        "models": models,
    }
    table = markdown(list(COLUMNS), [[model[field] for field in COLUMNS.values()] for model in models.values()])
    benchmark.report(result, table)


if __name__ == "__main__":
    main()
