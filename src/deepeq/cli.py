"""The command `deepeq`: parses, builds, calls. Results go to stdout as JSON or text, messages to stderr."""

import json
import subprocess
import sys
from argparse import REMAINDER
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from deepeq import __version__
from deepeq.data import Vocabulary
from deepeq.data.download import prepare_corpus
from deepeq.data.published import PUBLISHED
from deepeq.data.vocabulary import UNKNOWN
from deepeq.solution import ConvergenceError
from deepeq.train import Interrupted, TrainingError, generate, plot_run, train
from deepeq.train.config import add_run_arguments, condensed, run_config
from deepeq.train.display import preparation
from deepeq.train.evaluate_run import EvaluationOptions, evaluate_run
from deepeq.train.hub import export_run, open_model
from deepeq.train.info import describe_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a run that failed, 2 for a mistake of the user, 130 for Ctrl-C."""
    parser = _parser()
    try:
        parsed = parser.instantiate(parser.parse_args(list(sys.argv[1:] if arguments is None else arguments)))
        return _COMMANDS[parsed.subcommand](parsed[parsed.subcommand]) or 0
    except (TrainingError, ConvergenceError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        return _fail(1, error)
    except (ValueError, OSError) as error:
        return _fail(2, error)
    except Interrupted as error:
        return _fail(130, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted")


def _fail(code: int, message: object) -> int:
    print(f"deepeq: {' '.join(condensed(str(message)).splitlines())}", file=sys.stderr)
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
    training.add_argument(
        "--resume",
        choices=("no", "yes", "auto"),
        default="no",
        help="whether to go on from the newest checkpoint in --run.dir; auto: if there is one",
    )
    commands.add_subcommand("train", training, help="train a language model from a recipe")

    evaluation = _run_parser("Evaluate the best checkpoint of a run, or an exported model; prints JSON.")
    evaluation.add_class_arguments(EvaluationOptions)
    commands.add_subcommand("eval", evaluation, help="evaluate a run")

    generation = _run_parser("Continue a prompt, printed as it is sampled, or several, printed as lines of JSON.")
    generation.add_argument("--prompt", type=str, nargs="+", action="extend", default=[], help="texts to continue")
    generation.add_argument("--prompts_file", type=str, help="file with a text to continue in each line")
    generation.add_argument("--num_tokens", type=int, default=300, help="tokens to sample for each")
    generation.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    generation.add_argument("--top_k", type=int, default=0, help="sample among so many of the likeliest; 0 for all")
    generation.add_argument(
        "--top_p", type=float, default=1.0, help="sample among the fewest likeliest of this probability together"
    )
    generation.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    generation.add_argument(
        "--memory_len",
        type=int,
        help="positions to look back (default: as in evaluation; 0: solve for the last segment anew at each token)",
    )
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

    export = _run_parser("Write a model that `PretrainedModel.from_pretrained` reads; prints JSON.")
    export.add_argument("--out", type=str, required=True, help="folder for the model, its card and its vocabulary")
    export.add_argument("--push", type=str, help="repository on the Hugging Face hub to upload it to (user/name)")
    commands.add_subcommand("export", export, help="give a model away")

    bench = _Parser(
        description="Run a benchmark of the source checkout; exits as it does.",
        usage="deepeq bench NAME --out DIR [ARGUMENT ...]    (deepeq bench NAME --help lists the arguments)",
    )
    bench.add_argument("name", type=str, help="script of the folder benchmarks/, without .py")
    bench.add_argument("arguments", type=list[str], nargs=REMAINDER, help="what the script gets: --out DIR and more")
    commands.add_subcommand("bench", bench, help="run a benchmark")

    commands.add_subcommand("plot", _run_parser("Draw the figures of a run; prints their paths."), help="draw figures")
    return parser


def _run_parser(description: str) -> ArgumentParser:
    parser = _Parser(description=description)
    parser.add_argument("--run", type=str, required=True, help="the run folder")
    return parser


def _train(arguments: Namespace) -> None:
    result = train(run_config(arguments), resume=arguments.resume)
    if result is not None:  # of several processes, the first one has it
        print(json.dumps(result))


def _eval(arguments: Namespace) -> None:
    options = EvaluationOptions(**{part.name: arguments[part.name] for part in fields(EvaluationOptions)})
    print(json.dumps(evaluate_run(Path(arguments.run), options)))


def _generate(arguments: Namespace) -> None:
    config, vocabulary, model = open_model(Path(arguments.run))
    if vocabulary is None:
        raise ValueError(f"{arguments.run} was trained on {config.level}s, which are no text to continue")
    prompts = [*arguments.prompt, *_lines(arguments.prompts_file)]
    encoded = [vocabulary.encode(prompt) for prompt in prompts]
    tokens = generate(
        model,
        encoded,
        num_tokens=arguments.num_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        segment_len=config.segment_len,
        memory_len=arguments.memory_len,
        seed=arguments.seed,
    )
    _report_unknown(vocabulary, encoded)
    if len(prompts) == 1 and arguments.prompts_file is None:
        _print_text(vocabulary, prompts[0], (token for (token,) in tokens))
        return
    for prompt, *continuation in zip(prompts, *tokens, strict=True):
        print(json.dumps({"prompt": prompt, "continuation": vocabulary.decode(continuation)}))


def _lines(file: str | None) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        lines = [] if file is None else Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from error
    return [line for line in lines if line.strip()]


def _report_unknown(vocabulary: Vocabulary, prompts: Sequence[Tensor]) -> None:
    ids = torch.cat(list(prompts))
    count = int((ids == vocabulary.tokens.index(UNKNOWN)).sum())
    if count:
        level = vocabulary.level
        print(
            f"deepeq: {count} of {len(ids)} {level}s are unknown to the model, which reads {UNKNOWN}", file=sys.stderr
        )


def _print_text(vocabulary: Vocabulary, prompt: str, tokens: Iterable[int]) -> None:
    print(prompt, end="", flush=True)
    after = prompt
    for token in tokens:
        text = vocabulary.decode([token])
        glue = vocabulary.level == "word" and not after.endswith("\n") and not text.startswith("\n")
        print(" " * glue + text, end="", flush=True)
        after = text
    print()


def _bench(arguments: Namespace) -> int:
    folder = Path(__file__).parents[2] / "benchmarks"
    names = sorted(path.stem for path in folder.glob("[!_]*.py"))
    name = arguments.name.replace("-", "_")
    if not names:
        raise ValueError(f"there is no folder {folder}: benchmarks need a checkout of the source, installed with -e")
    if name not in names:
        raise ValueError(f"{arguments.name!r} is no benchmark; there are {', '.join(names)}")
    return subprocess.run([sys.executable, folder / f"{name}.py", *arguments.arguments], check=False).returncode


def _export(arguments: Namespace) -> None:
    print(json.dumps(export_run(arguments.run, arguments.out, repository=arguments.push)))


def _info(arguments: Namespace) -> None:
    print(json.dumps(describe_model(run_config(arguments), vocab_size=arguments.vocab_size), indent=1))


def _data(arguments: Namespace) -> None:
    with preparation() as progress:
        summary = prepare_corpus(arguments.name, Path(arguments.dir), download=arguments.download, progress=progress)
    print(json.dumps(summary))


def _plot(arguments: Namespace) -> None:
    for path in plot_run(Path(arguments.run)):
        print(path)


_COMMANDS = {
    "data": _data,
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "info": _info,
    "export": _export,
    "bench": _bench,
    "plot": _plot,
}
