"""Configuration: YAML there and back, and every recipe."""

from dataclasses import replace
from pathlib import Path

import pytest

from deepeq import Anderson, Broyden
from deepeq.cli import _parser, main
from deepeq.train.config import (
    EquilibriumConfig,
    FolderConfig,
    OptimizerConfig,
    RunConfig,
    load_config,
    run_config,
    save_config,
)


def test_saved_configuration_reads_back_equal(config: RunConfig, tmp_path: Path) -> None:
    solver = Broyden(rtol=0.0, atol=1e-3, history_size=7, line_search_steps=2)
    config = replace(config, equilibrium=replace(config.equilibrium, solver=solver))
    save_config(config, tmp_path / "config.yaml")
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
            "Problem with given class_path 'deepeq.models.TrellisConfig': Option 'd_hiden' is not accepted\n",
        ),
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


def test_mistakes_of_one_part_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"optimizer.lr=0.0 must be > 0 and finite; optimizer.min_lr_share=2.0"):
        OptimizerConfig(lr=0.0, min_lr_share=2.0)
    with pytest.raises(ValueError, match=r"equilibrium.warm_up_share=1.0 .*; equilibrium.warm_up_depth=0"):
        EquilibriumConfig(warm_up_share=1.0, warm_up_depth=0)
    with pytest.raises(ValueError, match=r"equilibrium.subsequence_len=4 solves several maps"):
        EquilibriumConfig(subsequence_len=4, jacobian_weight=0.1)
    with pytest.raises(ValueError, match=r"run.resume=True needs run.dir"):
        FolderConfig(resume=True)


def test_options_of_a_default_solver_do_not_leak_into_another_class(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "equilibrium: {solver: {class_path: deepeq.Broyden, init_args: {max_steps: 20}}, "
        "backward: {class_path: deepeq.Anderson}}"
    )
    equilibrium = load_config(tmp_path / "recipe.yaml").equilibrium
    assert equilibrium.solver == Broyden(max_steps=20)
    assert equilibrium.backward == Anderson()
    assert equilibrium.evaluation == EquilibriumConfig().with_defaults().evaluation


def test_configuration_of_a_run_that_was_cut_short_is_damaged(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(config, path)
    path.write_text(path.read_text().split("\ntrain:")[0] + "\n")
    load_config(path)  # a recipe may leave out what it likes
    with pytest.raises(ValueError, match="config.yaml is damaged: it lacks train, run"):
        load_config(path, complete=True)


@pytest.mark.parametrize("spelling", ["my.txt", "[my.txt]", "['my.txt']", '["my.txt"]'])
def test_one_file_may_be_spelled_in_any_way(spelling: str) -> None:
    parsed = _parser().parse_args(["train", f"--data.files={spelling}"])
    assert run_config(_parser().instantiate(parsed).train).data.files == ("my.txt",)
