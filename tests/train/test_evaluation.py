"""Evaluation: every option changes the computation, and the default is what training measured."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from deepeq import Anderson, Broyden
from deepeq.cli import main
from deepeq.train import (
    EvaluationOptions,
    RunConfig,
    evaluate,
    evaluate_run,
    load_config,
    quality_metrics,
    read_metrics,
)
from deepeq.train.evaluation import Averages
from tests.train.conftest import make_trainer, train, with_run, with_train

Measure = Callable[..., dict[str, Any]]

EXACT = {"rtol": 1e-5, "max_steps": 300}

RECIPES = {
    "transformer": "model: {layer: {class_path: deepeq.models.TransformerConfig, "
    "init_args: {d_model: 16, num_heads: 2, d_inner: 32, memory_len: 8}}}\n",
    "trellis": "model: {layer: {class_path: deepeq.models.TrellisConfig, "
    "init_args: {d_input: 8, d_hidden: 12, d_output: 8}}}\nequilibrium: {piece_len: 3}\n",
    "lstm": "model: {layer: {class_path: deepeq.models.RecurrentConfig, init_args: {d_input: 8, d_hidden: 8}}, "
    "depth: 2, tied: false}\n",
    "copy": "data: {corpus: copy_memory, copy_memory: {blank_len: 5, num_train: 8, num_test: 6}}\n"
    "model: {layer: {class_path: deepeq.models.TransformerConfig, "
    "init_args: {d_model: 16, num_heads: 2, d_inner: 32, memory_len: 0}}}\n",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog.\n" * 22)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    """A finished run of each kind, without its figures."""
    folder = tmp_path_factory.mktemp("runs")
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(recipe if name == "copy" else f"data: {{files: ['{text}']}}\n{recipe}")
        length = {"segment_len": 25} if name == "copy" else {"segment_len": 8, "eval_segment_len": 6}
        config = with_train(load_config(folder / f"{name}.yaml"), steps=2, batch_size=4, eval_batch_size=2, **length)
        train(with_run(config, dir=str(folder / name)))
    return {name: folder / name for name in RECIPES}


@pytest.fixture(scope="module")
def measure(runs: dict[str, Path]) -> Measure:
    return cache(lambda name, **options: evaluate_run(runs[name], EvaluationOptions(**options)))


@pytest.mark.parametrize(("name", "split"), [("transformer", "valid"), *((name, "test") for name in RECIPES)])
def test_default_is_what_training_measured(measure: Measure, runs: dict[str, Path], name: str, split: str) -> None:
    values = measure(name, split=split)
    rows = [row for row in read_metrics(runs[name] / "metrics.jsonl") if row["split"] == split]
    row = min(rows, key=lambda row: row["nll"])
    shared = set(row) & set(values) - {"seconds", "split"}
    assert shared >= {"nll", "num_tokens", "loss" if name == "copy" else "bits_per_character"}
    assert ("forward_residual" in shared) == (name != "lstm")
    for key in shared:
        assert values[key] == pytest.approx(row[key], rel=1e-6), key
    assert (values["segment_len"], values["batch_size"]) == ((25, 2) if name == "copy" else (6, 2))


def test_command_takes_every_option_and_its_last_line_is_what_was_used(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"split": "valid", "batch_size": 1, "segment_len": 9, "memory_len": 3, "piece_len": 4}
    of_solver = {"rtol": 0.01, "atol": 0.5, "max_steps": 7}
    given = [f"--{name}={value}" for name, value in (options | of_solver).items()]
    solver = ["--solver", "Anderson", "--solver.history_size", "5", "--device", "cpu"]
    assert main(["eval", "--run", str(runs["transformer"]), *given, *solver]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: values[name] for name in options} == options
    own = {"name": "Anderson", "min_steps": 0, "history_size": 5, "projection": "mixed", "ridge": 0.0, "damping": 0.0}
    assert values["solver"] == of_solver | own
    assert values["device"] == "cpu"
    assert values["num_params"] > 0
    assert values["seconds"] > 0


def test_tighter_tolerance_takes_more_steps_to_a_smaller_residual(measure: Measure) -> None:
    loose, tight = measure("transformer", rtol=0.1), measure("transformer", **EXACT)
    assert tight["forward_steps"] > loose["forward_steps"] + 2
    assert tight["forward_residual"] <= 1e-5 < loose["forward_residual"] <= 0.1
    assert tight["forward_unconverged"] == 0


def test_absolute_tolerance_and_step_limit_stop_a_solve(measure: Measure) -> None:
    assert measure("transformer", atol=1000.0)["forward_steps"] == 1
    limited = measure("transformer", max_steps=2, rtol=1e-6)
    assert limited["forward_steps"] == 2
    assert limited["forward_unconverged"] == 1


def test_another_solver_finds_the_same_equilibrium_on_its_own_way(measure: Measure) -> None:
    broyden, anderson = measure("trellis", solver=Broyden(), **EXACT), measure("trellis", **EXACT)
    assert (broyden["solver"]["name"], anderson["solver"]["name"]) == ("Broyden", "Anderson")
    assert anderson["forward_steps"] != broyden["forward_steps"]
    assert anderson["forward_unconverged"] == broyden["forward_unconverged"] == 0
    assert anderson["nll"] == pytest.approx(broyden["nll"], rel=1e-5)


def test_memory_changes_the_loss_and_is_told(measure: Measure) -> None:
    same, none, default = (
        measure("transformer", memory_len=8),
        measure("transformer", memory_len=0),
        measure("transformer", split="test"),
    )
    assert [values["memory_len"] for values in (same, none, default)] == [8, 0, 8]
    assert same["nll"] == default["nll"] != none["nll"]
    assert measure("trellis", split="test")["memory_len"] is None


@pytest.mark.parametrize("pieces", [{"segment_len": 5}, {"segment_len": 20, "piece_len": 7}])
def test_with_a_memory_of_everything_the_pieces_do_not_matter(measure: Measure, pieces: dict[str, int]) -> None:
    whole = measure("transformer", memory_len=1000, segment_len=40, **EXACT)
    parts = measure("transformer", memory_len=1000, **EXACT, **pieces)
    assert parts["forward_steps"] != whole["forward_steps"]
    assert parts["nll"] == pytest.approx(whole["nll"], rel=1e-4)


def test_subsequence_of_zero_solves_a_segment_as_a_whole(measure: Measure) -> None:
    whole, pieces = measure("trellis", piece_len=0), measure("trellis", split="test")
    assert (whole["piece_len"], pieces["piece_len"]) == (None, 3)
    assert whole["forward_steps"] > pieces["forward_steps"]


def test_batch_size_decides_how_many_tokens_nothing_precedes(measure: Measure, text: Path) -> None:
    length = len(text.read_text())
    test = length - length * 9 // 10
    for batch_size in (1, 3):
        expected = batch_size * (test // batch_size - 1)
        assert measure("lstm", batch_size=batch_size)["num_tokens"] == expected


def test_explicit_network_has_no_solver(measure: Measure) -> None:
    assert measure("lstm", split="test")["solver"] is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lstm", {"rtol": 0.1, "max_steps": 3}, r"rtol, max_steps cannot be chosen: .*lstm is an explicit network"),
        ("lstm", {"solver": Anderson()}, "solver cannot be chosen"),
        ("lstm", {"piece_len": 0}, "piece_len cannot be chosen"),
        ("lstm", {"memory_len": 3}, "memory_len=3 is of Transformers"),
        ("trellis", {"memory_len": 0}, "memory_len=0 is of Transformers"),
        ("copy", {"memory_len": 3}, "memory_len=3 changes nothing"),
        ("copy", {"segment_len": 8}, "segment_len must be 25"),
        ("trellis", {"rtol": -1.0}, "rtol=-1.0 of Anderson must be a finite number >= 0"),
        ("trellis", {"rtol": 0.0}, "rtol and atol of Anderson are both 0"),
        ("trellis", {"max_steps": -1}, "max_steps=-1 of Anderson must be a whole number >= 0"),
        (
            "trellis",
            {"memory_len": -1, "batch_size": 0},
            "batch_size=0 must be a whole number >= 1; memory_len=-1 must be",
        ),
        ("trellis", {"segment_len": 0, "piece_len": -3}, "segment_len=0 must be a whole number >= 1; piece_len"),
        ("trellis", {"batch_size": 100_000}, "too short for batch_size=100000"),
    ],
)
def test_option_that_does_not_fit_is_named(measure: Measure, name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        measure(name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rtol", "-1"], "rtol=-1.0 of Anderson must be"),
        (["--solver", "Anderson", "--solver.ridge", "2"], "ridge=2.0 of Anderson must lie in"),
        (["--solver", "os.system"], "solver"),
        (["--max_steps", "many"], "max_steps"),
    ],
)
def test_mistake_exits_with_2_and_without_a_traceback(
    runs: dict[str, Path], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["eval", "--run", str(runs["transformer"]), *options])
    except SystemExit as stop:  # from the parser
        code = stop.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert message in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="device='cuda' finds no CUDA device"):
        EvaluationOptions(device="cuda")


def test_quality_is_what_the_field_reports() -> None:
    assert quality_metrics("character", math.log(8)) == pytest.approx({"bits_per_character": 3.0})
    assert quality_metrics("word", math.log(8)) == pytest.approx({"perplexity": 8.0})
    expected = {"perplexity": 8.0, "bits_per_byte": 0.75}
    assert quality_metrics("bpe", math.log(8), bytes_per_token=4.0) == pytest.approx(expected)
    assert quality_metrics("symbol", 0.5) == {"loss": 0.5}


def test_means_are_weighted_and_maxima_kept() -> None:
    averages = Averages()
    averages.add("nll", torch.tensor(1.0), 3)
    averages.add("nll", torch.tensor(5.0), 1)
    for value in (2.0, 7.0, 4.0):
        averages.add_max("residual", torch.tensor(value))
    assert averages.compute() == pytest.approx({"nll": 2.0, "residual": 7.0})


def test_restored_averages_go_on_exactly() -> None:
    averages, other = Averages(), Averages()
    averages.add("nll", torch.tensor(0.1), 3)
    averages.add_max("residual", torch.tensor(0.1, dtype=torch.float64) / 3)
    other.restore(json.loads(json.dumps(averages.state())))
    assert other.compute() == averages.compute()


def test_evaluation_weights_every_token_alike(config: RunConfig) -> None:
    trainer = make_trainer(config)
    stream = trainer.batches["valid"]
    lengths = {targets.shape[1] for _, targets in stream}
    assert len(lengths) == 2  # the last segment is shorter
    values, memory, total = evaluate(trainer.model, stream), None, 0.0
    for tokens, targets in stream:
        output = trainer.model(tokens, memory)
        memory = output.memory
        picked = output.logits.log_softmax(dim=-1).gather(2, targets.unsqueeze(2))
        total -= float(picked.sum().detach())
    assert values["num_tokens"] == sum(targets.numel() for _, targets in stream)
    assert values["nll"] == pytest.approx(total / values["num_tokens"], rel=1e-5)


def test_changed_text_is_noticed_before_evaluation(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.txt"
    own.write_text("abcdefgh " * 200)
    config = replace(config, data=replace(config.data, files=(str(own),)))
    train(with_train(config, steps=1))
    own.write_text("ABCDEFGH " * 200)
    assert main(["eval", "--run", str(config.run.dir)]) == 2
    assert "has changed" in capsys.readouterr().err
