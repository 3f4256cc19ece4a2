"""The command `deepeq`: parses, builds, calls. Results go to stdout as JSON or text, messages to stderr."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from jsonargparse import ArgumentParser, Namespace

from deepeq import __version__
from deepeq.data.download import prepare_corpus
from deepeq.data.published import PUBLISHED
from deepeq.solution import ConvergenceError
from deepeq.train import Interrupted, RunFolder, TrainingError, evaluate, generate, plot_run, train
from deepeq.train.config import add_run_arguments, condensed, run_config
from deepeq.train.display import preparation
from deepeq.train.info import describe_model
from deepeq.train.metrics import quality


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a run that failed, 2 for a mistake of the user, 130 for Ctrl-C."""
    parser = _parser()
    try:
        parsed = parser.instantiate(parser.parse_args(list(sys.argv[1:] if arguments is None else arguments)))
        _COMMANDS[parsed.subcommand](parsed[parsed.subcommand])
    except (TrainingError, ConvergenceError, FloatingPointError, MemoryError) as error:
        return _fail(1, error)
    except (ValueError, OSError) as error:
        return _fail(2, error)
    except Interrupted as error:
        return _fail(130, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    return 0


def _fail(code: int, message: object) -> int:
    print(f"deepeq: {condensed(str(message))}", file=sys.stderr)
    return code


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(condensed(message), ex)


def _parser() -> ArgumentParser:
    parser = _Parser(prog="deepeq", description="Deep equilibrium models.", version=__version__)
    commands = parser.add_subcommands(dest="subcommand")

    training = _Parser(
        description="Train a language model; the last line of stdout is its result as JSON.",
        usage="deepeq train --config RECIPE [--FIELD VALUE ...]    (deepeq train --help lists the fields)",
    )
    add_run_arguments(training)
    commands.add_subcommand("train", training, help="train a language model from a recipe")

    evaluation = _run_parser("Evaluate the best checkpoint of a run; prints JSON.")
    evaluation.add_argument("--split", choices=("train", "valid", "test"), default="test", help="text to evaluate on")
    evaluation.add_argument("--batch_size", type=int, help="streams side by side (default: train.eval_batch_size)")
    evaluation.add_argument("--segment_len", type=int, help="tokens a solve (default: train.eval_segment_len)")
    commands.add_subcommand("eval", evaluation, help="evaluate a run")

    generation = _run_parser("Continue a prompt; prints the text as it is sampled.")
    generation.add_argument("--prompt", type=str, required=True, help="text to continue")
    generation.add_argument("--num_tokens", type=int, default=300, help="tokens to sample")
    generation.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    generation.add_argument("--top_k", type=int, default=0, help="sample among the likeliest; 0 for all")
    generation.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    commands.add_subcommand("generate", generation, help="continue a text")

    information = _Parser(
        description="Sizes and costs of the model of a recipe, without allocating it; prints JSON.",
        usage="deepeq info --config RECIPE [--FIELD VALUE ...]",
    )
    add_run_arguments(information)
    information.add_argument("--vocab_size", type=int, help="number of tokens (default: that of the corpus)")
    commands.add_subcommand("info", information, help="sizes and costs of a model")

    data = _Parser(description="Download a published corpus if it is not at hand, and prepare it; prints JSON.")
    data.add_argument("name", choices=tuple(PUBLISHED), help="corpus")
    data.add_argument("--dir", type=str, required=True, help="folder of the text and of what is made of it")
    data.add_argument("--download", type=bool, default=True, help="whether to download what is missing")
    commands.add_subcommand("data", data, help="prepare a corpus")

    commands.add_subcommand("plot", _run_parser("Draw the figures of a run; prints their paths."), help="draw figures")
    return parser


def _run_parser(description: str) -> ArgumentParser:
    parser = _Parser(description=description)
    parser.add_argument("--run", type=str, required=True, help="the run folder")
    return parser


def _train(arguments: Namespace) -> None:
    print(json.dumps(train(run_config(arguments))))


def _eval(arguments: Namespace) -> None:
    folder = RunFolder(Path(arguments.run))
    config, vocabulary, model = folder.load_model()
    train = config.train
    length = train.segment_len if train.eval_segment_len is None else train.eval_segment_len
    batches = folder.load_corpus(config).stream(
        arguments.split,
        batch_size=train.eval_batch_size if arguments.batch_size is None else arguments.batch_size,
        segment_len=length if arguments.segment_len is None else arguments.segment_len,
    )
    values = evaluate(model, batches)
    level = "symbol" if vocabulary is None else vocabulary.level
    print(json.dumps({"split": arguments.split} | quality(level, values["nll"]) | values))


def _generate(arguments: Namespace) -> None:
    config, vocabulary, model = RunFolder(Path(arguments.run)).load_model()
    if vocabulary is None:
        raise ValueError(f"{arguments.run} was trained on {config.data.corpus}, which is no text to continue")
    tokens = generate(
        model,
        vocabulary.encode(arguments.prompt),
        num_tokens=arguments.num_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        segment_len=config.train.segment_len,
        generator=torch.Generator().manual_seed(arguments.seed),
    )
    print(arguments.prompt, end="", flush=True)
    after = arguments.prompt
    for token in tokens:
        text = vocabulary.decode([token])
        glue = vocabulary.level == "word" and not after.endswith("\n") and not text.startswith("\n")
        print(" " * glue + text, end="", flush=True)
        after = text
    print()


def _info(arguments: Namespace) -> None:
    print(json.dumps(describe_model(run_config(arguments), vocab_size=arguments.vocab_size), indent=1))


def _data(arguments: Namespace) -> None:
    with preparation() as progress:
        summary = prepare_corpus(arguments.name, Path(arguments.dir), download=arguments.download, progress=progress)
    print(json.dumps(summary))


def _plot(arguments: Namespace) -> None:
    for path in plot_run(Path(arguments.run)):
        print(path)


_COMMANDS = {"data": _data, "train": _train, "eval": _eval, "generate": _generate, "info": _info, "plot": _plot}
