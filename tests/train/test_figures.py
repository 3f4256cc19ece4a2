"""The figures of a run."""

from dataclasses import replace
from pathlib import Path

import pytest

from deepeq.cli import main
from deepeq.train import EquilibriumConfig, RunConfig, plot_run
from tests.train.conftest import train


def drawn(capsys: pytest.CaptureFixture[str], folder: str | None) -> list[str]:
    """Names of the figures that `deepeq plot` draws, which are whole."""
    capsys.readouterr()
    assert main(["plot", "--run", str(folder)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    return sorted(path.name for path in written)


def test_equilibrium_has_three_figures_and_two_before_it_has_a_model(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config)
    folder = Path(config.run.dir or "")
    assert drawn(capsys, config.run.dir) == ["convergence.png", "loss.png", "steps.png"]
    (folder / "best").rename(folder / "elsewhere")
    assert drawn(capsys, config.run.dir) == ["loss.png", "steps.png"]


def test_equilibrium_in_pieces_is_measured_on_its_first_piece(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    equilibrium = replace(config.equilibrium, piece_len=3, jacobian_weight=0.0)
    train(replace(config, equilibrium=equilibrium))
    assert "convergence.png" in drawn(capsys, config.run.dir)


def test_explicit_network_has_no_figures_of_solves(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(config, model=replace(config.model, depth=2), equilibrium=EquilibriumConfig()))
    assert drawn(capsys, config.run.dir) == ["loss.png"]


def test_plot_without_measurements_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no row of training yet"):
        plot_run(tmp_path)
