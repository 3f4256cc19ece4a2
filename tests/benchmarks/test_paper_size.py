"""The benchmark of training steps at the paper's sizes, on the smallest recipes."""

import json
import sys
from typing import Any

import paper_size
import pytest

from tests.benchmarks.conftest import Bench


def test_each_recipe_does_a_step(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(script: str, *words: str) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, "--out", "unused", *words])
            paper_size.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(paper_size, "in_own_process", here)
    result = bench(paper_size, "--segment_len", 12, "--recipes", "copy_memory", "copy_memory_lstm", figure=False)
    deq, lstm = (result["recipes"][name] for name in ("copy_memory", "copy_memory_lstm"))
    for row in (deq, lstm):
        assert row["loss_after"] < row["loss"]
        assert row["gradient_norm"] > 0
        assert row["peak_rss_mib"] > 100
    assert 10_000 < deq["num_params"] < 20_000
    assert deq["forward"]["steps"] >= 1
    assert len(deq["backward"]) == 1
    assert "forward" not in lstm
    assert "| copy_memory_lstm |" in result["table"]
