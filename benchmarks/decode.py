"""How much faster is decoding with kept keys and values than solving for the whole prefix at each token?

    deepeq bench decode --out DIR [--run RUN_DIR]

A text is gone through token by token, in one process, by the same model, solver, tolerance and threads, in two ways:
with a memory of all earlier positions, so that a token is one solve at one position; and by solving for the whole
prefix in one segment, without memory, with the logits of its last position alone. Most of the text is the model's own,
sampled after the longest prompt. The time of a token includes choosing the next one, that of the first one reading the
prompt. The first way is timed before and after the second, and the mean is taken. `speedup` is that of the tokens after
the longest prompt, which is as long as what follows it; `prompts` has the shorter ones too. The log-probabilities of
both ways are compared, at some prefixes also at a tight tolerance: where a position has several equilibria, they may
find different ones. Without --run, the model is that of the quickstart with random weights.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from _report import processor
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import parametrize

import deepeq
from deepeq.data import Corpus, load_corpus
from deepeq.models import LanguageModel, TiedNetwork
from deepeq.train import RunFolder, generate, load_config
from deepeq.train.cores import evaluation_core
from deepeq.train.generation import Decoding, Sampling

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
TEMPERATURE = 0.8
TIGHT = deepeq.Broyden(rtol=1e-5, max_steps=500, history_size=100)
NUM_TIGHT = 16


class Token(NamedTuple):
    """One prediction, made one way."""

    seconds: float
    log_probs: Tensor  # (V,)
    steps: int
    residual: float
    converged: bool

    @classmethod
    def of(cls, decoding: Decoding, start: float) -> "Token":
        Sampling(temperature=TEMPERATURE).choose(decoding.log_probs, [torch.default_generator])
        seconds, solution = time.perf_counter() - start, decoding.solution
        assert solution is not None
        values = int(solution.num_steps), float(solution.residual), bool(solution.converged)
        return cls(seconds, decoding.log_probs[0], *values)


def with_memory(model: LanguageModel, text: Tensor, *, prompt_len: int, num_tokens: int) -> list[Token]:
    """Predictions after the prompt and after each token that follows it, but for the last one."""
    needed = prompt_len + num_tokens
    memory_len = None if model.start_memory(1, length=needed) is None else needed
    prompt, *given = text[:needed].unsqueeze(0).split([prompt_len, *[1] * num_tokens], dim=1)
    start = time.perf_counter()
    decoding = Decoding(model, prompt, segment_len=prompt_len, memory_len=memory_len)
    tokens = [Token.of(decoding, start)]
    for token in given[:-1]:
        start = time.perf_counter()
        decoding.advance([int(token)])
        tokens.append(Token.of(decoding, start))
    return tokens


def anew(model: LanguageModel, text: Tensor, prefix_lens: Iterable[int]) -> list[Token]:
    """Predictions after these prefixes, each solved for as a whole."""
    tokens = []
    for length in prefix_lens:
        start = time.perf_counter()
        decoding = Decoding(model, text[:length].unsqueeze(0), segment_len=length, memory_len=0)
        tokens.append(Token.of(decoding, start))
    return tokens


def compare(model: LanguageModel, text: Tensor, prompt_lens: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """All that is measured; the last prompt is the longest."""

    def decoded() -> list[list[Token]]:
        return [with_memory(model, text, prompt_len=length, num_tokens=num_tokens) for length in prompt_lens]

    longest = prompt_lens[-1]
    with_memory(model, text, prompt_len=longest, num_tokens=8)  # warms up
    anew(model, text, [longest] * 2)
    before = decoded()
    whole = dict(enumerate(anew(model, text, range(1, longest + num_tokens)), start=1))
    after = decoded()
    prompts = []
    for length, some, others in zip(prompt_lens, before, after, strict=True):
        means = [a._replace(seconds=(a.seconds + b.seconds) / 2) for a, b in zip(some, others, strict=True)]
        prompts.append(describe(length, means, [whole[length + index] for index in range(num_tokens)]))
    return {
        "speedup": prompts[-1]["speedup"],
        "largest_log_prob_difference": max(prompt["log_prob_difference"]["largest"] for prompt in prompts),
        "tight": compare_tightly(model, text, longest, num_tokens),
        "prompts": prompts,
        "anew_seconds": {length: token.seconds for length, token in whole.items()},
    }


def describe(prompt_len: int, decoded: Sequence[Token], whole: Sequence[Token]) -> dict[str, Any]:
    """The tokens after one prompt."""
    return {
        "prompt_len": prompt_len,
        "speedup": sum(token.seconds for token in whole) / sum(token.seconds for token in decoded),
        "log_prob_difference": difference(decoded, whole),
        "with_memory": summary(decoded),
        "anew": summary(whole),
        "with_memory_seconds": {prompt_len + index: token.seconds for index, token in enumerate(decoded)},
    }


def summary(tokens: Sequence[Token]) -> dict[str, Any]:
    return {
        "seconds": sum(token.seconds for token in tokens),
        "mean_steps": mean(token.steps for token in tokens),
        "most_steps": max(token.steps for token in tokens),
        "largest_residual": max(token.residual for token in tokens),
        "unconverged": sum(not token.converged for token in tokens),
    }


def difference(some: Sequence[Token], others: Sequence[Token]) -> dict[str, float]:
    """The largest one of a prefix's log-probabilities: over prefixes, and at how many it is no matter of tolerance."""
    pairs = zip(some, others, strict=True)
    largest = [float((a.log_probs - b.log_probs).abs().max()) for a, b in pairs]
    return {"largest": max(largest), "median": median(largest), "above_0.5": sum(value > 0.5 for value in largest)}


