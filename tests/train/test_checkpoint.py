"""Checkpoints come back whole, or not at all."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from safetensors import SafetensorError

from deepeq.models import LanguageModel, Memory, ModelConfig, TransformerConfig, TrellisMemory
from deepeq.train import OptimizerConfig
from deepeq.train.checkpoint import MANIFEST, CheckpointContent, SavedCheckpoint, save_checkpoint
from deepeq.train.step import make_optimizer

FABRIC = Fabric(accelerator="cpu", devices=1)


def make_model(d_model: int = 8) -> LanguageModel:
    return LanguageModel(7, ModelConfig(layer=TransformerConfig(d_model=d_model, num_heads=2, d_inner=8)))


def states() -> dict[str, torch.Tensor]:
    return {"cpu": torch.get_rng_state().unsqueeze(0)}


def one_step(model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.arange(12).reshape(2, 6) % 7
    model(tokens, None, tokens.roll(1)).nll.mean().backward()
    optimizer.step()
    optimizer.zero_grad()


Saved = tuple[Path, LanguageModel, torch.optim.Optimizer]


@pytest.fixture(params=["adamw", "muon", "sgd"])
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Saved:
    model = make_model()
    optimizer = make_optimizer(model, OptimizerConfig(name=request.param))
    one_step(model, optimizer)
    path = tmp_path / "checkpoint" / "step-000000001"
    content = CheckpointContent({"step": 1}, Memory(torch.ones(2, 3, 8), torch.zeros(2, 3, 8)), states())
    save_checkpoint(path, model, optimizer, content, FABRIC)
    return path, model, optimizer


def restored(path: Path, model: LanguageModel | None = None) -> CheckpointContent:
    model = make_model() if model is None else model
    return SavedCheckpoint(path).restore(model, make_optimizer(model, OptimizerConfig()))


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_model_optimizer_memory_and_random_state_come_back(saved: Saved, request: pytest.FixtureRequest) -> None:
    path, model, optimizer = saved
    expected_random = torch.rand(3)
    other = make_model()
    other_optimizer = make_optimizer(other, OptimizerConfig(name=request.node.callspec.params["saved"]))
    checkpoint = SavedCheckpoint(path)
    assert checkpoint.progress == {"step": 1}
    progress, memory, random = checkpoint.restore(other, other_optimizer)
    torch.set_rng_state(random["cpu"][0].clone())
    assert progress == {"step": 1}
    assert isinstance(memory, Memory)
    torch.testing.assert_close(memory.x, torch.ones(2, 3, 8))
    torch.testing.assert_close(torch.rand(3), expected_random)
    for _ in range(2):
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
        one_step(model, optimizer)
        one_step(other, other_optimizer)


@pytest.mark.parametrize(
    "memory",
    [
        None,
        torch.ones(2),
        Memory(torch.ones(2), torch.zeros(3)),
        Memory(torch.ones(2, 0, 3), torch.zeros(2, 4, dtype=torch.float64)),
        (TrellisMemory(torch.ones(1), torch.ones(2), torch.ones(3)), (torch.zeros(2),)),
    ],
)
def test_memory_of_any_network_comes_back(tmp_path: Path, memory: Any) -> None:
    model, path = make_model(), tmp_path / "step-1"
    save_checkpoint(
        path, model, make_optimizer(model, OptimizerConfig()), CheckpointContent({}, memory, states()), FABRIC
    )
    back = restored(path, model).memory
    assert type(back) is type(memory)
    torch.testing.assert_close(back, memory)


def shard_of(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["manifest", "shard"])
def test_checkpoint_cut_short_is_named(saved: Saved, name: str, fraction: float) -> None:
    path, _, _ = saved
    file = path / MANIFEST if name == "manifest" else shard_of(path)
    file.write_bytes(file.read_bytes()[: int(fraction * file.stat().st_size)])
    with pytest.raises(ValueError, match="step-000000001 is damaged"):
        SavedCheckpoint(path)


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.3, 0.6, 0.9, 0.9999])
@pytest.mark.parametrize("name", ["manifest", "shard"])
def test_flipped_bit_is_noticed(saved: Saved, name: str, fraction: float) -> None:
    path, _, _ = saved
    file = path / MANIFEST if name == "manifest" else shard_of(path)
    content = bytearray(file.read_bytes())
    content[int(fraction * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="step-000000001 is damaged or is not a checkpoint"):
        SavedCheckpoint(path)


def test_pickle_is_never_loaded(saved: Saved, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    path, _, _ = saved
    assert not any(content.startswith(b"\x80") for content in files(path).values())
    for file in (path / MANIFEST, shard_of(path), path / ".metadata"):
        file.write_bytes(pickle.dumps(Trap()))
        with pytest.raises(ValueError, match="damaged or is not a checkpoint"):
            SavedCheckpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("d_model", [16, None])
def test_checkpoint_of_another_model_is_refused_and_changes_nothing(saved: Saved, d_model: int | None) -> None:
    path, _, _ = saved
    depth = ModelConfig(layer=TransformerConfig(d_model=8, num_heads=2, d_inner=8), depth=2, tied=False)
    other = make_model(d_model) if d_model else LanguageModel(7, depth)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="belongs to another model: .* differs"):
        restored(path, other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_missing_and_foreign_folders_are_named(saved: Saved, tmp_path: Path) -> None:
    path, _, _ = saved
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; has the run saved a checkpoint yet"):
        SavedCheckpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is damaged or is not a checkpoint"):
        SavedCheckpoint(tmp_path / "empty")
    shard_of(path).unlink()
    with pytest.raises(ValueError, match="is damaged or is not a checkpoint"):
        SavedCheckpoint(path)


@pytest.mark.parametrize("failure", [SafetensorError("No space left on device"), OSError("No space left on device")])
def test_failed_write_leaves_the_previous_checkpoint_whole(
    saved: Saved, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model, optimizer = saved
    before = files(path)

    def full_disk(*arguments: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr("deepeq.train.checkpoint.save", full_disk)
    with pytest.raises(OSError, match="step-000000001 cannot be written: No space left"):
        save_checkpoint(path, model, optimizer, CheckpointContent({"step": 2}, None, states()), FABRIC)
    assert files(path) == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_written_again_replaces_and_leaves_nothing_else(saved: Saved) -> None:
    path, model, optimizer = saved
    path.with_name(f"{path.name}.tmp").mkdir()  # left by a killed process
    (path.with_name(f"{path.name}.tmp") / "rest").write_bytes(b"half a file")
    save_checkpoint(path, model, optimizer, CheckpointContent({"step": 2}, None, states()), FABRIC)
    assert SavedCheckpoint(path).progress == {"step": 2}
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    copy = path.with_name("copy")
    shutil.copytree(path, copy)
    assert restored(copy).memory is None


@pytest.mark.parametrize("change", [{"memory": ["Elsewhere", 0]}, {"format": "deepeq-checkpoint-9"}, {"more": 1}])
def test_edited_manifest_is_noticed(saved: Saved, change: dict) -> None:
    path, _, _ = saved
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match="the checksum of manifest.json differs"):
        SavedCheckpoint(path)
