"""The command `deepeq`: parses, builds, calls. Results go to stdout as JSON or text, messages to stderr."""

import json
import sys
from argparse import HelpFormatter
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch
from jsonargparse import ArgumentParser, Namespace

from deepeq.data import PUBLISHED, Tokenizer, prepare_corpus
from deepeq.models import generate
from deepeq.solution import ConvergenceError
from deepeq.train import (
    EvaluationOptions,
    Interrupted,
    TrainingError,
    describe_model,
    evaluate_run,
    export,
    open_model,
    plot_run,
    run_config,
    train,
)
from deepeq.train.logging import preparation
from deepeq.train.recipe import add_run_arguments, short_error
from deepeq.train.recipe_text import check_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 for a run that failed, 2 for a mistake of the user, 130 for Ctrl-C."""
    parser, words = command_parser(), list(sys.argv[1:] if arguments is None else arguments)
    try:
        _check_recipes(words)
        parsed = parser.instantiate(parser.parse_args(words))
        _, run = _COMMANDS[parsed.subcommand]
        run(parsed[parsed.subcommand])
        return 0
    except (TrainingError, ConvergenceError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        return _fail(1, error)
    except (ValueError, OSError) as error:
        return _fail(2, error)
    except Interrupted as error:
        return _fail(130, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted")


def _check_recipes(words: Sequence[str]) -> None:
    """Check the files after `--config` before the parsing library reads them."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        path = Path(value if equals else after)
        if option == "--config" and path.is_file():  # the library says what is wrong where it is not
            check_file(path)


def _fail(code: int, message: object) -> int:
    print(f"deepeq: {short_error(str(message))}", file=sys.stderr)
    return code


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a part of the parser, whose error the whole of it reports
            super().error(message, ex)
        required = "the following arguments are required: "
        if message.startswith(required):
            names = message.removeprefix(required)
            message = f"give {' and '.join(_as_typed(name) for name in names.split(', '))}"
        raise SystemExit(_fail(2, short_error(message, self.format_help())))


def _as_typed(name: str) -> str:
    """Return a required argument, which the parsing library calls `COMMAND.NAME`, as users type it."""
    command, _, option = name.partition(".")
    build, _ = _COMMANDS[command]
    return f"--{option}" if f"--{option} " in build().format_help() else option.upper()


