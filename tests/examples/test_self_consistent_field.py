from collections.abc import Callable
from typing import Any


def test_force_and_hessian_agree_with_finite_differences(run_example: Callable[..., dict[str, Any]]) -> None:
    record = run_example("self_consistent_field")
    assert record["details"]["force_error"][0] < 1e-6
    errors = {row["model"]: row["mean"] for row in record["rows"]}
    assert errors["equilibrium"] < 1e-8
    assert errors["frozen charges"] > 1e-4  # the Hessian needs the response of the charges
    steps = record["details"]["steps_to_1e-10"][0]
    assert steps["Anderson"] < 0.5 * steps["mixing, a = 0.3"]
    assert steps["mixing, a = 1.0"] == 150  # it never ends
