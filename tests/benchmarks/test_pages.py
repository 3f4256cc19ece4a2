"""Pages of results: they say what the result files say, and a changed file is noticed."""

import json
import shutil
import sys
from pathlib import Path

import pages
import ptb
import pytest


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pages", *options])
    return pages.main()


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository's pages, templates and result files."""
    for name in ("docs", "benchmarks/pages", "benchmarks/results"):
        shutil.copytree(pages.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.jsonl"))
    shutil.copy(pages.ROOT / "README.md", tmp_path)
    places = {name: tmp_path / path.relative_to(pages.ROOT) for name, path in pages.PAGES.items()}
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PAGES", places)
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(pages, "TEMPLATES", tmp_path / "benchmarks" / "pages")
    return tmp_path


def test_committed_pages_say_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--check") == 0


def test_changed_result_is_noticed_and_written(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "benchmarks" / "results" / pages.FILES["quickstart"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_bits_per_character": 1.2345}))
    assert run(monkeypatch, "--check") == 1
    message = capsys.readouterr().err
    assert message == "docs/results.md, README.md differs from the result files; run python benchmarks/pages.py\n"
    assert run(monkeypatch) == 0
    assert "**1.23** bits per character" in (copy / "README.md").read_text()
    assert run(monkeypatch, "--check") == 0


def test_edited_page_and_changed_figure_are_noticed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = copy / "docs" / "reproduction.md"
    text = page.read_text()
    assert "3.23e-6" in text
    page.write_text(text.replace("3.23e-6", "3.23e-7"))
    assert run(monkeypatch, "--check") == 1
    page.write_text(text)
    assert run(monkeypatch, "--check") == 0
    (copy / "docs" / "figures" / "memory.png").unlink()
    assert run(monkeypatch, "--check") == 1
    assert run(monkeypatch) == 0
    assert (copy / "docs" / "figures" / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_readme_without_the_marks_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = copy / "README.md"
    readme.write_text(readme.read_text().replace(pages.END, ""))
    with pytest.raises(ValueError, match=r"README\.md must have the lines"):
        run(monkeypatch)


@pytest.mark.parametrize(
    "value",
    [
        "{nowhere#a|.2f}",
        "{nowhere|path}",
        "{mine#missing|.2f}",
        "{mine#text|.2f}",
        "{mine#list/a=2/b|d}",
        "{mine|name}",
    ],
)
def test_value_that_is_not_there_is_named(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text('{"text": "a", "list": [{"a": 1}]}')
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(pages, "FILES", {"mine": "x.json"})
    with pytest.raises(ValueError, match="cannot be filled"):
        pages.filled(f"before {value} after")


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (3.46e-6, ".1e", "3.5e-6"),
        (6.5712e9, "GB", "6.57 GB"),
        (9.08e8, "GB", "0.908 GB"),
        (0.9034, ".1%", "90.3 %"),
        (13946, ",.0f", "13,946"),
        ([True, False, True], "sum", "2"),
    ],
)
def test_values_are_shown_in_their_format(value: object, kind: str, text: str) -> None:
    assert pages.shown(value, kind) == text


@pytest.mark.parametrize(
    ("described", "text"),
    [
        ("Intel(R) Xeon(R) Processor x 2, 1 threads", "Intel Xeon, 2 cores, 1 thread"),
        ("AMD EPYC x 2, 2 threads", "AMD EPYC, 2 cores, 2 threads"),
        ("NVIDIA H100", "NVIDIA H100"),
    ],
)
def test_hardware_is_shown_in_few_words(described: str, text: str) -> None:
    assert pages.hardware(described) == text


def test_source_names_a_script_where_a_subcommand_made_the_file() -> None:
    source = pages.about("copy_memory", "source")
    assert "made by `python benchmarks/copy_memory.py --out OUT --size two_cores` on Intel Xeon" in source


def test_pointer_reaches_into_lists_and_over_them() -> None:
    content = {"rows": [{"a b": 1, "c": 0.1}, {"a b": 2, "c": 0.1}]}
    assert pages.lookup(content, "/rows/1/a b") == 2
    assert pages.lookup(content, "rows/*/a b") == [1, 2]
    assert pages.lookup(content, "rows/c=0.1&a b=2/a b") == 2
    with pytest.raises(LookupError, match="2 entries have c=0.1"):
        pages.lookup(content, "rows/c=0.1/a b")


def test_rows_of_the_paper_have_a_result_or_say_that_they_were_not_run() -> None:
    lines = (pages.TEMPLATES / "reproduction.md").read_text().splitlines()
    heads = {number - 1 for number, line in enumerate(lines) if line.startswith("|---")}
    rows = [line for n, line in enumerate(lines) if line.startswith("|") and n not in heads and "---" not in line]
    assert len(rows) > 50
    assert all("not run" in row or pages.VALUE.search(row) for row in rows)


def test_figures_are_drawn_again_from_their_results(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = next((copy / "benchmarks" / "results").glob("*_ptb"))
    before = (folder / "ptb.png").read_bytes()
    (folder / "ptb.png").unlink()
    monkeypatch.setattr(sys, "argv", ["ptb", "--out", str(folder), "--redraw"])
    with pytest.raises(SystemExit, match="0"):
        ptb.main()
    assert len((folder / "ptb.png").read_bytes()) == pytest.approx(len(before), rel=0.2)
