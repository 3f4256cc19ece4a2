from collections.abc import Callable
from typing import Any

import pytest


def test_the_hypergradient_is_that_of_the_optimum(run_example: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("sklearn")
    record = run_example("bilevel")
    exact, unrolled = record["details"]["slope_error"][0]
    assert exact < 1e-6
    assert unrolled > 1e3 * exact
    losses = {row["model"]: row["mean"] for row in record["rows"]}
    assert losses["64 penalties, learned"] < losses["1 penalty, learned"]
