from collections.abc import Callable
from typing import Any


def test_a_short_run_searches_with_each_network(run_example: Callable[..., dict[str, Any]]) -> None:
    record = run_example("sudoku")
    equilibrium, tied, explicit, _, _ = record["rows"]
    assert equilibrium["parameters"] == tied["parameters"]
    assert 0.95 < explicit["parameters"] / tied["parameters"] < 1.05
    assert 0.0 <= record["details"]["auc_of_the_residual"][0] <= 1.0
    assert len(record["details"]["curves"]["equilibrium"][0]) == len(record["details"]["depths"])
