"""Fixtures shared by all tests."""

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The same cases in every run, whatever the machine's speed.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
# Before any fixture: what a module's fixture computes is compared with what its tests compute.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported stays: a collection need not look through it, which takes longer than most tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed():
    """One seed and one thread, so that a test does the same arithmetic on every run."""
    torch.set_num_threads(1)
    torch.manual_seed(20190901)


@pytest.fixture
def generator():
    """Random numbers that do not depend on what other fixtures drew."""
    return torch.Generator().manual_seed(1234)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of prepared text that no other run has filled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPEQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
