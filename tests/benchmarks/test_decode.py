"""The benchmark of decoding, on a tiny run."""

from pathlib import Path

import decode
import pytest

from tests.benchmarks.conftest import Bench


def test_both_ways_make_the_same_predictions(bench: Bench, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "NUM_TIGHT", 4)
    result = bench(decode, "--run", runs / "equilibrium", "--num_tokens", 12)
    assert result["command"] == "python benchmarks/decode.py --out OUT --run equilibrium --num_tokens 12 --seed 0"
    assert result["weights"] == "trained"
    assert [prompt["prompt_len"] for prompt in result["prompts"]] == [1, 3, 12]
    assert result["speedup"] == result["prompts"][-1]["speedup"]
    assert list(result["from_scratch_seconds"]) == [str(length) for length in range(1, 24)]
    assert list(result["prompts"][1]["with_memory_seconds"]) == [str(length) for length in range(3, 15)]
    tight = result["tight"]
    assert tight["num_prefixes"] == 4
    assert tight["largest_residual"] <= 1e-5
    assert tight["log_prob_difference"]["largest"] < 1e-3
    assert "| 12 | with memory |" in result["table"]


def test_run_of_a_stack_is_refused(bench: Bench, runs: Path) -> None:
    with pytest.raises(SystemExit, match="decode: .*stack must be the run of an equilibrium model"):
        bench(decode, "--run", runs / "stack")
