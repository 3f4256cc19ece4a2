"""How much faster is decoding with kept keys and values than solving for the whole prefix at each token?

    python benchmarks/decode.py --out DIR [--run RUN_DIR] [--num_tokens 256]

One text is read token by token, in one process, by the same model, solver, tolerance and threads, in two ways: with a
memory of all earlier positions, so that a token is one solve at one position; and by solving for the whole prefix in
one segment, without memory, with the logits of its last position only. Most of the text is the model's own, sampled
after the longest prompt. The time of a token includes choosing the next one, and that of the first token includes
reading the prompt. The first way is timed before and after the second one, and the mean is taken. `speedup` is that of
the tokens after the longest prompt, which is as long as the text that follows it; `prompts` has the shorter ones too.

The log-probabilities of both ways are compared, at some prefixes also at a tight tolerance: where a position has
several equilibria, the two ways may find different ones. Without --run, the model is that of
recipes/two_cores/pydoc_transformer.yaml with random weights.
"""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from _harness import RECIPES, Benchmark, markdown, synchronize
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import parametrize

import deepeq
from deepeq.data import Corpus, load_corpus
from deepeq.deq import How
from deepeq.models import Decoding, LanguageModel, Sampling, generate
from deepeq.train import load_config

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
        """Return the prediction of a decoding whose work began at a time."""
        Sampling(temperature=TEMPERATURE).choose(decoding.log_probs, [torch.default_generator])
        synchronize()
        seconds, solution = time.perf_counter() - start, decoding.solution
        assert solution is not None
        solve = int(solution.num_steps), float(solution.relative_residual), bool(solution.converged)
        return cls(seconds, decoding.log_probs[0], *solve)


def with_memory(model: LanguageModel, how: How, text: Tensor, *, prompt_len: int, num_tokens: int) -> list[Token]:
    """Return the predictions after the prompt and after each token that follows it, except the last one."""
    needed = prompt_len + num_tokens
    memory_len = None if model.start_memory(1, length=needed) is None else needed
    prompt, *given = text[:needed].unsqueeze(0).split([prompt_len, *[1] * num_tokens], dim=1)
    start = time.perf_counter()
    decoding = Decoding(model, prompt, how=how, segment_len=prompt_len, memory_len=memory_len)
    tokens = [Token.of(decoding, start)]
    for token in given[:-1]:
        start = time.perf_counter()
        decoding.advance([int(token)])
        tokens.append(Token.of(decoding, start))
    return tokens


def from_scratch(model: LanguageModel, how: How, text: Tensor, prefix_lens: Iterable[int]) -> list[Token]:
    """Return the predictions after these prefixes, each solved for as a whole."""
    tokens = []
    for length in prefix_lens:
        start = time.perf_counter()
        decoding = Decoding(model, text[:length].unsqueeze(0), how=how, segment_len=length, memory_len=0)
        tokens.append(Token.of(decoding, start))
    return tokens


def compare(
    model: LanguageModel, how: How, text: Tensor, prompt_lens: Sequence[int], num_tokens: int
) -> dict[str, Any]:
    """Return all measurements.

    Args:
        model: The model.
        how: How both ways solve.
        text: Token ids, (N,).
        prompt_lens: Lengths of the prompts; the last one is the longest.
        num_tokens: Number of tokens after each prompt.
    """

    def decoded() -> list[list[Token]]:
        return [with_memory(model, how, text, prompt_len=length, num_tokens=num_tokens) for length in prompt_lens]

    longest = prompt_lens[-1]
    with_memory(model, how, text, prompt_len=longest, num_tokens=min(8, num_tokens))  # warms up
    from_scratch(model, how, text, [longest] * 2)
    before = decoded()
    whole = dict(enumerate(from_scratch(model, how, text, range(1, longest + num_tokens)), start=1))
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
        "from_scratch_seconds": {length: token.seconds for length, token in whole.items()},
    }


def describe(prompt_len: int, decoded: Sequence[Token], whole: Sequence[Token]) -> dict[str, Any]:
    """Return the measurements of the tokens after one prompt."""
    return {
        "prompt_len": prompt_len,
        "speedup": sum(token.seconds for token in whole) / sum(token.seconds for token in decoded),
        "log_prob_difference": difference(decoded, whole),
        "with_memory": summary(decoded),
        "from_scratch": summary(whole),
        "with_memory_seconds": {prompt_len + index: token.seconds for index, token in enumerate(decoded)},
    }


def summary(tokens: Sequence[Token]) -> dict[str, Any]:
    """Return the time and the solves of several predictions."""
    return {
        "seconds": sum(token.seconds for token in tokens),
        "mean_steps": mean(token.steps for token in tokens),
        "most_steps": max(token.steps for token in tokens),
        "largest_residual": max(token.residual for token in tokens),
        "unconverged": sum(not token.converged for token in tokens),
    }


