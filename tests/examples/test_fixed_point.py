from collections.abc import Callable
from typing import Any


def test_solvers_need_fewer_evaluations_than_plain_iteration(run_example: Callable[..., dict[str, Any]]) -> None:
    record = run_example("fixed_point")
    assert record["met"]
    assert record["details"]["gradient_error"] < 1e-6
    means = {row["model"]: row["mean"] for row in record["rows"]}
    assert max(means["Broyden"], means["Anderson"]) < 0.2 * means["plain iteration"]
