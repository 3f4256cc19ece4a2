"""Recipes: YAML there and back, options of the command line, and the mistakes that are named."""

from dataclasses import replace
from pathlib import Path

import pytest

from deepeq import Anderson, Broyden
from deepeq.cli import main
from deepeq.models import TrellisConfig
from deepeq.train import (
    Constant,
    Cosine,
    Drops,
    EquilibriumConfig,
    Geometric,
    Linear,
    NonMonotone,
    Plateau,
    RunConfig,
    Schedule,
    load_config,
    recipe_parser,
    run_config,
    save_config,
)
from deepeq.train.recipe import RENAMED


def test_saved_configuration_reads_back_equal(config: RunConfig, tmp_path: Path) -> None:
    solver = Broyden(rtol=0.0, atol=1e-3, history_size=7, line_search_steps=2)
    config = replace(config, equilibrium=replace(config.equilibrium, solver=solver))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(),
        Linear(end=0.5),
        Geometric(start=10.0, end=1.0),
        Cosine(start=0.9, end=0.1),
        Drops(at=(0.25, 0.5, 0.75), multiplier=0.5),
        Plateau(patience=3, floor=0.01),
        NonMonotone(interval=10, at=(0.6,)),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_saved_schedules_read_back_equal(config: RunConfig, schedule: Schedule, tmp_path: Path) -> None:
    equilibrium = replace(
        config.equilibrium, jacobian_schedule=schedule, tolerance_schedule=schedule, step_limit_schedule=schedule
    )
    config = replace(config, optimizer=replace(config.optimizer, schedule=schedule), equilibrium=equilibrium)
    save_config(config, tmp_path / "config.yaml")
    assert f"class_path: deepeq.train.{type(schedule).__name__}" in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {learning_rate: 1}", "learning_rate"),
        ("equilibrium: {solver: {class_path: deepeq.Anderson, init_args: {max_step: 3}}}", "max_step"),
        ("equilibrium: {solver: {class_path: os.system, init_args: {command: 'touch hacked'}}}", "os.system"),
        ("train: {steps: many}", "many"),
        (
            "model: {layer: {class_path: deepeq.models.TransformerConfig, init_args: {d_model: 10}}}",
            "d_model=10 must be a multiple of num_heads=4, or head_dim be given\n",
        ),
        (
            "model: {layer: {class_path: deepeq.models.TrellisConfig, init_args: {d_hiden: 10}}}",
            "deepeq.models.TrellisConfig has no field 'd_hiden'; did you mean d_hidden?\n",
        ),
        (
            "optimizer: {schedule: {class_path: deepeq.train.Plateu}}",
            "optimizer.schedule='deepeq.train.Plateu' must be one of Constant, Linear, Geometric, Cosine, Drops, "
            "Plateau, NonMonotone\n",
        ),
        (
            "optimizer: {schedule: {class_path: deepeq.train.Plateau, init_args: {patient: 2}}}",
            "deepeq.train.Plateau has no field 'patient'; did you mean patience?\n",
        ),
        (
            "optimizer: {schedule: {class_path: deepeq.train.Plateau, init_args: {patience: -2, multiplier: 2}}}",
            "Plateau.multiplier=2.0 must lie in (0, 1); Plateau.patience=-2 must be a whole number >= 0\n",
        ),
        ("equilibrium: {tolerance_schedule: {class_path: deepeq.train.Geometric}}", "arguments are required: end\n"),
        ("just words", "just words"),
    ],
)
def test_mistake_in_a_recipe_is_named_and_exits_with_2(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match="recipe.yaml is not the configuration of a run"):
        load_config(tmp_path / "recipe.yaml")
    try:
        code = main(["train", "--config", "recipe.yaml"])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_options_of_a_default_solver_do_not_leak_into_another_class(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "equilibrium: {solver: {class_path: deepeq.Broyden, init_args: {max_steps: 20}}, "
        "backward_solver: {class_path: deepeq.Anderson}}"
    )
    equilibrium = load_config(tmp_path / "recipe.yaml").equilibrium
    assert equilibrium.solver == Broyden(max_steps=20)
    assert equilibrium.backward_solver == Anderson()
    assert equilibrium.eval_solver == EquilibriumConfig().with_defaults().eval_solver


def test_options_of_the_default_schedule_do_not_leak_into_another_class(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("optimizer: {schedule: {class_path: deepeq.train.Linear, init_args: {start: 0.5}}}")
    with pytest.raises(ValueError, match="required: end"):  # and not that of the default Cosine
        load_config(path)
    path.write_text("optimizer: {lr: 0.1}")
    assert load_config(path).optimizer.schedule == Cosine(end=0.05)


def test_options_of_the_default_layer_do_not_leak_into_another_class(tmp_path: Path) -> None:
    recipe = tmp_path / "trellis.yaml"
    recipe.write_text("model: {layer: {class_path: deepeq.models.TrellisConfig, init_args: {d_hidden: 192}}}\n")
    assert load_config(recipe).model.layer == TrellisConfig(d_hidden=192)  # normalizes weights, the default does not


def test_schedules_are_chosen_on_the_command_line() -> None:
    parsed = recipe_parser().parse_args(
        [
            *("--optimizer.schedule", "deepeq.train.Plateau", "--optimizer.schedule.patience", "2"),
            *("--equilibrium.tolerance_schedule", "Geometric", "--equilibrium.tolerance_schedule.start=10"),
            "--equilibrium.tolerance_schedule.end=1",
        ]
    )
    config = run_config(recipe_parser().instantiate(parsed))
    assert config.optimizer.schedule == Plateau(patience=2)
    assert config.equilibrium.tolerance_schedule == Geometric(start=10.0, end=1.0)


def test_configuration_of_a_run_that_was_cut_short_is_damaged(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(config, path)
    path.write_text(path.read_text().split("\ntrain:")[0] + "\n")
    load_config(path)  # a recipe may leave out what it likes
    with pytest.raises(ValueError, match="config.yaml is damaged: it lacks train, run"):
        load_config(path, complete=True)


@pytest.mark.parametrize("spelling", ["my.txt", "[my.txt]", "['my.txt']", '["my.txt"]'])
def test_one_file_may_be_spelled_in_any_way(spelling: str) -> None:
    parsed = recipe_parser().parse_args([f"--data.files={spelling}"])
    assert run_config(recipe_parser().instantiate(parsed)).data.files == ("my.txt",)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_name_of_version_0_1_gets_a_sentence_with_the_new_one(
    old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part, name = old.split(".")
    path = tmp_path / "recipe.yaml"
    sentence = f"{old} of version 0.1 is now called {new}; rename it"
    for value in ("0.5", "{class_path: deepeq.Broyden, init_args: {max_steps: 3}}"):
        path.write_text(f"{part}: {{{name}: {value}}}\n")
        with pytest.raises(ValueError, match=f"recipe.yaml is not the configuration of a run: {sentence}$"):
            load_config(path)
    for command in (["train", f"--{old}", "1"], ["train", "--config", str(path)], ["info", f"--{old}.max_steps=1"]):
        with pytest.raises(SystemExit, match="2"):
            main(command)
        assert f"{sentence}\n" in capsys.readouterr().err
