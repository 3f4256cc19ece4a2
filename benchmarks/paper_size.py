"""Question: does every model of the paper's tables, at the paper's size, do a training step on this machine?

One step of one short segment of random words with each recipe's own layers, vocabulary, solvers, dropouts and
optimizer, without the warm-up stack: the loss and the size of the gradient, how the equilibrium was found, the loss on
the same segment afterwards, seconds, and the largest resident size of a process of its own.
"""

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deepeq.data import known_vocab_size
from deepeq.models import LanguageModel
from deepeq.solution import Solution
from deepeq.train.config import load_config
from deepeq.train.cores import Cores
from deepeq.train.optimizer import learning_rate, make_optimizer

RECIPES = Path(__file__).parents[1] / "recipes"


def one_step(recipe: Path, segment_len: int) -> dict[str, Any]:
    """What one training step of a recipe measures."""
    config = load_config(recipe)
    vocab_size = known_vocab_size(config.data)
    assert vocab_size is not None, f"{recipe} must name a published corpus"
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    start = time.perf_counter()
    model = LanguageModel(vocab_size, config.model)
    optimizer = make_optimizer(model, replace(config.optimizer, warm_up_steps=0))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config.optimizer, config.optimizer.warm_up_steps, config.train.steps)
    built, backward = time.perf_counter(), []
    cores = Cores.of(model, config, backward.append)
    if cores is not None:
        model.network.core = cores.train
    words = torch.randint(vocab_size, (1, segment_len + 1))
    tokens, targets = words[:, :-1], words[:, 1:]
    output = model(tokens, None, targets)
    output.nll.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_gradient_norm)
    optimizer.step()
    done = time.perf_counter()
    with torch.no_grad():
        after = model.eval()(tokens, None, targets).nll.mean()
    values: dict[str, Any] = {
        "num_params": model.num_params,
        "num_params_non_embedding": model.num_params_non_embedding,
        "loss": round(float(output.nll.detach().mean()), 4),
        "log_vocab_size": round(math.log(vocab_size), 4),
        "gradient_norm": float(f"{norm:.4g}"),
        "loss_after": round(float(after), 4),
    }
    if cores is not None:
        values |= {"forward": _describe(output.solution), "backward": [_describe(solution) for solution in backward]}
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, missing
    return values | {
        "build_seconds": round(built - start, 2),
        "step_seconds": round(done - built, 2),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def _describe(solution: Solution) -> dict[str, Any]:
    return {
        "steps": int(solution.num_steps.max()),
        "residual": float(f"{float(solution.relative_residual.max()):.2g}"),
        "result": solution.result.name,
    }


def main() -> None:
    """Run every recipe in a process of its own, or one of them here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for paper_size.json")
    parser.add_argument("--segment_len", type=int, default=16)
    parser.add_argument("--recipe", help="only this recipe, in this process, to stdout")
    arguments = parser.parse_args()
    if arguments.recipe:
        print(json.dumps(one_step(RECIPES / f"{arguments.recipe}.yaml", arguments.segment_len)))
        return
    results = {}
    for recipe in sorted(RECIPES.glob("*.yaml")):
        if recipe.stem == "quickstart":  # trained in full elsewhere
            continue
        command = [sys.executable, __file__, "--out", str(arguments.out), "--recipe", recipe.stem]
        command += ["--segment_len", str(arguments.segment_len)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[recipe.stem] = json.loads(done.stdout.splitlines()[-1])
        print(recipe.stem, json.dumps(results[recipe.stem]), file=sys.stderr)
    report = {
        "command": f"python benchmarks/paper_size.py --out OUT --segment_len {arguments.segment_len}",
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "batch_size": 1,
        "segment_len": arguments.segment_len,
        "seed": 0,
        "recipes": results,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "paper_size.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
