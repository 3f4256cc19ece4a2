"""What the tests of the benchmarks share: tiny runs, and how a script is run in this process."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from deepeq import GMRES, Anderson, Broyden
from deepeq.data import CopyMemoryConfig, DataConfig
from deepeq.models import ModelConfig, RecurrentConfig, TransformerConfig, TrellisConfig
from deepeq.train import EquilibriumConfig, FolderConfig, OptimizerConfig, RunConfig, TrainConfig, train

# The scripts are no package.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 60
TRANSFORMER = TransformerConfig(d_model=16, num_heads=2, d_inner=32, memory_len=12, init_std=0.3)
TRELLIS = TrellisConfig(d_input=8, d_hidden=16, d_output=8)
EQUILIBRIUM = EquilibriumConfig(
    solver=Anderson(rtol=1e-2, max_steps=8),
    backward_solver=GMRES(rtol=1e-1, max_steps=6),
    eval_solver=Broyden(rtol=1e-3, max_steps=20, history_size=7),
    pretrain_fraction=0.3,
)

Bench = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """The benchmarks set denormal numbers to zero, which must not reach other tests."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: `equilibrium`, `pieces` (a trellis network in pieces), `stack` of 4 layers, `copy_memory`."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "fox.txt"
    text.write_text(TEXT)
    sizes = TrainConfig(steps=10, batch_size=4, segment_len=8, eval_batch_size=2, log_every=1, accelerator="cpu")
    base = RunConfig(
        data=DataConfig(files=(str(text),)), optimizer=OptimizerConfig(lr=1e-2, lr_warmup_steps=2), train=sizes
    )

    def run(name: str, model: ModelConfig, equilibrium: EquilibriumConfig | None = None, **changes: Any) -> None:
        solvers, place = equilibrium or EquilibriumConfig(), FolderConfig(dir=str(folder / name))
        train(replace(base, model=model, equilibrium=solvers, run=place, **changes), extras=False)

    run("equilibrium", ModelConfig(layer=TRANSFORMER), EQUILIBRIUM)
    run("pieces", ModelConfig(layer=TRELLIS), replace(EQUILIBRIUM, piece_len=4))
    run("stack", ModelConfig(layer=TRANSFORMER, depth=4))
    task = DataConfig(corpus="copy_memory", copy_memory=CopyMemoryConfig(blank_len=3, num_train=8, num_test=4))
    lstm = ModelConfig(layer=RecurrentConfig(d_input=8, d_hidden=8), depth=1, tied=False)
    run("copy_memory", lstm, data=task, train=replace(sizes, segment_len=23))
    return folder


@pytest.fixture
def finished(runs: Path, tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """Copies runs to the names that a script plans, given as {name: run}, and returns their folder."""

    def copy(names: dict[str, str]) -> Path:
        for name, run in names.items():
            shutil.copytree(runs / run, tmp_path / "runs" / name)
        return tmp_path / "runs"

    return copy


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs a script with options, in this process, and returns its result with the table as `table`."""

    def save_small(figure: Figure, path: Path) -> None:
        savefig(figure, path, dpi=30)

    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", save_small)

    def run(module: ModuleType, *options: object, figure: bool = True) -> dict[str, Any]:
        name, out = module.__name__, tmp_path / "out"
        monkeypatch.setattr(sys, "argv", [name, "--out", str(out), *map(str, options)])
        module.main()
        assert (out / f"{name}.png").exists() == figure
        result = json.loads((out / f"{name}.json").read_text())
        assert {"command", "date", "hardware", "threads", "python", "torch"} < result.keys()
        assert result["command"].startswith(f"python benchmarks/{name}.py --out OUT")
        return result | {"table": (out / f"{name}.md").read_text()}

    return run
