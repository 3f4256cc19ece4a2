"""Running an example as a user would, in this process."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that runs `examples/NAME.py --fast` and returns the JSON that it wrote."""
    matplotlib = pytest.importorskip("matplotlib")

    def run(name: str, *words: str) -> dict[str, Any]:
        script = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [script, "--fast", "--out", str(tmp_path), *words])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        state = torch.get_rng_state()
        try:
            with matplotlib.rc_context():
                runpy.run_path(script, run_name="__main__")
        finally:
            torch.set_flush_denormal(False)
            torch.set_rng_state(state)
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000
        return json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))

    return run
