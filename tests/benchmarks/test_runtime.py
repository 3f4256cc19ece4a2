"""The benchmark of runtime, on tiny runs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import runtime

from tests.benchmarks.conftest import Bench

FAMILY = runtime.Family("tiny", "Transformer", ("two_cores/ptb_transformer", 24), {4: ()}, 6, {"training": 2.82})


def test_networks_take_turns_and_are_compared(
    bench: Bench, finished: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "families", lambda: {"tiny": FAMILY})
    runs = finished({"tiny_4_layers": "stack", "tiny_deq": "equilibrium"})
    result = bench(runtime, "--runs", runs, "--rounds", 2, "--steps", 2, "--max_tokens", 100)
    family = result["families"]["tiny"]
    networks = {network["depth"]: network for network in family["networks"]}
    assert list(networks) == [4, 0, 6]
    assert all(len(network["step_seconds"]) == 2 for network in networks.values())
    assert "valid_perplexity" not in networks[6]
    rtols, limits = ("rtol=0.1", "rtol=0.01", "rtol=0.001"), ("12_plain_steps", "14_plain_steps", "16_plain_steps")
    assert tuple(networks[0]["inference"]) == rtols + limits
    assert networks[0]["solves"]["backward_steps"] > 0
    assert "forward_steps" not in networks[6]["solves"]
    for settings in (rtols, limits):
        steps = [networks[0]["inference"][setting]["forward_steps"] for setting in settings]
        assert steps == sorted(steps)
    ratio = networks[0]["valid_perplexity"] / networks[4]["valid_perplexity"]
    assert family["against"]["4_layers"]["valid_perplexity_ratio"] == pytest.approx(ratio)
    assert family["better_than_4_layers_by"] == {"4_layers": 0.0}
    assert "training" in family["against"]["6_layers"]
    assert "6 layers, not trained" in result["table"]


def test_ratios_are_paired_by_round() -> None:
    settings = {"a": {"seconds": [2.0, 9.0, 4.0], "perplexity": 6.0}}
    deq = {"step_seconds": [1.0, 2.0, 3.0], "inference": settings, "valid_perplexity": 5.0}
    whole = {"": {"seconds": [1.0, 3.0, 4.0], "perplexity": 3.0}}
    stack = {"step_seconds": [1.0, 1.0, 1.0], "inference": whole, "valid_perplexity": 4.0}
    assert runtime.versus(deq, stack) == {
        "training": 2.0,
        "inference": {"a": {"ratio": 2.0, "perplexity_ratio": 2.0}},
        "valid_perplexity_ratio": 1.25,
    }


def test_plans_of_a_family_are_the_runs_that_are_compared() -> None:
    plans = [(plan.name, plan.depth) for plan in FAMILY.runs()]
    assert plans == [("tiny_4_layers", 4), ("tiny_deq", None)]
