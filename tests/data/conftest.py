"""Texts to prepare."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deepeq.data.config import PUBLISHED, PublishedName


@pytest.fixture
def write_splits(tmp_path: Path) -> Callable[..., Path]:
    """Writes three files into a folder of the test and returns the folder."""

    def write(train: str, valid: str, test: str, *, folder: str = "text", names: str = "{}.txt") -> Path:
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        for split, text in (("train", train), ("valid", valid), ("test", test)):
            (path / names.format(split)).write_text(text, encoding="utf-8", newline="")
        return path

    return write


@pytest.fixture
def set_published_counts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets a small text be the published one of a name."""

    def change(name: PublishedName, vocab_size: int, tokens: tuple[int, int, int]) -> None:
        published = replace(PUBLISHED[name], vocab_size=vocab_size, tokens=tokens)
        monkeypatch.setitem(PUBLISHED, name, published)

    return change
