"""Table 3: what do DEQs and the explicit networks of the same size reach on WikiText-103?

    python benchmarks/wikitext_103.py --out DIR [--size paper] [--only NAME ...] [--minutes M]

`--size paper` trains the rows of table 3 that are an equilibrium or its explicit counterpart; each needs a GPU and
days. `--size two_cores` trains small variants of them on WikiText-2.
"""

from _comparison import compare, draw
from _harness import Benchmark
from _runs import Planned

ROWS = {
    "wikitext103_trellisnet": ("DEQ-TrellisNet", 29.0),
    "wikitext103_trellisnet_70_layers": ("TrellisNet, 70 layers", 29.2),
    "wikitext103_trellisnet_70_layers_checkpointing": ("TrellisNet, 70 layers, checkpointed", 29.2),
    "wikitext103_transformer_medium": ("DEQ-Transformer, medium", 24.2),
    "wikitext103_transformer_xl_16_layers": ("Transformer-XL, medium", 24.3),
    "wikitext103_transformer_adaptive": ("DEQ-Transformer, adaptive", 23.2),
    "wikitext103_transformer_xl_18_layers_adaptive": ("Transformer-XL, adaptive", 23.6),
    "wikitext103_transformer_small": ("DEQ-Transformer, small", 32.4),
    "wikitext103_transformer_xl_4_layers": ("Transformer-XL, small", 35.8),
    "wikitext103_transformer_tied_16_layers": ("Transformer-XL, small, tied", 34.9),
}
PLANS = {
    size: [Planned(name=name, label=label, recipe=prefix + name) for name, (label, _) in ROWS.items()]
    for size, prefix in (("paper", ""), ("two_cores", "two_cores/"))
}
PAPER = {name: perplexity for name, (_, perplexity) in ROWS.items()}


def main() -> None:
    compare(Benchmark("wikitext_103", __doc__, draw), PLANS, PAPER)


if __name__ == "__main__":
    main()
