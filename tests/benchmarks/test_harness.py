"""What the benchmarks share."""

import argparse
from pathlib import Path

import pytest
import torch
from _harness import (
    Benchmark,
    command,
    in_own_process,
    in_turns,
    markdown,
    median_ratio,
    number,
    origin,
    resident_bytes,
)


def test_command_repeats_what_was_chosen_and_shows_folders_by_their_names() -> None:
    arguments = argparse.Namespace(out=Path("x"), runs=[Path("/a/one"), Path("two")], size="paper", seeds=[0, 1])
    arguments.only, arguments.minutes, arguments.quick, arguments.alone, arguments.run = [], 3.0, False, True, None
    shown = command("ptb", arguments)
    assert shown == "python benchmarks/ptb.py --out OUT --runs one two --size paper --seeds 0 1 --alone"


def test_origin_tells_where_numbers_come_from() -> None:
    found = origin("python x.py")
    assert found["command"] == "python x.py"
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert len(found["date"]) == len("2026-01-01")


def test_calls_take_turns_after_a_round_that_warms_up() -> None:
    order: list[str] = []
    seconds = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert min(min(times) for times in seconds.values()) >= 0.0


def test_ratio_is_the_median_over_rounds_of_paired_times() -> None:
    assert median_ratio([1.0, 9.0, 2.0], [2.0, 3.0, 4.0]) == 0.5


def test_table_is_markdown_with_four_digits() -> None:
    assert markdown(["a", "b"], [["x", 0.123456], [None, 7]]) == "| a | b |\n| --- | --- |\n| x | 0.1235 |\n|  | 7 |\n"


def test_number_is_none_where_json_cannot_hold_it() -> None:
    assert number(0.123456) == 0.1235
    assert number(float("inf")) is None
    assert number(float("nan")) is None


def test_process_of_its_own_returns_its_last_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import json, os, sys\nprint('first')\nprint(json.dumps([sys.argv[3:], os.environ['MINE']]))\n")
    assert in_own_process(str(script), "--a", "b", MINE="here") == [["--a", "b"], "here"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_of_the_resident_memory_is_not_below_what_is_there() -> None:
    data = torch.ones(5_000_000)
    now = resident_bytes(peak=False)
    assert resident_bytes(peak=True) >= now > data.nbytes


@pytest.mark.parametrize(("source", "message"), [("nowhere", "x: .*nowhere"), ("copy_memory", "x: .* model of text")])
def test_source_that_is_no_model_of_text_ends_the_script(source: str, message: str, runs: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        Benchmark("x", "").open_text_model(runs / source)
