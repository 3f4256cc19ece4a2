"""The README and the guides are true: the example runs, commands parse, files exist."""

import re
import shlex
from pathlib import Path

import pytest

from deepeq.cli import command_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def test_example_runs_and_gives_a_converged_equilibrium_with_gradients() -> None:
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["solution"].converged.all()
    assert all(parameter.grad is not None for parameter in names["layer"].parameters())


def commands(page: str) -> list[str]:
    text = (ROOT / page).read_text().replace("\\\n", " ")
    return [line for block in blocks("", text) for line in block.splitlines() if line.startswith("deepeq ")]


PAGES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_of_the_guides_parse(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        command = command.replace("--config RECIPE", "--config recipes/quickstart.yaml")
        if "runs/mine/config.yaml" not in command:  # the file of a run that exists only after training
            command_parser().parse_args(shlex.split(command, comments=True)[1:])


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("")), flags=re.MULTILINE)
    assert targets[:2] == ["train", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_file_tree_of_the_contributors_matches_the_disk() -> None:
    blocks_there = blocks("", (ROOT / "CONTRIBUTING.md").read_text())
    (tree,) = [block for block in blocks_there if block.startswith("src/deepeq/")]
    named = set(re.findall(r"(?<!\S)(\w+(?:\.py|/))(?=\s)", tree))
    inside = {path.name + ("/" if path.is_dir() else "") for path in (ROOT / "src" / "deepeq").iterdir()}
    assert named == inside - {"__init__.py", "__main__.py", "__pycache__/", "py.typed", "style.mplstyle"}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "recipes/README.md"])
def test_links_lead_to_files(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target
