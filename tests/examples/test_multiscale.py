from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.filterwarnings("ignore")  # the package of the data warns of its own
def test_a_short_run_learns_something_of_mnist1d(run_example: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("mnist1d")
    record = run_example("multiscale")
    deq, stack, cnn = record["rows"]
    assert deq["mean"] > 16.0  # ten classes, 400 training curves, four epochs
    assert deq["parameters"] == stack["parameters"]
    assert 0.9 < cnn["parameters"] / deq["parameters"] < 1.1
    assert record["details"]["fraction_of_test_solves_converged"][0] > 0.9
