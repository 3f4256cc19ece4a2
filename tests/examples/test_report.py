import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RECORDS = sorted((EXAMPLES / "results").glob("*.json"))


def test_met_compares_the_first_row_with_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _report

    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), "--seeds", "4", "5"])
    arguments = _report.parse("example", "An example.")
    rows = [_report.Row("a", 7, [4, 5], [1.0, 3.0], [0.5, 0.25]), _report.Row("b", None, [4], [9.0], [1.0])]
    for better, target, met in (
        ("higher", 2.0, True),
        ("higher", 2.5, False),
        ("lower", 2.0, True),
        ("lower", 1.5, False),
    ):
        with matplotlib.rc_context():
            figure, _ = _report.panels()
            _report.save(arguments, rows, figure, metric="m", target=target, note="n", better=better)
        record = json.loads((tmp_path / "example.json").read_text(encoding="utf-8"))
        assert record["met"] is met
        assert record["rows"][0]["mean"] == 2.0
        assert record["rows"][0]["total_seconds"] == 0.75
        assert record["command"] == "python examples/example.py --seeds 4 5"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_committed_records_are_of_full_runs(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["name"] == path.stem
    assert "--fast" not in record["command"]
    assert path.with_suffix(".png").exists()
    assert (EXAMPLES / f"{path.stem}.py").exists()
    assert record["note"].endswith(".")
    for row in record["rows"]:
        assert len(row["seeds"]) == len(row["reached"]) == len(row["seconds"])
