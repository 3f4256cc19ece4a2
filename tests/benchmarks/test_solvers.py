"""The benchmark of solvers, without its peers, on the cells that are fast."""

import pytest
import solvers
from _cells import CELLS, make

from tests.benchmarks.conftest import Bench


def test_every_solver_is_measured_at_every_tolerance(bench: Bench) -> None:
    result = bench(solvers, "--cells", "mlp", "graph", "--repetitions", 1, "--alone")
    assert list(result["cells"]) == ["mlp", "graph"]
    assert result["cells"]["mlp"]["state"] == [256, 64]
    for cell in result["cells"].values():
        for direction, tolerances in solvers.TOLERANCES.items():
            assert len(cell[direction]) == len(tolerances) * len(solvers.SOLVERS[direction])
            for row in cell[direction]:
                assert row["evaluations"] >= 1
                assert row["time_over_bare_evaluations"] > 0
                assert row["reached"] == (row["worst_residual"] <= 1.05 * row["rtol"])
                assert row["residuals"] is None or len(row["residuals"]) == row["evaluations"]
            default = [row for row in cell[direction] if row["solver"] == solvers.DEFAULT[direction]]
            assert all(row["reached"] for row in default)
        assert len(cell["ratios"]) == 5
    assert "| mlp | forward | Anderson() |" in result["table"]


@pytest.mark.parametrize("name", CELLS)
def test_no_cell_is_a_trivial_problem(name: str) -> None:
    """Plain iteration does not solve it in as many steps as the benchmark allows, or at least not in a few."""
    f, z0 = make(name)
    solver = solvers.FixedPointIteration(rtol=1e-5, max_steps=20)
    solution = solvers.deepeq.fixed_point(f, z0, solver=solver, on_failure="ignore", nonfinite="keep")
    assert not solution.converged.all()
