"""Table 2: what do a DEQ and the weight-tied stacks of its cell reach on the words of Penn Treebank?

    python benchmarks/ptb.py --out DIR [--size paper] [--only NAME ...] [--minutes M]

`--size two_cores` trains a small DEQ-Transformer, a small DEQ-TrellisNet and stacks of the same cells with 16 and 8
layers. All have the same parameters, the same text in the same order and the same optimizer, except for the learning
rate of the deep Transformer, which fails at the DEQ's. The steps that train a DEQ as a shallow stack count as its
tokens and its time. `--size paper` is table 2 itself; it needs a GPU and about a day.
"""

from _comparison import compare, draw
from _harness import Benchmark
from _runs import Planned

TRANSFORMER, TRELLISNET = ("two_cores/ptb_transformer", 3200), ("two_cores/ptb_trellisnet", 1000)  # optimizer steps
# At the DEQ's learning rate of 2e-3 the gradient of the deep stack explodes within 400 steps.
HALF_RATE = ("--optimizer.lr", "1e-3")


def small(
    name: str, label: str, family: tuple[str, int], depth: int | None = None, options: tuple[str, ...] = ()
) -> Planned:
    """Return a run with four validations.

    Args:
        name: Name of the run.
        label: Name in tables and figures.
        family: Recipe and number of optimizer steps.
        depth: Number of tied layers; None for the network of the recipe.
        options: More options of `deepeq train`.
    """
    recipe, steps = family
    intervals = f"--train.steps {steps} --train.eval_every {steps // 4} --train.checkpoint_every {steps // 8}"
    words = (*intervals.split(), "--run.name", name, *options)
    return Planned(name=name, label=label, recipe=recipe, depth=depth, options=words)


PLANS = {
    "two_cores": [
        small("transformer_deq", "DEQ-Transformer", TRANSFORMER),
        small("transformer_16_layers", "Transformer, 16 layers, tied", TRANSFORMER, 16, HALF_RATE),
        small("trellisnet_deq", "DEQ-TrellisNet", TRELLISNET),
        small("trellisnet_8_layers", "TrellisNet, 8 layers, tied", TRELLISNET, 8),
    ],
    "paper": [
        Planned(name="ptb_trellisnet", label="DEQ-TrellisNet", recipe="ptb_trellisnet"),
        Planned(name="ptb_trellisnet_60_layers", label="TrellisNet, 60 layers", recipe="ptb_trellisnet_60_layers"),
    ],
}
PAPER = {"ptb_trellisnet": 57.1, "ptb_trellisnet_60_layers": 57.0}


def main() -> None:
    compare(Benchmark("ptb", __doc__, draw), PLANS, PAPER)


if __name__ == "__main__":
    main()
