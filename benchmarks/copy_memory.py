"""Table 1: how well do a DEQ-Transformer, a TCN, an LSTM and a GRU remember ten digits over T = 400 blanks?

    deepeq bench copy-memory --out DIR [--size paper] [--minutes M]

Trains the four recipes on 20,000 sequences and tests on 2,000 others, the paper's data; the loss is the mean
cross-entropy in nats over all 420 positions of a sequence. `--size two_cores` has the same task and networks of the
same size, trained with fewer sequences and looser solves than `paper`. Run again with the same --out (and --runs) to go
on where --minutes ended, or where it was stopped.
"""

import sys
from pathlib import Path
from typing import Any

from _report import command, markdown, origin, parser, write
from _runs import Outcome, Planned, outcomes, train_all
from matplotlib.figure import Figure

from deepeq.data import copy_memory_baseline

PAPER = {"copy_memory": 3.5e-6, "copy_memory_tcn": 2.7e-5, "copy_memory_lstm": 0.0501, "copy_memory_gru": 0.0491}
LABELS = {
    "copy_memory": "DEQ-Transformer",
    "copy_memory_tcn": "TCN",
    "copy_memory_lstm": "LSTM",
    "copy_memory_gru": "GRU",
}


def describe(outcome: Outcome, tokens_per_sequence: int) -> dict[str, Any]:
    """What table 1 says about a network, and what it took."""
    kept = ("test_loss", "valid_loss", "num_params", "num_steps", "train_seconds", "num_threads", "seed")
    values = {name: outcome.result[name] for name in kept} | {"sequences": outcome.tokens // tokens_per_sequence}
    solved = ("test_forward_steps", "test_unconverged")
    values |= {name: outcome.result[name] for name in solved if name in outcome.result}
    return {"label": outcome.label, "paper_loss": PAPER[outcome.name]} | values


def draw(done: list[Outcome], baseline: float) -> Figure:
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot(
        title="Copy memory, T = 400", xlabel="optimizer step", ylabel="training loss (nats a position)", yscale="log"
    )
    for index, outcome in enumerate(done):
        rows = [row for row in outcome.rows if row["split"] == "train"]
        axes.plot([row["step"] for row in rows], [row["nll"] for row in rows], label=outcome.label, color=f"C{index}")
        last = outcome.result["num_steps"]
        axes.plot([last], [outcome.result["test_loss"]], "*", markersize=11, color=f"C{index}")
    axes.axhline(baseline, color="0.5", linestyle=":", label=f"no memory, {baseline:.3g}")
    axes.axhline(PAPER["copy_memory"], color="black", linestyle="--", linewidth=1, label="DEQ-Transformer in the paper")
    axes.plot([], [], "*", markersize=11, color="black", label="test loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def main() -> None:
    options = parser("copy_memory", __doc__ or "")
    options.add_argument("--runs", type=Path, help="folder of the runs (default: OUT/runs)")
    options.add_argument("--size", choices=("two_cores", "paper"), default="two_cores", help="which recipes")
    options.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    arguments = options.parse_args()
    prefix = "" if arguments.size == "paper" else f"{arguments.size}/"
    plans = [Planned(name=name, label=label, recipe=prefix + name) for name, label in LABELS.items()]
    folder = arguments.runs or arguments.out / "runs"
    finished = train_all(plans, folder, minutes=arguments.minutes)
    done = outcomes(plans, folder)
    if not finished:
        sys.exit(f"copy_memory: {len(done)} of {len(plans)} runs are finished; go on with the same command")
    data = plans[0].config().data.copy_memory
    baseline = copy_memory_baseline(data.blank_len)
    models = {outcome.name: describe(outcome, data.blank_len + 20) for outcome in done}
    result = origin(command("copy_memory", arguments, hidden=("runs", "minutes"))) | {
        "blank_len": data.blank_len,
        "num_train": data.num_train,
        "num_test": data.num_test,
        "baseline_loss": baseline,
        "models": models,
    }
    columns = ("network", "parameters", "test loss", "paper", "steps", "seconds", "threads")
    fields = ("label", "num_params", "test_loss", "paper_loss", "num_steps", "train_seconds", "num_threads")
    table = markdown(columns, [[model[name] for name in fields] for model in models.values()])
    write(arguments.out, "copy_memory", result, table=table, figure=draw(done, baseline))


if __name__ == "__main__":
    main()
