"""Table 2: what do a DEQ and the weight-tied stacks of its cell reach on the words of Penn Treebank?

    deepeq bench ptb --out DIR [--size paper] [--only NAME ...] [--minutes M]

`--size two_cores` trains a small DEQ-Transformer, a small DEQ-TrellisNet and the stacks of the same cells with 16 and 8
layers: the same parameters, the same text in the same order, the same optimizer but for the learning rate of the deep
Transformer, which fails at that of the DEQ. The shallow stack that a DEQ starts as counts as tokens and time of the
DEQ. `--size paper` is table 2 itself; it needs a GPU and about a day. `--minutes` trains for so long and stops with a
checkpoint; the same command goes on.
"""

from _comparison import compare
from _runs import Planned

TRANSFORMER, TRELLISNET = ("two_cores/ptb_transformer", 3200), ("two_cores/ptb_trellisnet", 1000)  # optimizer steps
# At the DEQ's learning rate of 2e-3 the gradient of the deep stack explodes within 400 steps.
HALF_RATE = ("--optimizer.lr", "1e-3")


def small(
    name: str, label: str, family: tuple[str, int], depth: int | None = None, options: tuple[str, ...] = ()
) -> Planned:
    """A run with four validations."""
    recipe, steps = family
    rhythm = ("--train.steps", str(steps), "--train.eval_every", str(steps // 4), "--run.name", name)
    rhythm += ("--train.checkpoint_every", str(steps // 8))
    return Planned(name=name, label=label, recipe=recipe, depth=depth, options=rhythm + options)


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

if __name__ == "__main__":
    compare("ptb", __doc__ or "", PLANS, PAPER)
