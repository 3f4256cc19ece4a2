"""The scripts of benchmarks/ are no package: their tests import them from their folder."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """The benchmarks set them to zero, which must not reach other tests."""
    yield
    torch.set_flush_denormal(False)
