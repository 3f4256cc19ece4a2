"""How fast, and in how much memory, does a text of WikiText-103's size become ids and a stream of segments?

    python benchmarks/data_pipeline.py --out DIR [--tokens N] [--types N]

A text is generated in WikiText's format: lines of words whose frequencies fall like Zipf's law, blank lines between
them, and every type at least once. A process of its own prepares the text and walks through all segments of the
training split, so the peak of its resident memory, mapped files included, is that of preparing and streaming alone. The
text and what was prepared from it are deleted at the end.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import Benchmark, in_own_process, markdown, resident_bytes

from deepeq.data import Corpus, DataConfig, load_corpus

BATCH_SIZE, SEGMENT_LEN = 64, 150
SPLIT_FRACTIONS = {"train": 1.0, "valid": 0.0021, "test": 0.0024}  # of --tokens, as in WikiText-103
LETTERS = "etaoinshrdlucmfwypvbgkqjxz0123456789"


def word(rank: int) -> str:
    """Return a different word for every rank, of at least four letters: about five bytes per token, as in WikiText."""
    rank += sum(len(LETTERS) ** length for length in (1, 2, 3))
    letters = ""
    while rank >= 0:
        letters += LETTERS[rank % len(LETTERS)]
        rank = rank // len(LETTERS) - 1
    return letters


def zipf_ranks(generator: np.random.Generator, num_ranks: int, *, every_one_first: bool) -> Iterator[int]:
    """Yield ranks in 0 .. num_ranks-1 without end, with frequencies proportional to 1 / (rank + 2.7)."""
    if every_one_first:
        yield from generator.permutation(num_ranks).tolist()
    cumulative = np.cumsum(1 / (np.arange(num_ranks) + 2.7))
    while True:
        draws = generator.random(1 << 18) * cumulative[-1]
        yield from np.searchsorted(cumulative, draws).tolist()


def write_text(path: Path, words: list[str], num_tokens: int, seed: int, *, every_word: bool) -> None:
    """Write a text of `num_tokens` words and ends of lines."""
    generator = np.random.default_rng(seed)
    ranks = zipf_ranks(generator, len(words), every_one_first=every_word)
    remaining = num_tokens
    with path.open("w", encoding="utf-8") as file:
        while remaining > 0:
            length = min(int(generator.integers(20, 220)), remaining - 2)
            if length > 0:
                file.write(" " + " ".join(words[next(ranks)] for _ in range(length)) + " \n")
                remaining -= length + 1
            file.write(" \n")
            remaining -= 1


def generate(folder: Path, *, num_tokens: int, num_types: int, seed: int) -> None:
    """Write wiki.train.tokens and the two other splits; `<eos>` and `<unk>` are two of the types."""
    words = ["<unk>", *(word(rank) for rank in range(num_types - 2))]
    for index, (split, fraction) in enumerate(SPLIT_FRACTIONS.items()):
        path = folder / f"wiki.{split}.tokens"
        write_text(path, words, round(num_tokens * fraction), seed + index, every_word=split == "train")


def measure(folder: Path) -> dict[str, Any]:
    """Prepare the text in a folder, open it, and walk through its training split."""
    torch.set_num_threads(1)
    peaks = {"peak_rss_mib_after_import": _peak_mib()}
    config = DataConfig(corpus="folder", folder=str(folder), unit="word", cache=str(folder / "cache"))
    start = time.perf_counter()
    corpus = load_corpus(config)
    prepared = time.perf_counter()
    peaks["peak_rss_mib_after_preparing"] = _peak_mib()
    corpus = load_corpus(config)
    opened = time.perf_counter()
    assert isinstance(corpus, Corpus)
    stream = corpus.stream("train", batch_size=BATCH_SIZE, segment_len=SEGMENT_LEN)
    num_targets = sum(targets.numel() for _, targets in stream)
    streamed = time.perf_counter()
    assert num_targets == stream.num_tokens
    tokens = {"train": len(corpus.train), "valid": len(corpus.valid), "test": len(corpus.test)}
    return {
        "tokens": tokens,
        "types": corpus.vocab_size,
        "text_bytes": sum(path.stat().st_size for path in folder.glob("wiki.*.tokens")),
        "prepare_seconds": round(prepared - start, 2),
        "prepare_tokens_per_second": round(sum(tokens.values()) / (prepared - start)),
        "open_seconds": round(opened - prepared, 2),
        "stream_seconds": round(streamed - opened, 2),
        "stream_tokens_per_second": round(num_targets / (streamed - opened)),
        "batch_size": BATCH_SIZE,
        "segment_len": SEGMENT_LEN,
        **peaks,
        "peak_rss_mib": _peak_mib(),
    }


def _peak_mib() -> float:
    return round(resident_bytes(peak=True) / 2**20, 1)


def main() -> None:
    benchmark = Benchmark("data_pipeline", __doc__)
    options = benchmark.parser
    options.add_argument("--tokens", type=int, default=100_000_000, help="size of the training split, with line ends")
    options.add_argument("--types", type=int, default=267_735, help="number of types, with <eos> and <unk>")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--measure", type=Path, help="print what preparing a folder takes, in this process")
    arguments = benchmark.parse()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="data_pipeline.") as folder:
        generate(Path(folder), num_tokens=arguments.tokens, num_types=arguments.types, seed=arguments.seed)
        measured = in_own_process(__file__, "--measure", folder, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)  # as in the process that was measured
    table = markdown(("quantity", "value"), [(name.replace("_", " "), value) for name, value in measured.items()])
    benchmark.report({"numpy": np.__version__} | measured, table)


if __name__ == "__main__":
    main()
