"""Recipes: each describes a run, has a small variant, and is of the size that the paper states."""

from functools import cache
from pathlib import Path

import pytest

from deepeq.train import describe_model, load_config

FOLDER = Path(__file__).parents[1] / "recipes"
PAPER_SIZE = sorted(FOLDER.glob("*.yaml"))
SMALL = sorted((FOLDER / "two_cores").glob("*.yaml"))

# Parameters, and those without embedding, in Bai, Kolter, Koltun (2019), tables 1 to 3; table 1 has the former alone.
PUBLISHED_SIZES = {
    "copy_memory": (14e3, None),
    "copy_memory_tcn": (16e3, None),
    "copy_memory_lstm": (14e3, None),
    "copy_memory_gru": (14e3, None),
    "ptb_trellisnet": (24e6, 20e6),
    "ptb_trellisnet_60_layers": (24e6, 20e6),
    "wikitext103_trellisnet": (180e6, 45e6),
    "wikitext103_trellisnet_70_layers": (180e6, 45e6),
    "wikitext103_trellisnet_70_layers_checkpointing": (180e6, 45e6),
    "wikitext103_transformer_medium": (172e6, 43e6),
    "wikitext103_transformer_adaptive": (110e6, 70e6),
    "wikitext103_transformer_small": (138e6, 4.5e6),
    "wikitext103_transformer_tied_16_layers": (138e6, 4.5e6),
    "wikitext103_transformer_xl_16_layers": (165e6, 44e6),
    "wikitext103_transformer_xl_18_layers_adaptive": (110e6, 72e6),
    "wikitext103_transformer_xl_4_layers": (139e6, 4.9e6),
}
EXPLICIT_COUNTERPARTS = [
    ("wikitext103_trellisnet", "wikitext103_trellisnet_70_layers"),
    ("wikitext103_trellisnet", "wikitext103_trellisnet_70_layers_checkpointing"),
    ("wikitext103_transformer_small", "wikitext103_transformer_tied_16_layers"),
]

load = cache(load_config)


@pytest.mark.parametrize("recipe", PAPER_SIZE + SMALL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_describes_a_run_of_its_own_name(recipe: Path) -> None:
    assert load(recipe).run.name == recipe.stem


def test_every_row_of_the_paper_has_a_recipe_and_a_small_variant() -> None:
    assert {path.stem for path in PAPER_SIZE} - {"quickstart"} == set(PUBLISHED_SIZES)
    assert {path.stem for path in SMALL} >= set(PUBLISHED_SIZES)


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_small_variant_is_a_network_of_the_same_kind(name: str) -> None:
    model, small = (load(folder / f"{name}.yaml").model for folder in (FOLDER, FOLDER / "two_cores"))
    assert type(small.layer) is type(model.layer)
    for field in ("depth", "tied", "checkpoint", "auxiliary_every"):
        assert getattr(small, field) == getattr(model, field), field
    assert small.vocabulary.div_val == model.vocabulary.div_val


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_model_is_of_the_size_that_the_paper_states(name: str) -> None:
    sizes = describe_model(load(FOLDER / f"{name}.yaml"))
    num_params, num_params_non_embedding = PUBLISHED_SIZES[name]
    assert sizes["num_params"] == pytest.approx(num_params, rel=0.03)
    if num_params_non_embedding is not None:
        assert sizes["num_params_non_embedding"] == pytest.approx(num_params_non_embedding, rel=0.03)


@pytest.mark.parametrize(("equilibrium", "explicit"), EXPLICIT_COUNTERPARTS)
def test_tied_counterpart_has_the_cell_and_the_vocabulary_of_the_equilibrium(equilibrium: str, explicit: str) -> None:
    models = [load(FOLDER / f"{name}.yaml").model for name in (equilibrium, explicit)]
    assert models[0].layer == models[1].layer
    assert models[0].vocabulary == models[1].vocabulary
