"""Checkpoints come back whole, or not at all."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from deepeq.models import LanguageModel, Memory, ModelConfig, TransformerConfig, TrellisMemory
from deepeq.train.checkpoint import FORMAT, Checkpoint, load_checkpoint, save_checkpoint
from deepeq.train.config import OptimizerConfig
from deepeq.train.optimizer import make_optimizer
from deepeq.train.storage import write_file


def make_model(d_model: int = 8) -> LanguageModel:
    return LanguageModel(7, ModelConfig(layer=TransformerConfig(d_model=d_model, num_heads=2, d_inner=8)))


def states() -> dict[str, torch.Tensor]:
    return {"cpu": torch.get_rng_state().unsqueeze(0)}


def one_step(model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.arange(12).reshape(2, 6) % 7
    model(tokens, None, tokens.roll(1)).nll.mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, LanguageModel, torch.optim.Optimizer]:
    model = make_model()
    optimizer = make_optimizer(model, OptimizerConfig())
    one_step(model, optimizer)
    path = tmp_path / "checkpoint" / "last.safetensors"
    content = Checkpoint({"step": 1}, Memory(torch.ones(2, 3, 8), torch.zeros(2, 3, 8)), states())
    save_checkpoint(path, model, content, optimizer=optimizer)
    return path, model, optimizer


def test_model_optimizer_memory_and_random_state_come_back(saved: tuple) -> None:
    path, model, optimizer = saved
    expected_random = torch.rand(3)
    other = make_model()
    other_optimizer = make_optimizer(other, OptimizerConfig())
    progress, memory, random = load_checkpoint(path, other, other_optimizer)
    torch.set_rng_state(random["cpu"][0])
    assert progress == {"step": 1}
    assert memory is not None
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
def test_memory_of_any_network_comes_back(tmp_path: Path, memory: object) -> None:
    model = make_model()
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, model, Checkpoint({}, memory, states()), optimizer=make_optimizer(model, OptimizerConfig()))
    back = load_checkpoint(path, model).memory
    assert type(back) is type(memory)
    torch.testing.assert_close(back, memory)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_checkpoint_cut_short_is_named(saved: tuple, share: float) -> None:
    path, _, _ = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="last.safetensors is damaged"):
        load_checkpoint(path, make_model())


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.6, 0.9, 0.9999])
def test_flipped_bit_is_noticed(saved: tuple, share: float) -> None:
    path, _, _ = saved
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"last.safetensors (is damaged|is no checkpoint|belongs)"):
        load_checkpoint(path, make_model())


def test_pickle_is_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "last.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="damaged or is no checkpoint"):
        load_checkpoint(path, make_model())
    assert not (tmp_path / "ran").exists()


def test_checkpoint_of_another_model_is_refused_and_changes_nothing(saved: tuple) -> None:
    path, _, _ = saved
    other = make_model(d_model=16)
    before = other.embedding.tables[0].clone()
    with pytest.raises(ValueError, match="belongs to another model"):
        load_checkpoint(path, other)
    assert torch.equal(other.embedding.tables[0], before)


def test_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="is damaged or is no checkpoint"):
        load_checkpoint(path, make_model())
    write_file(path, {"a": torch.ones(1)}, {"format": "deepeq-checkpoint-1"})
    with pytest.raises(ValueError, match="no checkpoint of this version"):
        load_checkpoint(path, make_model())


def test_checkpoint_without_optimizer_cannot_be_trained_on(tmp_path: Path) -> None:
    model = make_model()
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, model, Checkpoint({}, None, {}))
    load_checkpoint(path, make_model())
    with pytest.raises(ValueError, match="holds no optimizer state"):
        load_checkpoint(path, model, make_optimizer(model, OptimizerConfig()))


def test_failed_write_leaves_the_previous_checkpoint_whole(saved: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model, optimizer = saved
    before = path.read_bytes()

    def full_disk(*arguments: object, **options: object) -> None:
        path.with_name("last.safetensors.tmp").write_bytes(b"half a file")
        raise SafetensorError("No space left on device")  # what the library makes of it

    monkeypatch.setattr("deepeq.train.storage.save_file", full_disk)
    with pytest.raises(OSError, match="last.safetensors cannot be written: No space left"):
        save_checkpoint(path, model, Checkpoint({"step": 2}, None, states()), optimizer=optimizer)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["last.safetensors"]


@pytest.mark.parametrize("damage", ["progress", "memory", "structure", "random"])
def test_checkpoint_with_a_part_missing_is_damaged_and_changes_nothing(saved: tuple, damage: str) -> None:
    path, model, _ = saved
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {"memory.0": torch.ones(1), "memory.1": torch.ones(1), "random.cpu": states()["cpu"]}
    metadata = {"format": FORMAT, "progress": "{}", "memory": '["Memory", 0, 1]'}
    if damage == "progress":
        del metadata["progress"]
    elif damage == "memory":
        del tensors["memory.1"]
    elif damage == "structure":
        metadata["memory"] = '["Elsewhere", 0]'
    else:
        tensors["random.cpu"] = torch.zeros(1, 3, dtype=torch.uint8)
    write_file(path, tensors, metadata)
    other = make_model()
    before = other.embedding.tables[0].clone()
    with pytest.raises(ValueError, match="last.safetensors is damaged"):
        load_checkpoint(path, other, make_optimizer(other, OptimizerConfig()))
    assert torch.equal(other.embedding.tables[0], before)
