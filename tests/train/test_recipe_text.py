"""What a recipe may hold, and that hostile ones are refused at once."""

import time
from pathlib import Path

import pytest

from deepeq.cli import main
from deepeq.train.recipe import load_config
from deepeq.train.recipe_text import check, check_file

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
ALIASES = "a: &a [l,l,l,l,l,l,l,l,l]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_passes(path: Path) -> None:
    check_file(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "train:\n  steps: 1\nrun: {}\ntrain:\n  seed: 1\n",
            "line 4: train is there twice, first in line 1",
        ),
        ("train:\n  steps: 10\n  seed: 1\n  steps: 20\n", "line 4: steps is there twice, first in line 2"),
        ("model:\n  layer:\n    init_args: {d_model: 16, d_model: 32}\n", "line 3: d_model is there twice"),
        (ALIASES, r"line \d+: a recipe has at most 5,000 values, aliases expanded"),
        ("train: " + "{a: " * 2000 + "1" + "}" * 2000, "line 1: values are nested more than 20 deep"),
        ("train: {steps: 010}", "line 1: 010 would be read as a number in base 8 or 60"),
        ("train: {steps: 1:30}", "line 1: 1:30 would be read as a number in base 8 or 60"),
        ("train: !!set {a, b}", "line 1: set is a type that no field takes"),
        ("train: !!binary aGVsbG8=", "line 1: binary is a type that no field takes"),
        ("train: !!python/object/apply:os.system [ls]", "line 1: .* is a type that no field takes"),
        ("train:\n  steps:\n  seed: 1\n", "line 2: steps has no value"),
        ("model: {layer: {init_args: {d_model: , num_heads: 2}}}", "line 1: d_model has no value"),
        ("? [a, b]\n: 1\n", "line 1: a name must be text"),
        ("train: {steps: 10\n", "line 2: .*mend the YAML"),
        ("a: " + "x" * 300_000, "line 1: a recipe has at most 200,000 characters"),
        ("a: &a [*a]\n", r"line 1: values are nested more than 20 deep, aliases"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_text_that_would_be_misread_or_would_hang_is_refused_in_a_second(text: str, sentence: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=sentence):
        check(text)
    assert time.perf_counter() - start < 1.0


def test_the_command_and_a_run_folder_name_the_file_and_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train:\n  steps: 10\ntrain:\n  seed: 1\n")
    assert main(["info", "--config", str(path)]) == 2
    assert main(["info", f"--config={path}"]) == 2
    assert capsys.readouterr().err.count(f"{path}, line 3: train is there twice") == 2
    with pytest.raises(ValueError, match="line 3: train is there twice"):
        load_config(path)
    path.write_bytes(b"train:\n  steps: \xff\n")
    assert main(["info", "--config", str(path)]) == 2
    assert "is not UTF-8 text at byte 16" in capsys.readouterr().err
