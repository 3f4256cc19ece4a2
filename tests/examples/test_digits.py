from collections.abc import Callable
from typing import Any

import pytest


def test_a_short_run_learns_the_digits(run_example: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("sklearn")
    record = run_example("digits")
    deq, explicit = record["rows"]
    assert deq["mean"] > 90.0
    assert deq["parameters"] == explicit["parameters"]
    assert record["details"]["steps"]["last"] < 20