def compare_tightly(model: LanguageModel, text: Tensor, prompt_len: int, num_tokens: int) -> dict[str, Any]:
    """The same log-probabilities with little left of the solver's tolerance, at evenly spaced prefixes."""
    core = core_of(model)
    solver, core.solver = core.solver, TIGHT
    indices = range(0, num_tokens, max(1, num_tokens // NUM_TIGHT))
    decoded = with_memory(model, text, prompt_len=prompt_len, num_tokens=num_tokens)
    whole = anew(model, text, [prompt_len + index for index in indices])
    core.solver = solver
    return {
        "solver": str(TIGHT),
        "num_prefixes": len(indices),
        "log_prob_difference": difference([decoded[index] for index in indices], whole),
        "largest_residual": max(token.residual for token in [*decoded, *whole]),
    }


def core_of(model: LanguageModel) -> deepeq.DEQ:
    assert isinstance(model.network, TiedNetwork)
    assert isinstance(model.network.core, deepeq.DEQ)
    return model.network.core


def draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    title = (
        f"{result['num_tokens']} tokens after a prompt of {result['prompt_len']}: {result['speedup']:.0f} times faster"
    )
    axes = figure.add_subplot(title=title, xlabel="prefix (tokens)", ylabel="seconds a token", yscale="log")
    series = [result["anew_seconds"], *(prompt["with_memory_seconds"] for prompt in result["prompts"])]
    for index, seconds in enumerate(series):
        label = ["solving for the whole prefix", "solving for one position, with a memory", None, None][min(index, 2)]
        # The first token after a prompt pays for reading it.
        axes.plot(
            list(seconds)[index > 0 :],
            list(seconds.values())[index > 0 :],
            ".",
            markersize=3,
            color=f"C{min(index, 1)}",
            label=label,
        )
    axes.grid(alpha=0.3, which="both")
    axes.legend(markerscale=4)
    return figure


def table(result: dict[str, Any]) -> str:
    lines = [f"{'prompt':>6} {'way':11} {'ms a token':>10} {'steps':>6} {'worst residual':>14} {'unconverged':>11}"]
    for prompt in result["prompts"]:
        for name, way in (("anew", "anew"), ("with_memory", "with memory")):
            row = prompt[name]
            lines.append(
                f"{prompt['prompt_len']:6d} {way:11} {1e3 * row['seconds'] / result['num_tokens']:10.2f} "
                f"{row['mean_steps']:6.1f} {row['largest_residual']:14.1e} {row['unconverged']:11d}"
            )
        found = prompt["log_prob_difference"]
        lines.append(
            f"{'':6} {prompt['speedup']:.1f} times faster; log-probabilities differ by {found['median']:.1e} (median), "
            f"{found['largest']:.1e} (largest), above 0.5 at {found['above_0.5']}"
        )
    found = result["tight"]["log_prob_difference"]
    lines.append(f"at rtol={TIGHT.rtol:g} by {found['median']:.1e} (median), {found['largest']:.1e} (largest)")
    return "\n".join(lines)


def prepared(run: Path | None, seed: int) -> tuple[LanguageModel, Corpus]:
    """A trained model, or that of the quickstart with random weights, and its text."""
    if run is not None:
        config, _, model = RunFolder(run).load_model()
        corpus = RunFolder(run).load_corpus(config)
    else:
        config = load_config(RECIPE)
        corpus = load_corpus(config.data)
        torch.manual_seed(seed)
        model = LanguageModel(corpus.vocab_size, config.model).eval()
        assert isinstance(model.network, TiedNetwork)
        model.network.core = evaluation_core(model.network, config.equilibrium)
    if config.model.depth or not isinstance(corpus, Corpus):
        raise SystemExit(f"decode: {run} must be the run of an equilibrium model of text")
    return model, corpus


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="deepeq bench decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for decode.json and decode.png")
    parser.add_argument("--run", type=Path, help="folder of a trained run")
    parser.add_argument("--num_tokens", type=int, default=256, help="length of the longest prompt and what follows")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and of sampling")
    arguments = parser.parse_args()
    num_tokens: int = arguments.num_tokens
    torch.set_flush_denormal(True)  # as training does
    model, corpus = prepared(arguments.run, arguments.seed)
    prompt_lens = sorted({1, num_tokens // 4, num_tokens})
    prompt = corpus.test[:num_tokens].long()
    continuation = generate(model, [prompt], num_tokens=num_tokens, temperature=TEMPERATURE, seed=arguments.seed)
    text = torch.cat([prompt, torch.tensor(list(continuation)).squeeze(1)])
    with torch.inference_mode(), parametrize.cached():
        measured = compare(model, text, prompt_lens, num_tokens)
    result = {
        "command": f"deepeq bench decode --out OUT{' --run RUN_DIR' if arguments.run else ''} "
        f"--num_tokens {num_tokens} --seed {arguments.seed}",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{processor()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "weights": "random" if arguments.run is None else "trained",
        "model": str(model.config.layer),
        "vocab_size": corpus.vocab_size,
        "num_params": model.num_params,
        "solver": str(core_of(model).solver),
        "core": type(core_of(model)).__name__,
        "prompt_len": num_tokens,
        "num_tokens": num_tokens,
    } | measured
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result).savefig(arguments.out / "decode.png", dpi=120)
    print(table(result), file=sys.stderr)


if __name__ == "__main__":
    main()
