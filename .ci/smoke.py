"""Train every recipe for two cores for a few steps, on a short text cut from WikiText-2's validation text."""

import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from deepeq.cli import main

RECIPES = Path(__file__).parents[1] / "recipes"
TEXT = Path(os.environ.get("DEEPEQ_DATA", "data")) / "wikitext-2" / "valid.txt"


def smoke(recipe: Path, work: Path) -> str:
    """Train a recipe for four steps; return what went wrong, or an empty string."""
    options = ["--train.steps", "4", "--train.log_every", "2", "--run.dir", str(work / recipe.stem)]
    text = recipe.read_text(encoding="utf-8")
    if "corpus: copy_memory" in text:
        options += ["--data.copy_memory.num_test", "40"]
    elif TEXT.is_file():
        options += ["--data.corpus", "folder", "--data.folder", str(work / "text")]
    elif "corpus: pydoc" not in text:
        print(f"smoke: SKIPPED {recipe.name}: there is no {TEXT}")
        return ""
    log = io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        start = time.perf_counter()
        try:
            code = main(["train", "--config", str(recipe), *options])
        except SystemExit as stop:
            code = stop.code
    print(f"smoke: {recipe.name} {time.perf_counter() - start:.0f} s", flush=True)
    shutil.rmtree(work / recipe.stem, ignore_errors=True)
    return "" if code == 0 else f"{recipe.name} exits with {code}: {log.getvalue()[-1000:]}"


def prepare(work: Path) -> None:
    """Write the text, and let nothing into the user's cache."""
    os.environ["DEEPEQ_CACHE"] = str(work / "cache")
    if TEXT.is_file():
        lines = TEXT.read_text(encoding="utf-8").splitlines(keepends=True)
        (work / "text").mkdir()
        for split, part in (("train", lines), ("valid", lines[:60]), ("test", lines[:60])):
            (work / "text" / f"{split}.txt").write_text("".join(part), encoding="utf-8")


if __name__ == "__main__":
    recipes = [RECIPES / "quickstart.yaml", *sorted((RECIPES / "two_cores").glob("*.yaml"))]
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        # Two processes of one thread each: threads of one process would wait for each other on a busy machine.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, context, torch.set_num_threads, (1,)) as pool:
            failures = [failure for failure in pool.map(smoke, recipes, [Path(name)] * len(recipes)) if failure]
    sys.exit("smoke: FAILED\n" + "\n".join(failures) if failures else 0)
