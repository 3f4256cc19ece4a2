"""The runs that benchmarks plan, and the tables of runs that are finished."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import copy_memory
import ptb
import pytest
import wikitext_103
from _harness import RECIPES, Benchmark
from _runs import Planned, add_options, quality, train_all
from runtime import families

from deepeq.train import EquilibriumConfig, load_config, save_config
from tests.benchmarks.conftest import Bench

ALL = [
    *(plan for plans in ptb.PLANS.values() for plan in plans),
    *(plan for plans in wikitext_103.PLANS.values() for plan in plans),
    *(plan for family in families().values() for plan in family.runs()),
]


def test_planned_runs_are_those_of_their_recipes_except_for_the_depth() -> None:
    assert all((RECIPES / f"{plan.recipe}.yaml").is_file() for plan in ALL)
    for plan in {plan.recipe: plan for plan in ALL if plan.depth is not None}.values():
        recipe, config = load_config(RECIPES / f"{plan.recipe}.yaml"), plan.config()
        assert config.equilibrium == EquilibriumConfig()
        assert config.model == replace(recipe.model, depth=plan.depth)


def test_runs_that_are_compared_have_as_many_steps() -> None:
    for family in families().values():
        steps = {plan.options[plan.options.index("--train.steps") + 1] for plan in family.runs()}
        assert len(steps) == 1


def test_every_row_of_table_1_has_a_label_and_a_recipe() -> None:
    assert set(copy_memory.PAPER) == set(copy_memory.LABELS)
    for name in copy_memory.LABELS:
        for folder in (RECIPES, RECIPES / "two_cores"):
            assert (folder / f"{name}.yaml").is_file()
        task = load_config(RECIPES / "two_cores" / f"{name}.yaml").data.copy_memory
        assert (task.blank_len, task.num_train, task.num_test) == (400, 20_000, 2_000)


def test_folder_with_a_run_that_was_planned_differently_is_refused(
    finished: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished({"run": "equilibrium"})
    benchmark = Benchmark("x", "")
    add_options(benchmark)
    monkeypatch.setattr("sys.argv", ["x", "--out", "unused", "--runs", str(folder)])
    benchmark.parse()
    run = Planned(name="run", label="Run", recipe="two_cores/ptb_transformer", options=("--data.folder", "a b"))
    assert train_all(benchmark, [run])[1]  # nothing says how it was planned
    save_config(run.config(), folder / "run.yaml")
    (folder / "run.options").write_text("\n".join(run.options))
    outcomes, complete = train_all(benchmark, [run])
    assert complete
    assert (outcomes[0].name, outcomes[0].label, outcomes[0].tokens) == ("run", "Run", 10 * 4 * 8)
    for other in (replace(run, options=()), replace(run, depth=3), replace(run, recipe="two_cores/ptb_trellisnet")):
        with pytest.raises(SystemExit, match="was planned differently"):
            train_all(benchmark, [other])


def test_quality_is_a_perplexity_per_token_or_the_loss() -> None:
    assert quality({"perplexity": 120.0, "nll": 4.8}) == 120.0
    assert quality({"bits_per_character": 2.0}) == 4.0
    assert quality({"loss": 3e-6}) == 3e-6


def test_comparison_reports_the_runs_that_are_finished(
    bench: Bench, finished: Callable[[dict[str, str]], Path]
) -> None:
    folder = finished({"transformer_deq": "equilibrium", "transformer_16_layers": "stack"})
    only = ("--only", "transformer_deq", "transformer_16_layers")
    result = bench(ptb, "--runs", folder, *only)
    assert result["finished"]
    assert list(result["models"]) == ["transformer_deq", "transformer_16_layers"]
    deq = result["models"]["transformer_deq"]
    assert deq["tokens"] == 320
    assert deq["valid_perplexity"] == pytest.approx(deq["validations"][-1]["perplexity"])
    assert "test_forward_steps" in deq
    assert "test_forward_steps" not in result["models"]["transformer_16_layers"]
    assert "| DEQ-Transformer |" in result["table"]
    with pytest.raises(SystemExit, match="ptb: 1 of 2 runs are finished; continue with the same command"):
        bench(ptb, "--runs", folder, "--only", "transformer_deq", "trellisnet_deq", "--minutes", 0)
    with pytest.raises(SystemExit, match="ptb: --only other is no run of --size two_cores: transformer_deq"):
        bench(ptb, "--runs", folder, "--only", "other")


def test_wikitext_103_says_what_is_missing(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="wikitext_103: 0 of 10 runs are finished"):
        bench(wikitext_103, "--runs", tmp_path / "none", "--minutes", 0)


def test_copy_memory_reports_the_four_networks(bench: Bench, finished: Callable[[dict[str, str]], Path]) -> None:
    result = bench(copy_memory, "--runs", finished(dict.fromkeys(copy_memory.LABELS, "copy_memory")))
    assert result["baseline_loss"] == pytest.approx(10 * 2.0794 / 420, rel=1e-4)  # ten digits of eight kinds
    assert {name: model["paper_loss"] for name, model in result["models"].items()} == copy_memory.PAPER
    assert result["models"]["copy_memory_lstm"]["sequences"] == 10 * 4 * 23 // 420
    with pytest.raises(SystemExit, match="copy_memory: 0 of 4 runs are finished"):
        bench(copy_memory, "--minutes", 0)
