"""The ablation: its plan, and what it counts."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ablation
import pytest
import torch

from deepeq.train import RunConfig, recipe_parser, run_config, save_config
from tests.benchmarks.conftest import Bench

OWN_FIELDS = {"run.name", "run.dir"}


def configuration(variant: ablation.Variant, folder: Path) -> RunConfig:
    """The configuration that `deepeq train` makes of a planned run."""
    plan, parser = variant.planned(seed=3, steps=80), recipe_parser()
    recipe = folder / f"{plan.name}.yaml"
    save_config(plan.config(), recipe)
    return run_config(parser.instantiate(parser.parse_args(["--config", str(recipe), *plan.options])))


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: leaf for part, inner in value.items() for key, leaf in flat(inner, f"{name}.{part}".strip(".")).items()
    }


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All settings of each variant, by its name."""
    folder = tmp_path_factory.mktemp("plan")
    return {variant.name: flat(asdict(configuration(variant, folder))) for variant in ablation.VARIANTS}


@pytest.mark.parametrize("variant", ablation.VARIANTS, ids=lambda variant: variant.name)
def test_variant_differs_from_its_base_in_the_setting_of_its_option(
    variant: ablation.Variant, fields: dict[str, dict[str, Any]]
) -> None:
    own, base = fields[variant.name], fields[variant.base]
    changed = {name for name in own.keys() | base.keys() if own.get(name) != base.get(name)} - OWN_FIELDS
    assert changed == (
        {variant.option.split()[0].removeprefix("--").replace("init_args.", "")} if variant.option else set()
    )
    assert (variant.remark == "") == (variant.name == variant.base)
    assert (own["train.seed"], own["train.steps"]) == (3, 80)


def test_every_remark_is_looked_at() -> None:
    names = {variant.name for variant in ablation.VARIANTS}
    assert len(names) == len(ablation.VARIANTS)
    assert names > set(ablation.IMBALANCE_OF)
    assert {variant.remark for variant in ablation.VARIANTS} - {""} == set(ablation.REMARKS) - {"imbalance"}


def test_imbalance_counts_what_waiting_samples_cost() -> None:
    found = ablation.imbalance(torch.tensor([[2, 4, 4], [3, 3, 3]]))
    # The first batch makes 4 evaluations of 3 samples, of which 2 are of the sample that is done after 2.
    assert found.idle == pytest.approx(2 / (12 + 9))
    assert found.mean_steps == pytest.approx(19 / 6)
    assert found.fewest_over_most == pytest.approx((2 / 4 + 1) / 2)
    assert found.mean_deviation == pytest.approx((8 / 9) ** 0.5 / 2)


def test_quarters_are_those_after_the_pretraining() -> None:
    steps = [25, 30, 35, 40, 45, 50, 55, 60]
    assert ablation.quarters(steps, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]) == [1.5, 3.5, 5.5, 7.5]


def test_seeds_are_averaged_and_the_worst_residual_is_the_worst() -> None:
    runs = [
        {"seed": 0, "valid_bits_per_character": 2.0, "worst_forward_residual": 0.1, "forward_steps": [4.0, 8.0]},
        {"seed": 5, "valid_bits_per_character": 4.0, "worst_forward_residual": 0.3, "forward_steps": [6.0, 8.0]},
    ]
    found = ablation.merged(runs)
    assert found["valid_bits_per_character"] == 3.0
    assert found["valid_bits_per_character_deviation"] == pytest.approx(2.0**0.5)
    assert (found["worst_forward_residual"], found["forward_steps"]) == (0.3, [5.0, 8.0])
    assert found["seeds"] == [0, 5]


def test_variants_are_described_after_their_training(
    bench: Bench, finished: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "LOG_EVERY", 1)  # as in the runs
    kinds = {"transformer": "equilibrium", "trellisnet": "pieces", "stack": "stack"}
    names = ("transformer", "dropout", "trellisnet", "whole", "stack", "auxiliary")
    variants = [variant for variant in ablation.VARIANTS if variant.name in names]
    monkeypatch.setattr(ablation, "VARIANTS", variants)
    planned = {variant.planned(seed=0, steps=12).name: kinds[variant.base] for variant in variants}
    result = bench(ablation, "--runs", finished(planned), "--steps", 12)
    rows = result["variants"]
    assert result["finished"]
    assert list(rows) == [variant.name for variant in variants]
    base = rows["transformer"]
    assert base["curve"]["step"] == [4, 5, 6, 7, 8, 9, 10]  # the first three are pretraining
    assert len(base["forward_steps"]) == len(base["backward_steps"]) == 4
    for name in ("transformer", "whole"):
        found = rows[name]["tolerance_of_evaluation"]
        assert found["mean_steps"] == pytest.approx(torch.tensor(found["num_steps"]).double().mean())
        assert 0.0 <= found["idle"] < 1.0
    assert base["tolerance_of_evaluation"]["mean_steps"] > base["tolerance_of_training"]["mean_steps"]
    assert rows["dropout"]["steps_with_masks"] == rows["dropout"]["steps_without_masks"]  # these runs have no dropout
    assert 0.0 < rows["stack"]["last_layer_residual"] < 1.0
    assert rows["stack"]["passes"] == 8.0
    assert "8 layers: base: the last layer changes the state by" in result["table"]


def test_runs_that_are_missing_are_counted(bench: Bench) -> None:
    with pytest.raises(SystemExit, match="ablation: 0 of 10 runs are finished; continue with the same command"):
        bench(ablation, "--minutes", 0)


def test_steps_that_quarters_do_not_divide_are_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench(ablation, "--steps", 50)
    assert "--steps 50 must be a multiple of 20, at least 40" in capsys.readouterr().err
