"""What the benchmarks share, and the runs that they plan."""

import argparse
from dataclasses import replace
from pathlib import Path

import copy_memory
import pytest
import wikitext_103
from _report import command, markdown
from _runs import RECIPES, Planned, quality, train_all
from ptb import PLANS
from runtime import families, paired

from deepeq.train import load_config
from deepeq.train.config import EquilibriumConfig, save_config

ALL = [
    *(plan for plans in PLANS.values() for plan in plans),
    *(plan for plans in wikitext_103.PLANS.values() for plan in plans),
    *(plan for family in families().values() for plan in family.runs()),
]


@pytest.mark.parametrize("plan", ALL, ids=lambda plan: f"{plan.recipe}-{plan.name}")
def test_planned_run_is_that_of_its_recipe_but_for_the_depth(plan: Planned) -> None:
    recipe, config = load_config(RECIPES / f"{plan.recipe}.yaml"), plan.config()
    if plan.depth is None:
        assert config == recipe
    else:
        assert config.equilibrium == EquilibriumConfig()
        assert replace(config.model, depth=0) == recipe.model


def test_runs_that_are_compared_have_as_many_steps() -> None:
    for family in families().values():
        steps = {plan.options[plan.options.index("--train.steps") + 1] for plan in family.runs()}
        assert len(steps) == 1


def test_every_row_of_table_1_has_a_label_and_a_recipe() -> None:
    assert set(copy_memory.PAPER) == set(copy_memory.LABELS)
    for name in copy_memory.LABELS:
        for folder in (RECIPES, RECIPES / "two_cores"):
            task = load_config(folder / f"{name}.yaml").data.copy_memory
            assert (task.blank_len, task.num_train, task.num_test) == (400, 20_000, 2_000)


def test_folder_with_a_run_that_was_planned_differently_is_refused(tmp_path: Path) -> None:
    run = Planned(name="run", label="Run", recipe="two_cores/ptb_transformer", options=("--data.folder", "a b"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}")
    assert train_all([run], tmp_path, minutes=None)  # it was trained by hand: nothing says how
    save_config(run.config(), tmp_path / "run.yaml")
    (tmp_path / "run.options").write_text("\n".join(run.options))
    assert train_all([run], tmp_path, minutes=None)
    for other in (replace(run, options=()), replace(run, depth=3), replace(run, recipe="two_cores/ptb_trellisnet")):
        with pytest.raises(SystemExit, match="was planned differently"):
            train_all([other], tmp_path, minutes=None)


def test_command_repeats_what_was_chosen_and_hides_folders() -> None:
    arguments = argparse.Namespace(out=Path("x"), runs=Path("y"), size="paper", seeds=[0, 1], seed=0, only=[])
    arguments.minutes, arguments.quick = None, False
    shown = command("ptb", arguments, hidden=("runs",))
    assert shown == "deepeq bench ptb --out OUT --size paper --seeds 0 1 --seed 0"


def test_quality_is_a_perplexity_a_token_or_the_loss() -> None:
    assert quality({"perplexity": 120.0, "nll": 4.8}) == 120.0
    assert quality({"bits_per_character": 2.0}) == 4.0
    assert quality({"loss": 3e-6}) == 3e-6


def test_ratio_is_the_median_over_rounds_of_paired_times() -> None:
    assert paired([1.0, 9.0, 2.0], [2.0, 3.0, 4.0]) == 0.5


def test_table_is_markdown_with_four_digits() -> None:
    assert markdown(["a", "b"], [["x", 0.123456], [None, 7]]) == "| a | b |\n| --- | --- |\n| x | 0.1235 |\n|  | 7 |\n"
