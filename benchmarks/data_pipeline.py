"""How fast, and in how much memory, does a text of WikiText-103's size become ids and a stream of segments?

    python benchmarks/data_pipeline.py --out benchmarks/results/NAME

A text is generated in WikiText's format: lines of words whose frequencies fall like Zipf's law, blank lines between
them, every type at least once. A process of its own prepares it and walks through all segments of the training
split, so that the peak of its resident memory, mapped files included, is that of preparing and streaming alone. The
text and what was prepared from it are deleted.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from _report import processor

from deepeq.data import Corpus, DataConfig, load_corpus

BATCH_SIZE, SEGMENT_LEN = 64, 150
SPLIT_SHARES = {"train": 1.0, "valid": 0.0021, "test": 0.0024}  # of --tokens, as in WikiText-103
LETTERS = "etaoinshrdlucmfwypvbgkqjxz0123456789"


def word(rank: int) -> str:
    """A different word for every rank, of four letters at least; about five bytes a token, as in WikiText."""
    rank += sum(len(LETTERS) ** length for length in (1, 2, 3))
    letters = ""
    while rank >= 0:
        letters += LETTERS[rank % len(LETTERS)]
        rank = rank // len(LETTERS) - 1
    return letters


def zipf_ranks(generator: np.random.Generator, num_ranks: int, *, every_one_first: bool) -> Iterator[int]:
    """Endlessly many ranks in 0 .. num_ranks-1 with frequencies proportional to 1 / (rank + 2.7)."""
    if every_one_first:
        yield from generator.permutation(num_ranks).tolist()
    cumulative = np.cumsum(1 / (np.arange(num_ranks) + 2.7))
    while True:
        draws = generator.random(1 << 18) * cumulative[-1]
        yield from np.searchsorted(cumulative, draws).tolist()


def write_text(path: Path, words: list[str], num_tokens: int, seed: int, *, every_word: bool) -> None:
    """Write a text that has `num_tokens` words and ends of lines."""
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
    """Write wiki.train.tokens and the two others; `<eos>` and `<unk>` are two of the types."""
    words = ["<unk>", *(word(rank) for rank in range(num_types - 2))]
    for index, (split, share) in enumerate(SPLIT_SHARES.items()):
        path = folder / f"wiki.{split}.tokens"
        write_text(path, words, round(num_tokens * share), seed + index, every_word=split == "train")


def peak_rss_mib() -> float:
    """The largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, this leaves out the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / 1024, 1)
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def measure(folder: Path) -> dict[str, object]:
    """Prepare the text in a folder, open it, and walk through its training split."""
    torch.set_num_threads(1)
    before = peak_rss_mib()
    config = DataConfig(corpus="folder", folder=str(folder), level="word", cache=str(folder / "cache"))
    start = time.perf_counter()
    corpus = load_corpus(config)
    prepared = time.perf_counter()
    peak_prepared = peak_rss_mib()
    corpus = load_corpus(config)
    opened = time.perf_counter()
    assert isinstance(corpus, Corpus)
    stream = corpus.stream("train", batch_size=BATCH_SIZE, segment_len=SEGMENT_LEN)
    num_targets = sum(targets.numel() for _, targets in stream)
    streamed = time.perf_counter()
    assert num_targets == stream.num_tokens
    num_tokens = sum(len(ids) for ids in (corpus.train, corpus.valid, corpus.test))
    return {
        "tokens": {"train": len(corpus.train), "valid": len(corpus.valid), "test": len(corpus.test)},
        "types": corpus.vocab_size,
        "text_bytes": sum(path.stat().st_size for path in folder.glob("wiki.*.tokens")),
        "prepare_seconds": round(prepared - start, 2),
        "prepare_tokens_per_second": round(num_tokens / (prepared - start)),
        "open_seconds": round(opened - prepared, 2),
        "stream_seconds": round(streamed - opened, 2),
        "stream_tokens_per_second": round(num_targets / (streamed - opened)),
        "batch_size": BATCH_SIZE,
        "segment_len": SEGMENT_LEN,
        "peak_rss_mib_after_import": before,
        "peak_rss_mib_after_preparing": peak_prepared,
        "peak_rss_mib": peak_rss_mib(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for data_pipeline.json")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="of the training split, ends of lines included")
    parser.add_argument("--types", type=int, default=267_735, help="<eos> and <unk> included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="data_pipeline.") as folder:
        generate(Path(folder), num_tokens=arguments.tokens, num_types=arguments.types, seed=arguments.seed)
        child = subprocess.run(
            [sys.executable, __file__, "--measure", folder],
            stdout=subprocess.PIPE,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    result = {
        "command": f"python benchmarks/data_pipeline.py --tokens {arguments.tokens} --types {arguments.types} "
        f"--seed {arguments.seed} --out OUT",
        "hardware": f"{processor()}, 1 thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    } | json.loads(child.stdout)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "data_pipeline.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
