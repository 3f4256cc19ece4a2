from collections.abc import Callable
from typing import Any


def test_a_label_travels_further_than_layers_reach(run_example: Callable[..., dict[str, Any]]) -> None:
    record = run_example("graph_chains")
    implicit, two, _ = record["rows"]
    assert implicit["mean"] > 65.0  # chains of 10 nodes, 60 steps of training
    assert two["mean"] < 60.0  # two hops, and guessing
    assert 0.8 < implicit["parameters"] / two["parameters"] < 1.2
    assert record["details"]["ragged_and_coupled_differ_by"] < 1e-4  # ragged and coupled solves
