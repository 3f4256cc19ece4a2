"""The command `deepeq`, as far as it needs no other package: help, version, and what to install."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec

from deepeq import __version__

COMMANDS = {
    "train": "train a language model from a recipe",
    "eval": "evaluate a model",
    "generate": "continue a text",
    "info": "print sizes and costs of a model",
    "data": "prepare a corpus",
    "export": "copy a model out of its run",
    "plot": "draw the figures of a run",
}
"""The commands, and what each of them does."""

LIST = f"the commands are {', '.join(COMMANDS)}"
HELP = """usage: deepeq COMMAND [OPTIONS]

Deep equilibrium models: train, evaluate and use language models.

commands:
{commands}

options:
  -h, --help     print this text; deepeq COMMAND --help lists the options
  --version      print the version
  --print_completion SHELL
                 print the script that completes options; SHELL is shtab-bash,
                 shtab-zsh, shtab-fish, shtab-tcsh or shtab-powershell
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code of `deepeq.cli.main`, or 2 where packages are missing."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(f"deepeq {__version__}")
        return 0
    if words[:1] in (["-h"], ["--help"]):
        print(HELP.format(commands="\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())), end="")
        return 0
    try:
        if find_spec("jsonargparse") is None:
            return _fail(2, "the command needs more packages than the library; run pip install 'deepeq[train]'")
        if not words:
            return _fail(2, f"name a command; {LIST}")
        if words[0] not in COMMANDS and not words[0].startswith("-"):
            near = get_close_matches(words[0], COMMANDS, n=1)
            return _fail(2, f"there is no command {words[0]}; " + (f"did you mean {near[0]}?" if near else LIST))
        # Here and not above, because it imports torch, which takes seconds.
        from deepeq import cli

        return cli.main(words)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "deepeq":
            raise
        return _fail(2, f"the package {error.name} is missing; run pip install 'deepeq[train]'")
    except KeyboardInterrupt:
        return _fail(130, "interrupted")


def _fail(code: int, message: str) -> int:
    print(f"deepeq: {message}", file=sys.stderr)
    return code
