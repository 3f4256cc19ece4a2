"""The command `deepeq` before it imports anything: help, version, and what is missing."""

import argparse
import subprocess
import sys

import pytest

import deepeq
from deepeq.cli import command_parser
from deepeq.command import COMMANDS, main

# Runs the command after a hook that makes packages of the extra look as if they were not installed.
WITHOUT = """
import sys
from importlib.abc import MetaPathFinder


class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Block())
from deepeq import command

if "jsonargparse" in {names!r}:
    command.find_spec = lambda name: None
code = command.main({words!r})
assert "torch" not in sys.modules or not {without_torch}
sys.exit(code)
"""


def run(words: list[str], *, missing: tuple[str, ...] = (), without_torch: bool = False) -> tuple[int, str, str]:
    code = WITHOUT.format(names=set(missing), words=words, without_torch=without_torch)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_version_and_help_do_not_import_torch() -> None:
    missing = ("torch", "jsonargparse", "numpy", "yaml")
    assert run(["--version"], missing=missing, without_torch=True) == (0, f"deepeq {deepeq.__version__}\n", "")
    code, out, err = run(["--help"], missing=missing, without_torch=True)
    assert (code, err) == (0, "")
    assert all(name in out for name in COMMANDS)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("words", [[], ["train"], ["eval", "--run", "x"]])
def test_without_the_extra_the_command_says_in_one_line_what_to_install(words: list[str]) -> None:
    code, out, err = run(words, missing=("jsonargparse",), without_torch=True)
    assert (code, out) == (2, "")
    assert err == "deepeq: the command needs more packages than the library; run pip install 'deepeq[train]'\n"


def test_a_missing_package_of_the_extra_is_named() -> None:
    code, out, err = run(["train"], missing=("lightning",))
    assert (code, out) == (2, "")
    assert err == "deepeq: the package lightning is missing; run pip install 'deepeq[train]'\n"


def test_commands_of_the_help_are_those_of_the_parser() -> None:
    (action,) = [each for each in command_parser()._actions if isinstance(each, argparse._SubParsersAction)]
    assert list(action.choices) == list(COMMANDS)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "name a command; the commands are train, eval, generate, info, data, export, plot"),
        (["trian"], "there is no command trian; did you mean train?"),
        (["xyz"], "there is no command xyz; the commands are train, eval, generate, info, data, export, plot"),
        (
            ["train"],
            "train needs a recipe; give --config FILE, such as recipes/quickstart.yaml or the config.yaml of a run",
        ),
        (["train", "--optimizr.lr", "3"], "there is no option --optimizr.lr; did you mean --optimizer.lr?"),
        (["train", "--lr", "3"], "there is no option --lr; did you mean --optimizer.lr?"),
        (["eval", "--rn", "x"], "there is no option --rn; did you mean --run?"),
        (["generate", "--run", "x", "--zzzzzz", "1"], "there is no option --zzzzzz; --help lists them"),
        (["eval"], "give --run"),
        (["data"], "give NAME and --dir"),
        (["export", "--run", "x"], "give --out"),
        (["train", "--optimizer.name", "adm"], "optimizer.name='adm' must be one of adamw, muon, sgd"),
        (["train", "--train.steps", "many"], "train.steps='many' must be a whole number"),
        (["train", "--optimizer.lr", "big"], "optimizer.lr='big' must be a number"),
        (
            ["train", "--equilibrium.solver", "Newton"],
            "equilibrium.solver='Newton' must be one of Anderson, Broyden, FixedPointIteration, NewtonKrylov",
        ),
        (
            ["train", "--equilibrium.backward_solver", "deepeq.Newton"],
            "equilibrium.backward_solver='deepeq.Newton' must be one of Anderson, Broyden, FixedPointIteration, "
            "NewtonKrylov, GMRES, ConjugateGradient",
        ),
        (
            ["train", "--equilibrium.solver", "Anderson", "--equilibrium.solver.historysize", "3"],
            "deepeq.Anderson has no field 'historysize'; did you mean history_size?",
        ),
        (["eval", "--run", "x", "--solver", "Newton"], "solver='Newton' must be one of Anderson, Broyden, "
         "FixedPointIteration, NewtonKrylov"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err) == (2, "", f"deepeq: {sentence}\n")


def test_help_of_train_begins_with_what_most_runs_need(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    first = lines[lines.index("the options that most runs need:") + 1 :][:10]
    assert [line.split()[0] for line in first][:3] == ["--config", "--run.dir", "--resume"]
    assert all(len(line.split()) > 3 for line in first)


def test_completion_knows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    try:
        with pytest.raises(SystemExit, match="0"):
            main(["--print_completion", "shtab-bash"])
    finally:
        command_parser.cache_clear()  # the parsing library does not use a parser again that has printed its completion
    assert "--optimizer.lr" in capsys.readouterr().out


def test_ctrl_c_during_start_up_is_quiet() -> None:
    code = """
import sys
from importlib.abc import MetaPathFinder


class Interrupt(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise KeyboardInterrupt


sys.meta_path.insert(0, Interrupt())
from deepeq import command

sys.exit(command.main(["train", "--config", "nowhere.yaml"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "deepeq: interrupted\n")
