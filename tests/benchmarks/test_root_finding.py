"""The benchmark of root finding, on a few systems: what it writes, and that it trusts no solver."""

import json
import sys
from pathlib import Path
from typing import Any

import _root_problems
import numpy as np
import pytest
import root_finding
import torch
from _root_problems import PROBLEMS, ROOTLESS, SHIFTED, Problem
from root_finding import Answer, Method

ALL = {problem.name: problem for problem in PROBLEMS + SHIFTED + ROOTLESS}
OWN = ("root_find, default", "NewtonKrylov", "Broyden", "Broyden, line search", "Anderson")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on two systems, one in units of its own, and one without a root, without other libraries."""
    out: Path = tmp_path_factory.mktemp("root_finding")
    names = ("second difference", "arctangent", "line, units 1000, root 10000", "square plus one")
    with pytest.MonkeyPatch.context() as patch, np.errstate():
        patch.setattr(sys, "argv", ["root_finding", "--out", str(out), "--peers", "--problems", *names])
        root_finding.main()
    assert (out / "root_finding.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "root_finding.md").read_text()
    return json.loads((out / "root_finding.json").read_text()) | {"table": table}


def test_run_writes_what_was_measured(result: dict[str, Any]) -> None:
    assert tuple(result["methods"]) == OWN
    assert result["command"].startswith("python benchmarks/root_finding.py --out OUT")
    assert [problem["name"] for problem in result["problems"]] == ["second difference", "arctangent"]
    groups = ("problems", "shifted", "rootless")
    assert [[problem["size"] for problem in result[group]] for group in groups] == [[3, 1], [3], [1]]
    for problem in result["problems"] + result["shifted"]:
        assert set(problem["answers"]) == set(OWN)
        for name in ("root_find, default", "NewtonKrylov"):
            answer = problem["answers"][name]
            assert all(answer[key] for key in ("solved", "relative", "claimed"))
            assert answer["evaluations"] > 1
    for answer in result["rootless"][0]["answers"].values():
        assert not any(answer[key] for key in ("solved", "relative", "claimed"))
        assert answer["norm"] is None or answer["norm"] >= 1.0


def test_table_sums_up_the_answers(result: dict[str, Any]) -> None:
    rows = {row[0]: row[1:] for row in _rows(result["table"])}
    assert rows["solver"][:2] == ["solved of 2", "relative to the start"]
    for name in OWN:
        own = [problem["answers"][name] for problem in result["problems"]]
        assert rows[name][0] == str(sum(answer["solved"] for answer in own))
        assert rows[name][2] == str(sum(answer["evaluations"] for answer in own if answer["solved"]))
        assert rows[name][4] == "0"
    assert rows["problem"] == list(OWN)
    assert rows["square plus one"] == ["-"] * len(OWN)
    assert rows["second difference"][1] == str(result["problems"][0]["answers"]["NewtonKrylov"]["evaluations"])


def _rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


@pytest.mark.parametrize("name", OWN)
def test_evaluations_are_the_calls_of_g(name: str) -> None:
    calls, inner = 0, ALL["Broyden tridiagonal"]

    def counted(xp: Any, x: Any) -> Any:
        nonlocal calls
        calls += 1
        return inner.function(xp, x)

    problem = Problem(name="counted", function=counted, start=inner.start, source="")
    answer = root_finding.methods([])[name](problem, 5e-8)
    assert answer.evaluations == calls > 1


# --- the check of an answer ------------------------------------------------------------------------------------------


def saying(z: Any, *, claimed: bool) -> Method:
    """A solver that returns this, whatever the problem."""
    return lambda problem, atol: Answer(np.asarray(z, dtype=float), claimed, 7)


# x -> x, from (1, ..., 6), whose norm is 9.54: what is returned, is it solved, is it in the relative sense.
ANSWERS = [
    ([0.0] * 6, True, True),
    ([9e-7, 0, 0, 0, 0, 0], True, True),
    ([9e-7] * 6, False, True),  # the Euclidean norm, and not the largest component
    ([0, 0, 9e-6, 0, 0, 0], False, True),
    ([0, 0, 1e-5, 0, 0, 0], False, False),
    ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], False, False),
    ([float("nan")] * 6, False, False),
    ([float("inf"), 0, 0, 0, 0, 0], False, False),
]


@pytest.mark.parametrize("claimed", [True, False])
@pytest.mark.parametrize(("z", "solved", "relative"), ANSWERS)
def test_answer_is_judged_by_g_and_not_by_its_claim(z: Any, solved: bool, relative: bool, claimed: bool) -> None:
    measured = root_finding.measure(ALL["identity"], saying(z, claimed=claimed))
    assert (measured["solved"], measured["relative"], measured["claimed"]) == (solved, relative, claimed)
    assert measured["evaluations"] == 7
    assert measured["norm"] is None or measured["norm"] == pytest.approx(float(np.linalg.norm(z)))
    json.dumps(measured, allow_nan=False)


@pytest.mark.parametrize(("distance", "solved"), [(0.0, True), (5e-3, True), (2e-2, False)])
def test_answer_in_units_of_its_own_is_judged_relative_to_the_start(distance: float, solved: bool) -> None:
    problem = ALL["line, units -1e-06, root 10000"]
    measured = root_finding.measure(problem, saying([1e4 + distance, 1e4, 1e4], claimed=True), own_units=True)
    assert measured["solved"] == measured["relative"] == solved
    assert root_finding.measure(problem, saying([5e3] * 3, claimed=True))["norm"] < 1.0  # where 1e-6 says little


def test_tolerance_that_is_asked_for_is_in_the_units_of_the_problem() -> None:
    asked: list[float] = []

    def method(problem: Problem, atol: float) -> Answer:
        asked.append(atol)
        return Answer(np.array(problem.start), False, 1)

    root_finding.measure(ALL["identity"], method)
    root_finding.measure(ALL["line, units 1e+06, root 0.5"], method, own_units=True)
    assert asked == pytest.approx([5e-8, 1e-8 * 1e6 * (0.25 + 0.25 + 2.25) ** 0.5])


def _sum_up(problem: Problem, made: dict[str, Method], group: str) -> tuple[list[str], list[str]]:
    """The rows of the solver "it" and of the problem, in the table of one problem."""
    result = {"methods": list(made), "problems": [], "shifted": [], "rootless": []}
    result[group] = root_finding.run([problem], made, own_units=group == "shifted")
    rows = {row[0]: row[1:] for row in _rows(root_finding.table(result))}
    return rows["it"], rows.get(problem.name, [])


@pytest.mark.parametrize(
    ("z", "claimed", "false", "cell"),
    [
        ([0.0] * 6, True, "0", "7"),
        ([0.0] * 6, False, "0", "7"),
        ([0, 0, 9e-6, 0, 0, 0], True, "0", "7 r"),
        ([1.0] * 6, True, "1", "!"),
        ([1.0] * 6, False, "0", "-"),
        ([float("nan")] * 6, True, "1", "!"),
    ],
)
def test_claim_is_false_where_no_sense_of_the_answer_holds(z: Any, claimed: bool, false: str, cell: str) -> None:
    row, cells = _sum_up(ALL["identity"], {"it": saying(z, claimed=claimed)}, "problems")
    assert row[-1] == false
    assert row[0] == str(int(cell == "7"))
    assert row[1] == str(int(cell[0] == "7"))
    assert cells == [cell]


@pytest.mark.parametrize(("group", "name"), [("rootless", "square plus one"), ("shifted", "curve, units 1e-06")])
def test_false_claims_count_in_every_group(group: str, name: str) -> None:
    z = [0.1] * len(ALL[name].start)
    assert _sum_up(ALL[name], {"it": saying(z, claimed=True)}, group)[0][-1] == "1"
    assert _sum_up(ALL[name], {"it": saying(z, claimed=False)}, group)[0][-1] == "0"


def test_solver_that_raises_has_solved_nothing() -> None:
    def overflow(problem: Problem, atol: float) -> Answer:
        raise OverflowError("too large")

    measured = root_finding.measure(ALL["identity at the root"], overflow)
    assert measured["error"] == "OverflowError"
    assert not any(measured[key] for key in ("solved", "relative", "claimed"))
    row, cells = _sum_up(ALL["identity at the root"], {"it": overflow}, "problems")
    assert (row[0], row[-1], cells) == ("0", "0", ["-"])


def test_evaluations_that_are_not_counted_leave_a_plus_and_no_sum() -> None:
    def method(problem: Problem, atol: float) -> Answer:
        return Answer(np.zeros(6), True, None)

    row, cells = _sum_up(ALL["identity"], {"it": method}, "problems")
    assert (row[0], row[2], cells) == ("1", "", ["+"])


# --- the systems -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, problem in ALL.items() if problem.root is not None])
def test_known_root_is_a_root(name: str) -> None:
    problem = ALL[name]
    assert problem.root is not None
    first = root_finding.norm_of_g(problem, problem.start)
    assert root_finding.norm_of_g(problem, problem.root) <= 1e-12 * max(1.0, first)


def test_names_are_unique_and_rootless_systems_have_no_root() -> None:
    assert len(ALL) == len(PROBLEMS) + len(SHIFTED) + len(ROOTLESS)
    assert all(problem.root is None for problem in ROOTLESS)


def test_systems_are_the_same_for_every_library_and_in_any_batch() -> None:
    for problem in ALL.values():
        start = np.array(problem.start) + 0.01
        torch_value = problem.g(torch.from_numpy(start).unsqueeze(0))
        numpy_value = problem.function(np, start)
        assert numpy_value.shape == start.shape
        size = max(1.0, float(np.abs(numpy_value).max()))
        np.testing.assert_allclose(torch_value[0].numpy(), numpy_value, rtol=1e-12, atol=1e-13 * size)
        batch = torch.stack([torch.from_numpy(start), problem.z0[0], torch.from_numpy(start)])
        together = problem.g(batch)
        np.testing.assert_allclose(together[0].numpy(), numpy_value, rtol=1e-12, atol=1e-12 * size)


def test_systems_of_more_garbow_and_hillstrom_have_their_published_values() -> None:
    """Sums of squares at the standard start, from the paper's definitions worked out by hand."""
    rosenbrock = root_finding.norm_of_g(ALL["Rosenbrock"], (-1.2, 1.0)) ** 2
    assert rosenbrock == pytest.approx(24.2)
    assert root_finding.norm_of_g(ALL["Powell singular"], (3.0, -1.0, 0.0, 1.0)) ** 2 == pytest.approx(215.0)
    assert root_finding.norm_of_g(ALL["helical valley"], (-1.0, 0.0, 0.0)) ** 2 == pytest.approx(2500.0)
    assert _root_problems.chebyquad(np, np.array([0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2])) == pytest.approx([0.0, 0.0])
