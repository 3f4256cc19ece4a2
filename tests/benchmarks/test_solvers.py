"""The benchmark of solvers, on a tiny run."""

from pathlib import Path

import pytest
import solvers

from tests.benchmarks.conftest import Bench


def test_every_solver_is_measured_at_every_tolerance(bench: Bench, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "TOLERANCES", (1e-1, 1e-3))
    result = bench(solvers, "--run", runs / "equilibrium", "--repetitions", 1, "--alone", figure=False)
    assert result["state"] == [16, 8, 16]
    assert len(result["forward"]) == 2 * len(solvers.NONLINEAR)
    assert len(result["backward"]) == 2 * len(solvers.LINEAR)
    for row in result["forward"] + result["backward"]:
        if "error" not in row:
            assert row["evaluations"] >= 1
            assert row["time_over_bare_evaluations"] > 0
            assert row["reached"] == (row["worst_residual"] <= 1.05 * row["rtol"])
    reached = {row["solver"] for row in result["forward"] if row["rtol"] == 1e-3 and row["reached"]}
    assert "deepeq Broyden(history_size=100, damping=0.0, line_search_steps=0)" in reached
    gmres = [row for row in result["backward"] if row["solver"].startswith("deepeq GMRES")]
    assert all(row["reached"] for row in gmres)
    assert "| forward | deepeq Anderson(" in result["table"]