def difference(some: Sequence[Token], others: Sequence[Token]) -> dict[str, float]:
    """Return the largest difference of the log-probabilities of a prefix, summarized over the prefixes."""
    largest = [float((a.log_probs - b.log_probs).abs().max()) for a, b in zip(some, others, strict=True)]
    return {"largest": max(largest), "median": median(largest), "above_0.5": sum(value > 0.5 for value in largest)}


def compare_tightly(model: LanguageModel, text: Tensor, prompt_len: int, num_tokens: int) -> dict[str, Any]:
    """Return the difference of both ways when the solver's tolerance hardly matters, at evenly spaced prefixes."""
    how = deepeq.Equilibrium(solver=TIGHT, on_failure="ignore", verify=False)
    indices = range(0, num_tokens, max(1, num_tokens // NUM_TIGHT))
    decoded = with_memory(model, how, text, prompt_len=prompt_len, num_tokens=num_tokens)
    whole = from_scratch(model, how, text, [prompt_len + index for index in indices])
    return {
        "solver": str(TIGHT),
        "num_prefixes": len(indices),
        "log_prob_difference": difference([decoded[index] for index in indices], whole),
        "largest_residual": max(token.residual for token in [*decoded, *whole]),
    }


def draw(result: dict[str, Any]) -> Figure:
    """Return a figure of the seconds per token against the length of the prefix."""
    count, prompt = result["num_tokens"], result["prompt_len"]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    title = f"{count} tokens after a prompt of {prompt}: {result['speedup']:.0f} times faster"
    axes = figure.add_subplot(title=title, xlabel="prefix (tokens)", ylabel="seconds per token", yscale="log")
    whole = result["from_scratch_seconds"]
    axes.plot(list(whole), list(whole.values()), ".", markersize=3, label="solving for the whole prefix")
    for index, prompt in enumerate(result["prompts"]):
        lengths, seconds = zip(*prompt["with_memory_seconds"].items(), strict=True)
        label = None if index else "solving for one position, with a memory"
        axes.plot(lengths[1:], seconds[1:], ".", markersize=3, color="C1", label=label)  # the first reads the prompt
    axes.grid(alpha=0.3, which="both")
    axes.legend(markerscale=4)
    return figure


def table(result: dict[str, Any]) -> str:
    """Return a row for each prompt and way, and the differences of the log-probabilities."""
    rows, notes = [], []
    for prompt in result["prompts"]:
        for way in ("from_scratch", "with_memory"):
            row = prompt[way]
            milliseconds = 1e3 * row["seconds"] / result["num_tokens"]
            rows.append((prompt["prompt_len"], way.replace("_", " "), milliseconds, *list(row.values())[1:]))
        notes.append((f"after {prompt['prompt_len']}", prompt["speedup"], *prompt["log_prob_difference"].values()))
    notes.append((f"tight, rtol={TIGHT.rtol:g}", None, *result["tight"]["log_prob_difference"].values()))
    columns = ("prompt", "way", "ms per token", "mean steps", "most steps", "worst residual", "unconverged")
    differences = ("tokens", "times faster", "largest log-probability difference", "median", "above 0.5")
    return f"{markdown(columns, rows)}\n{markdown(differences, notes)}"


def prepared(benchmark: Benchmark, run: Path | None, seed: int) -> tuple[LanguageModel, How, Corpus]:
    """Return the model of a run, how it solves, and its text; without a run, a model with random weights."""
    if run is not None:
        trained, corpus = benchmark.open_text_model(run)
        config, model = trained.config, trained.model
    else:
        config = load_config(RECIPES / "two_cores/pydoc_transformer.yaml")
        loaded = load_corpus(config.data)
        assert isinstance(loaded, Corpus)
        corpus = loaded
        torch.manual_seed(seed)
        model = LanguageModel(corpus.vocab_size, config.model).eval()
    how = config.evaluation_how()
    if how is None:
        benchmark.stop(f"{run} must be the run of an equilibrium model")
    return model, how, corpus


def main() -> None:
    benchmark = Benchmark("decode", __doc__, draw)
    options = benchmark.parser
    options.add_argument("--run", type=Path, help="folder of a trained run")
    options.add_argument("--num_tokens", type=int, default=256, help="length of the longest prompt and of what follows")
    options.add_argument("--seed", type=int, default=0, help="seed of random weights and of sampling")
    arguments = benchmark.parse()
    count: int = arguments.num_tokens
    model, how, corpus = prepared(benchmark, arguments.run, arguments.seed)
    prompt = corpus.test[:count].long()
    sampled = generate(model, [prompt], how=how, num_tokens=count, temperature=TEMPERATURE, seed=arguments.seed)
    text = torch.cat([prompt, torch.tensor(list(sampled)).squeeze(1)])
    with torch.inference_mode(), parametrize.cached():
        measured = compare(model, how, text, sorted({1, max(1, count // 4), count}), count)
    result = {
        "weights": "random" if arguments.run is None else "trained",
        "model": str(model.config.layer),
        "vocab_size": corpus.vocab_size,
        "num_params": model.num_params,
        "how": str(how),
        "prompt_len": count,
        "num_tokens": count,
        **measured,
    }
    benchmark.report(result, table(result))


if __name__ == "__main__":
    main()
