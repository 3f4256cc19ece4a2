"""The README is true: its example runs, its commands parse, its files exist."""

import re
import shlex
from pathlib import Path

import pytest

from deepeq.cli import command_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def test_example_runs_and_gives_a_converged_equilibrium_with_gradients() -> None:
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["solution"].converged.all()
    assert all(parameter.grad is not None for parameter in names["layer"].parameters())


def test_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = [line for block in blocks("") for line in block.splitlines() if line.startswith("deepeq ")]
    assert commands
    for command in commands:
        words = shlex.split(
            command.replace("[", "").replace("]", ""), comments=True
        )  # brackets mark what may be left out
        command_parser().parse_args(words[1:])


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("")), flags=re.MULTILINE)
    assert targets[:2] == ["train", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_file_tree_matches_the_disk() -> None:
    (tree,) = [block for block in blocks("") if block.startswith("src/deepeq/")]
    named = set(re.findall(r"(?<!\S)(\w+(?:\.py|/))(?=\s)", tree))
    inside = {path.name + ("/" if path.is_dir() else "") for path in (ROOT / "src" / "deepeq").iterdir()}
    inside -= {"__init__.py", "__pycache__/", "py.typed"}
    assert inside <= named
    assert {name for name in named if not (ROOT / name).exists()} == inside


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
