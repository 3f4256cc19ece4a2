from collections.abc import Callable
from typing import Any

import pytest


def test_a_short_run_follows_both_networks_beyond_training(run_example: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("skimage")
    record = run_example("inverse_problem")
    equilibrium, unrolled, variation = record["rows"]
    seen = record["details"]["curves"]["equilibrium"][0][0]
    assert unrolled["mean"] > seen + 1.0  # the step towards the data sharpens even with a network that learned little
    assert variation["mean"] > seen + 1.0
    assert equilibrium["parameters"] == unrolled["parameters"]
    assert {len(curves[0]) for curves in record["details"]["curves"].values()} == {101}
