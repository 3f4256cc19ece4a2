"""The benchmark of the data pipeline, on a small text."""

from pathlib import Path
from typing import Any

import data_pipeline
import numpy as np
import pytest
import torch

from tests.benchmarks.conftest import Bench


def test_generated_text_has_the_tokens_and_types_that_were_asked_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(script: str, option: str, folder: str, **environment: str) -> dict[str, Any]:
        assert (Path(script).name, option, environment) == ("data_pipeline.py", "--measure", {"OMP_NUM_THREADS": "1"})
        return data_pipeline.measure(Path(folder))

    threads = torch.get_num_threads()
    monkeypatch.setattr(data_pipeline, "in_own_process", here)
    monkeypatch.setattr(data_pipeline, "SPLIT_FRACTIONS", {"train": 1.0, "valid": 0.5, "test": 0.6})
    try:
        result = bench(data_pipeline, "--tokens", 20_000, "--types", 300, figure=False)
    finally:
        torch.set_num_threads(threads)
    assert result["tokens"] == {"train": 20_000, "valid": 10_000, "test": 12_000}
    assert result["types"] == 300
    assert result["numpy"] == np.__version__
    assert 0 < result["peak_rss_mib_after_import"] <= result["peak_rss_mib_after_preparing"] <= result["peak_rss_mib"]
    assert "| types | 300 |" in result["table"]


def test_words_are_different_and_long_enough() -> None:
    words = [data_pipeline.word(rank) for rank in range(2000)]
    assert len(set(words)) == 2000
    assert min(map(len, words)) >= 4
