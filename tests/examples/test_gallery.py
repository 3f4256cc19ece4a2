"""The gallery says what the records say."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "gallery.py"


@pytest.fixture
def gallery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_gallery_is_up_to_date(gallery: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--check"])
    assert gallery.main() == 0


def test_changed_record_is_noticed_and_written(
    gallery: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(gallery.ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(gallery, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gallery.py"])
    assert gallery.main() == 0
    record = tmp_path / "examples" / "results" / "digits.json"
    record.write_text(record.read_text().replace('"target": 96.0', '"target": 97.5'))
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--check"])
    assert gallery.main() == 1
    assert "docs/gallery.md differs" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gallery.py"])
    assert gallery.main() == 0
    assert "≥ 97.5" in (tmp_path / "docs" / "gallery.md").read_text(encoding="utf-8")


def test_numbers_are_short(gallery: ModuleType) -> None:
    values = (99.52, 0.0, 0.23456, 1.1e-11, 123.456, 7.0)
    assert [gallery.number(value) for value in values] == ["99.52", "0", "0.235", "1.1e-11", "123.5", "7"]
