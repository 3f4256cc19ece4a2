"""Does every model of the paper's tables, at the paper's size, do a training step on this machine?

    python benchmarks/paper_size.py --out DIR [--segment_len 16] [--recipes NAME ...]

One training step of each recipe on one short segment of random words, with the recipe's own layers, vocabulary, solvers
and dropouts, as after pretraining. The optimizer is AdamW with the recipe's learning rate. Measured are the loss and
the norm of the gradient, the solves, the loss on the same segment after the step, seconds, and the peak of the resident
memory of a process of its own.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _harness import RECIPES, Benchmark, in_own_process, markdown, resident_bytes

from deepeq import Solution
from deepeq.data import known_vocab_size
from deepeq.models import LanguageModel
from deepeq.train import load_config

COLUMNS = ("num_params", "loss", "log_vocab_size", "gradient_norm", "loss_after", "step_seconds", "peak_rss_mib")


def one_step(recipe: Path, segment_len: int) -> dict[str, Any]:
    """Return what one training step of a recipe measures."""
    config = load_config(recipe)
    vocab_size = known_vocab_size(config.data)
    assert vocab_size is not None, f"{recipe} must name a published corpus"
    torch.manual_seed(0)
    start = time.perf_counter()
    model = LanguageModel(vocab_size, config.model)
    rate = config.optimizer.lr_at(config.optimizer.lr_warmup_steps, config.train.steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=config.optimizer.betas)
    built, backward = time.perf_counter(), []
    how = config.training_how(config.train.steps - 1, [], backward.append)
    words = torch.randint(vocab_size, (1, segment_len + 1))
    tokens, targets = words[:, :-1], words[:, 1:]
    output = model(tokens, None, targets, how=how)
    output.nll.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_gradient_norm)
    optimizer.step()
    done = time.perf_counter()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, missing
    with torch.no_grad():
        after = model.eval()(tokens, None, targets, how=how).nll.mean()
    solves = (
        {} if how is None else {"forward": _solve(output.solution), "backward": [_solve(each) for each in backward]}
    )
    return {
        "num_params": model.num_params,
        "num_params_non_embedding": model.num_params_non_embedding,
        "loss": round(float(output.nll.detach().mean()), 4),
        "log_vocab_size": round(math.log(vocab_size), 4),
        "gradient_norm": float(f"{norm:.4g}"),
        "loss_after": round(float(after), 4),
        **solves,
        "build_seconds": round(built - start, 2),
        "step_seconds": round(done - built, 2),
        "peak_rss_mib": round(resident_bytes(peak=True) / 2**20),
    }


def _solve(solution: Solution) -> dict[str, Any]:
    residual = float(f"{float(solution.relative_residual.max()):.2g}")
    return {"steps": int(solution.num_steps.max()), "residual": residual, "result": solution.result.name}


def main() -> None:
    benchmark = Benchmark("paper_size", __doc__)
    names = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml") if recipe.stem != "quickstart")
    benchmark.parser.add_argument("--segment_len", type=int, default=16)
    benchmark.parser.add_argument("--recipes", nargs="+", choices=names, default=names)
    benchmark.parser.add_argument("--here", action="store_true", help="print one recipe's step, in this process")
    arguments = benchmark.parse()
    if arguments.here:
        print(json.dumps(one_step(RECIPES / f"{arguments.recipes[0]}.yaml", arguments.segment_len)))
        return
    recipes = {}
    for name in arguments.recipes:
        print(name, file=sys.stderr)
        words = ("--segment_len", str(arguments.segment_len), "--recipes", name)
        recipes[name] = in_own_process(__file__, "--here", *words)
    result = {"batch_size": 1, "segment_len": arguments.segment_len, "seed": 0, "recipes": recipes}
    rows = [[name, *(row[column] for column in COLUMNS)] for name, row in recipes.items()]
    benchmark.report(result, markdown(("recipe", *COLUMNS), rows))


if __name__ == "__main__":
    main()
