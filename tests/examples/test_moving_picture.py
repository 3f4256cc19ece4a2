from collections.abc import Callable
from typing import Any

import pytest


def test_a_warm_start_saves_evaluations_at_equal_quality(run_example: Callable[..., dict[str, Any]]) -> None:
    record = run_example("moving_picture")
    warm, explicit, cold = record["rows"]
    assert warm["mean"] < cold["mean"] == 100.0
    assert 0.9 < explicit["parameters"] / warm["parameters"] < 1.1
    quality = record["details"]["psnr_db"]
    assert quality[warm["model"]] == pytest.approx(quality[cold["model"]], abs=0.05)
