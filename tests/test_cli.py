"""The command `deepeq`: what its commands print, and the mistakes that they name."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepeq.cli import main
from deepeq.train import FolderConfig, RunFolder, load_config, open_model, train
from deepeq.train.pretrained import save_model

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 30


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a very short run on characters or on words."""
    text_file = tmp_path_factory.mktemp("text") / "fox.txt"
    text_file.write_text(TEXT)
    made: dict[str, Path] = {}

    def make(unit: str) -> Path:
        if unit not in made:
            path = tmp_path_factory.mktemp(unit)
            (path / "recipe.yaml").write_text(
                f"data: {{files: ['{text_file}'], unit: {unit}}}\n"
                "model: {layer: {class_path: deepeq.models.TransformerConfig, "
                "init_args: {d_model: 16, num_heads: 2, d_inner: 32, memory_len: 8}}}\n"
                "train: {steps: 2, batch_size: 4, segment_len: 8, eval_batch_size: 2, accelerator: cpu}\n"
            )
            config = load_config(path / "recipe.yaml")
            train(replace(config, run=FolderConfig(dir=str(path / "run"))), extras=False)
            made[unit] = path / "run"
        return made[unit]

    return make


def test_generate_streams_one_prompt_as_text(
    make_run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    texts, run = [], str(make_run("character"))
    capsys.readouterr()
    for options in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--seed", "1", "--top_p", "0.3"]):
        assert main(["generate", "--run", run, "--prompt", "the quick", "--num_tokens", "20", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert texts[0].startswith("the quick")
    assert len(texts[0]) == len("the quick") + 20 + 1


def test_generate_prints_many_prompts_as_lines_of_json(
    make_run: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, file = str(make_run("word")), tmp_path / "prompts.txt"
    file.write_text("the dog\n\nthe quick brown fox jumps over the lazy dog, and the dog\n")
    capsys.readouterr()
    command = ["generate", "--run", run, "--num_tokens", "5", "--prompts_file", str(file), "--memory_len", "30"]
    assert main([*command, "--prompt", "fox", "a zebra sleeps", "--prompt", "the"]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    prompts = ["fox", "a zebra sleeps", "the", "the dog", "the quick brown fox jumps over the lazy dog, and the dog"]
    assert [line["prompt"] for line in lines] == prompts
    assert captured.err == "deepeq: 2 of 19 words are unknown to the model, which reads <unk>\n"
    assert all(line["continuation"] for line in lines)
    assert main(["generate", "--run", run, "--num_tokens", "5", "--prompt", "the"]) == 0
    assert len(capsys.readouterr().out.split()) >= 1
    file.write_text("the\n")
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "the"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is no prompt; give at least one"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--top_p", "0"], "top_p=0.0 must lie in (0, 1]"),
        (["--prompt", "a", "--top_k", "-1"], "top_k=-1 must be a whole number >= 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0 must be >= 0"),
        (["--prompt", "a", "--memory_len", "-1"], "memory_len=-1 must be a whole number >= 0"),
        (["--prompts_file", "nowhere.txt"], "nowhere.txt"),
        (["--prompts_file", sys.executable], "is not text in UTF-8"),
    ],
)
def test_generate_refuses_mistakes_in_one_sentence(
    make_run: Callable[[str], Path], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(make_run("character"))
    capsys.readouterr()
    assert main(["generate", "--run", run, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_eval_agrees_with_the_result_of_training(
    make_run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    finished = make_run("character")
    capsys.readouterr()
    assert main(["eval", "--run", str(finished), "--split", "test"]) == 0
    values = json.loads(capsys.readouterr().out)
    result = json.loads((finished / "result.json").read_text())
    assert values["bits_per_character"] == pytest.approx(result["test_bits_per_character"], rel=1e-6)
    assert values["num_tokens"] == result["test_num_tokens"]
    assert main(["eval", "--run", str(finished), "--split", "valid", "--batch_size", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "valid"


@pytest.mark.parametrize("command", ["eval", "plot", "generate"])
def test_folder_without_a_run_exits_with_2_and_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--prompt", "a"] if command == "generate" else []
    assert main([command, "--run", str(tmp_path / "nowhere"), *extra]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert "nowhere" in captured.err


def test_damaged_parameters_fail_the_command_with_one_sentence(
    make_run: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = RunFolder(Path(shutil.copytree(make_run("character"), tmp_path / "run")))
    trained = open_model(folder.path)
    with torch.no_grad():
        trained.model.embedding.tables[0].fill_(math.nan)
    save_model(folder.best, trained)
    capsys.readouterr()
    for command in (["eval"], ["generate", "--prompt", "a"]):
        assert main([*command, "--run", str(folder.path)]) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