class _TrainParser(_Parser):
    FIRST = ("--config", "--run.dir", "--resume", "--data.files", "--data.unit", "--model.depth", "--optimizer.lr")
    FIRST += ("--train.steps", "--train.batch_size", "--train.segment_len")

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Return the help, which begins with the options that most runs need."""
        text = super().format_help() if formatter is None else super().format_help(formatter)
        actions = {name: action for action in self._actions for name in action.option_strings}
        if not actions.keys() >= {*self.FIRST}:  # the parsing library makes parsers of this class for parts of a recipe
            return text
        lines = [f"  {name:22}{str(actions[name].help).partition('. ')[0].rstrip('.')}" for name in self.FIRST]
        usage, _, rest = text.partition("\n\n")
        return "\n".join([usage, "", "the options that most runs need:", *lines, "", rest])


@cache
def command_parser() -> ArgumentParser:
    """Return the parser of the command `deepeq`; building it takes longer than parsing."""
    parser = _Parser(prog="deepeq", description="Deep equilibrium models.")
    commands = parser.add_subcommands(dest="subcommand")
    for name, (build, _) in _COMMANDS.items():
        commands.add_subcommand(name, build())
    return parser


def _train_parser() -> ArgumentParser:
    parser = _TrainParser(
        description="Train a language model; the last line of stdout is its result as JSON.",
        usage="deepeq train --config RECIPE [--FIELD VALUE ...]    (deepeq train --help lists the fields)",
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--resume",
        choices=("no", "yes", "auto"),
        default="no",
        help="whether to continue from the newest checkpoint in --run.dir; auto: if there is one",
    )
    return parser


def _eval_parser() -> ArgumentParser:
    parser = _model_parser("Evaluate the best model of a run, or an exported model; print JSON.")
    parser.add_class_arguments(EvaluationOptions)
    return parser


def _generate_parser() -> ArgumentParser:
    parser = _model_parser("Continue one prompt, printed as it is sampled, or several, printed as lines of JSON.")
    parser.add_argument("--prompt", type=str, nargs="+", action="extend", default=[], help="texts to continue")
    parser.add_argument("--prompts_file", type=str, help="file with one text to continue in each line")
    parser.add_argument("--num_tokens", type=int, default=300, help="number of tokens to sample for each prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="divisor of the logits; 0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="number of likeliest tokens to sample among; 0 for all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="sample among the fewest likeliest tokens with this total probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument(
        "--memory_len",
        type=int,
        help="positions to look back (default: as in evaluation; 0: solve for the last segment again at each token)",
    )
    return parser


def _info_parser() -> ArgumentParser:
    parser = _Parser(
        description="Print sizes and costs of the model of a recipe as JSON, without allocating it.",
        usage="deepeq info --config RECIPE [--FIELD VALUE ...]",
    )
    add_run_arguments(parser)
    parser.add_argument("--vocab_size", type=int, help="number of tokens (default: that of the corpus)")
    return parser


def _data_parser() -> ArgumentParser:
    parser = _Parser(description="Download a published corpus if it is not at hand, and prepare it; print JSON.")
    parser.add_argument("name", choices=tuple(PUBLISHED), help="corpus")
    parser.add_argument("--dir", type=str, required=True, help="folder of the text and of the prepared corpus")
    parser.add_argument("--download", type=bool, default=True, help="whether to download what is missing")
    return parser


def _export_parser() -> ArgumentParser:
    parser = _model_parser("Copy the model folder of a run, which `PretrainedModel.from_pretrained` reads; print JSON.")
    parser.add_argument("--out", type=str, required=True, help="folder for the model, its tokenizer and its card")
    parser.add_argument("--push", type=str, help="repository on the Hugging Face hub to upload it to (user/name)")
    return parser


def _plot_parser() -> ArgumentParser:
    return _model_parser("Draw the figures of a run; print their paths.")


def _model_parser(description: str) -> ArgumentParser:
    parser = _Parser(description=description)
    parser.add_argument("--run", type=str, required=True, help="a run folder, a model folder, or a name on the hub")
    return parser


def _train(arguments: Namespace) -> None:
    if not arguments.config and arguments.resume == "no":
        raise ValueError(
            "train needs a recipe; give --config FILE, such as recipes/quickstart.yaml or the config.yaml of a run"
        )
    result = train(run_config(arguments), resume=arguments.resume)
    if result is not None:  # of several processes, the first one has it
        print(json.dumps(result))


def _eval(arguments: Namespace) -> None:
    options = EvaluationOptions(**{part.name: arguments[part.name] for part in fields(EvaluationOptions)})
    print(json.dumps(evaluate_run(arguments.run, options)))


def _generate(arguments: Namespace) -> None:
    trained = open_model(arguments.run)
    tokenizer = trained.tokenizer
    if tokenizer is None:
        raise ValueError(f"{arguments.run} was trained on symbols, which are not text to continue")
    prompts = [*arguments.prompt, *_lines(arguments.prompts_file)]
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    tokens = generate(
        trained.model,
        encoded,
        how=trained.how,
        num_tokens=arguments.num_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        segment_len=trained.config.train.segment_len,
        memory_len=arguments.memory_len,
        seed=arguments.seed,
    )
    _report_unknown(tokenizer, torch.cat(encoded))
    if len(prompts) == 1 and arguments.prompts_file is None:
        print(prompts[0], end="", flush=True)
        for piece in tokenizer.decode_stream(prompts[0], (token for (token,) in tokens)):
            print(piece, end="", flush=True)
        print()
        return
    for prompt, *continuation in zip(prompts, *tokens, strict=True):
        print(json.dumps({"prompt": prompt, "continuation": tokenizer.decode(continuation)}))


def _lines(file: str | None) -> list[str]:
    """Return the lines of a file that are not blank."""
    try:
        lines = [] if file is None else Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error
    return [line for line in lines if line.strip()]


def _report_unknown(tokenizer: Tokenizer, ids: torch.Tensor) -> None:
    count = 0 if tokenizer.unknown is None else int((ids == tokenizer.unknown).sum())
    if count:
        print(
            f"deepeq: {count} of {len(ids)} {tokenizer.unit}s are unknown to the model, which reads <unk>",
            file=sys.stderr,
        )


def _info(arguments: Namespace) -> None:
    print(json.dumps(describe_model(run_config(arguments), vocab_size=arguments.vocab_size), indent=1))


def _data(arguments: Namespace) -> None:
    with preparation() as progress:
        summary = prepare_corpus(arguments.name, Path(arguments.dir), download=arguments.download, progress=progress)
    print(json.dumps(summary))


def _export(arguments: Namespace) -> None:
    print(json.dumps(export(arguments.run, arguments.out, repository=arguments.push)))


def _plot(arguments: Namespace) -> None:
    for path in plot_run(Path(arguments.run)):
        print(path)


_COMMANDS = {
    "train": (_train_parser, _train),
    "eval": (_eval_parser, _eval),
    "generate": (_generate_parser, _generate),
    "info": (_info_parser, _info),
    "data": (_data_parser, _data),
    "export": (_export_parser, _export),
    "plot": (_plot_parser, _plot),
}
"""The parser and the function of each command."""
