"""The benchmark of runtime, on tiny runs."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import runtime
from _runs import Planned

from deepeq import GMRES, Anderson, Broyden
from deepeq.data import DataConfig
from deepeq.models import ModelConfig, TransformerConfig
from deepeq.train import train
from deepeq.train.config import EquilibriumConfig, FolderConfig, OptimizerConfig, RunConfig, TrainConfig

EQUILIBRIUM = EquilibriumConfig(
    solver=Anderson(rtol=1e-2, max_steps=8),
    backward=GMRES(rtol=1e-1, max_steps=6),
    evaluation=Broyden(rtol=1e-3, max_steps=20, history_size=7),
    warm_up_share=0.3,
)
FAMILY = runtime.Family("tiny", "Transformer", ("two_cores/ptb_transformer", 24), {2: (), 4: ()}, 6, {"training": 2.82})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """What FAMILY plans, trained on other text and smaller."""
    (tmp_path / "fox.txt").write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 60)
    layer = TransformerConfig(d_model=16, num_heads=2, d_inner=32, memory_len=8)
    base = RunConfig(
        data=DataConfig(files=(str(tmp_path / "fox.txt"),)),
        model=ModelConfig(layer=layer),
        optimizer=OptimizerConfig(lr=1e-2, warm_up_steps=2),
        train=TrainConfig(steps=24, batch_size=4, segment_len=8, eval_batch_size=2, accelerator="cpu"),
    )
    for depth, name in ((2, "tiny_2_layers"), (4, "tiny_4_layers"), (0, "tiny_deq")):
        equilibrium = EquilibriumConfig() if depth else EQUILIBRIUM
        run = FolderConfig(dir=str(tmp_path / "runs" / name))
        train(replace(base, model=ModelConfig(layer=layer, depth=depth), equilibrium=equilibrium, run=run))
    return tmp_path / "runs"


def test_networks_take_turns_and_are_compared(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "families", lambda: {"tiny": FAMILY})
    out, options = tmp_path / "out", ["--rounds", "2", "--steps", "2", "--max_tokens", "100"]
    monkeypatch.setattr(sys, "argv", ["runtime", "--out", str(out), "--runs", str(runs), *options])
    runtime.main()
    family = json.loads((out / "runtime.json").read_text())["families"]["tiny"]
    networks = {network["depth"]: network for network in family["networks"]}
    assert list(networks) == [2, 4, 0, 6]
    assert all(len(network["step_seconds"]) == 2 for network in networks.values())
    assert "valid_perplexity" not in networks[6]
    rtols, limits = ("rtol=0.1", "rtol=0.01", "rtol=0.001"), ("12_plain_steps", "14_plain_steps", "16_plain_steps")
    assert tuple(networks[0]["inference"]) == rtols + limits
    assert networks[0]["solves"]["backward_steps"] > 0
    # Solves to a tighter tolerance take more steps.
    for settings in (rtols, limits):
        steps = [networks[0]["inference"][setting]["forward_steps"] for setting in settings]
        assert steps == sorted(steps)
    ratio = networks[0]["valid_perplexity"] / networks[4]["valid_perplexity"]
    assert family["against"]["4_layers"]["valid_perplexity_ratio"] == pytest.approx(ratio)
    gain = networks[4]["valid_perplexity"] / networks[2]["valid_perplexity"] - 1
    assert family["better_than_4_layers_by"]["2_layers"] == pytest.approx(gain)
    assert "training" in family["against"]["6_layers"]
    assert (out / "runtime.png").read_bytes().startswith(b"\x89PNG")


def test_plans_of_a_family_are_the_runs_that_are_compared() -> None:
    plans: list[Planned] = FAMILY.runs()
    assert [(plan.name, plan.depth) for plan in plans] == [
        ("tiny_2_layers", 2),
        ("tiny_4_layers", 4),
        ("tiny_deq", None),
    ]
