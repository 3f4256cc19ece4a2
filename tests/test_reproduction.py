"""docs/reproduction.md: every number of this library is the one in the result file that it links to."""

import argparse
import json
import re
import runpy
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "reproduction.md"
NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+\.json)#([^)\s]+)\)")
HERE = "here"


def lookup(content: Any, pointer: str) -> Any:
    """The value at a JSON pointer (RFC 6901)."""
    for key in pointer.strip("/").split("/"):
        content = content[int(key)] if isinstance(content, list) else content[key]
    return content


def matches(shown: str, value: float) -> bool:
    """Whether a number as it is printed, perhaps in percent, is a value rounded to its digits."""
    percent, shown = shown.endswith("%"), shown.removesuffix("%").strip().replace(",", "")
    if not re.fullmatch(NUMBER, shown):
        return False
    number = Decimal(shown)
    unit = Decimal(1).scaleb(int(number.as_tuple().exponent))
    return abs(number - Decimal(repr(value)) * (100 if percent else 1)) <= unit / 2 * Decimal("1.000001")


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a page in Markdown, as rows by the names of their columns."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        names, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        found.append([dict(zip(names, row, strict=True)) for row in rows])
    return found


class _Parsed(Exception):
    """Ends a script after it has read its arguments."""


@cache
def parsed(command: str) -> tuple[str, argparse.Namespace]:
    """A benchmark, and what it makes of its arguments, defaults included."""
    deepeq, bench, name, *arguments = command.split()
    assert (deepeq, bench) == ("deepeq", "bench")
    script = PAGE.parents[1] / "benchmarks" / f"{name.replace('-', '_')}.py"
    parse = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:

        def stop(parser: argparse.ArgumentParser) -> None:
            raise _Parsed(parse(parser, arguments))

        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.syspath_prepend(script.parent)
        with pytest.raises(_Parsed) as reached:
            runpy.run_path(str(script), run_name="__main__")
    return script.stem, reached.value.args[0]


TEXT = PAGE.read_text(encoding="utf-8")
LINKS = LINK.findall(TEXT)
ROWS = [row for table in tables(TEXT) for row in table]


@pytest.mark.parametrize(("shown", "file", "pointer"), LINKS, ids=[f"{shown} {p}" for shown, _, p in LINKS])
def test_number_is_that_of_the_result_file(shown: str, file: str, pointer: str) -> None:
    value = lookup(json.loads((PAGE.parent / file).read_text()), pointer)
    assert matches(shown, value), f"the page says {shown}, {file} says {value}"


@pytest.mark.parametrize("row", ROWS, ids=[next(iter(row.values()))[:40] for row in ROWS])
def test_row_links_each_of_its_numbers_or_says_that_it_was_not_run(row: dict[str, str]) -> None:
    links = LINK.findall(row[HERE])
    assert links or "not run" in row[HERE], row[HERE]
    assert not re.search(r"\d", LINK.sub("", row[HERE])), f"a number without a link: {row[HERE]}"


@pytest.mark.parametrize("row", ROWS, ids=[next(iter(row.values()))[:40] for row in ROWS])
def test_row_names_the_command_and_the_hardware_of_its_result_files(row: dict[str, str]) -> None:
    (command,) = re.findall(r"`([^`]+)`", row["command"])
    arguments = parsed(command)
    for _, file, _ in LINK.findall(row[HERE]):
        result = json.loads((PAGE.parent / file).read_text())
        assert parsed(result["command"]) == arguments
        threads = re.search(r"(\d+) threads?", row["hardware"])
        assert threads
        assert f", {threads[1]} threads" in result["hardware"]


@pytest.mark.parametrize("file", sorted(set(re.findall(r"\]\(([^)#]+)", TEXT))))
def test_linked_file_is_there(file: str) -> None:
    assert file.startswith("https://") or (PAGE.parent / file).exists()


@pytest.mark.parametrize(
    ("shown", "value", "same"),
    [
        ("3.5e-6", 3.46e-6, True),
        ("3.5e-6", 3.56e-6, False),
        ("121.6", 121.64, True),
        ("121.6", 121.66, False),
        ("90.3 %", 0.9034, True),
        ("90.3%", 0.9039, False),
        ("13,946", 13946, True),
        ("about 3", 3, False),
    ],
)
def test_numbers_are_compared_at_the_digits_that_are_shown(shown: str, value: float, same: bool) -> None:
    assert matches(shown, value) == same
