"""Pretrained models: what is written, that it comes back to the same predictions, and that nothing else comes in."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepeq import Anderson, Broyden, FixedPointIteration, Pieces, Solver
from deepeq.cli import main
from deepeq.data import CopyMemoryConfig, DataConfig, Tokenizer
from deepeq.models import (
    LanguageModel,
    ModelConfig,
    RecurrentConfig,
    TCNConfig,
    TransformerConfig,
    TrellisConfig,
    generate,
)
from deepeq.nn import VocabularyConfig
from deepeq.train import (
    EquilibriumConfig,
    FolderConfig,
    PretrainedModel,
    RunConfig,
    RunFolder,
    TrainConfig,
    TrainedModel,
    open_model,
)
from tests.train.conftest import make_trainer, train, with_layer, with_train

TRANSFORMER = TransformerConfig(d_model=8, num_heads=2, d_inner=8, memory_len=4, weight_norm=True, hidden_dropout=0.1)
TRELLIS = TrellisConfig(d_input=4, d_hidden=6, d_output=4, hidden_dropout=0.2, weight_dropout=0.1)
WORDS = VocabularyConfig(cutoffs=(3, 6), div_val=2, d_embed=4)
MODELS: dict[str, tuple[ModelConfig, Solver | None]] = {
    "transformer": (ModelConfig(layer=TRANSFORMER, input_dropout=0.1), Broyden(rtol=1e-8, line_search_steps=2)),
    "adaptive": (ModelConfig(layer=TRANSFORMER, vocabulary=WORDS), Anderson(ridge=1e-6, damping=0.1)),
    "trellis": (ModelConfig(layer=TRELLIS), FixedPointIteration(damping=0.5, max_steps=200)),
    "few steps": (ModelConfig(layer=TRELLIS), Broyden(history_size=3, damping=0.1, max_steps=5)),
    "tied": (ModelConfig(layer=TRELLIS, depth=4, auxiliary_every=2), None),
    "untied": (ModelConfig(layer=TRANSFORMER, depth=2, tied=False, checkpoint=True), None),
    "tcn": (ModelConfig(layer=TCNConfig(d_input=4, d_hidden=4, kernel_size=2), depth=2, tied=False), None),
    "lstm": (ModelConfig(layer=RecurrentConfig(d_input=4, d_hidden=4), depth=2, tied=False), None),
    "gru": (ModelConfig(layer=RecurrentConfig(d_input=4, d_hidden=4, kind="gru"), depth=1, tied=False), None),
}
TOKENIZER = Tokenizer.from_text("the quick brown fox jumps over the lazy dog", "word")


def pretrained(name: str = "transformer", data: DataConfig | None = None, **equilibrium: Any) -> PretrainedModel:
    model, solver = MODELS[name]
    config = RunConfig(
        data=data or DataConfig(files="own.txt", unit="word"),
        model=model,
        equilibrium=EquilibriumConfig(eval_solver=solver, **equilibrium),
        train=TrainConfig(segment_len=7, eval_segment_len=5, eval_batch_size=3),
    )
    network = LanguageModel(len(TOKENIZER), model).eval()
    trained = TrainedModel(config=config, vocab_size=len(TOKENIZER), tokenizer=TOKENIZER, model=network, data=data)
    return PretrainedModel(trained, "---\ntags: []\n---\n# Mine\n").eval()


def predictions(model: PretrainedModel) -> torch.Tensor:
    """Log-probabilities of two segments, the second one with the memory of the first."""
    tokens = torch.arange(12).reshape(2, 6) % 9
    with torch.no_grad():
        first = model(tokens)
        return torch.cat([first.logits, model(tokens, first.memory).logits])


def contents(folder: Path) -> dict[str, Any]:
    """The files; of the weights only what is in them, because their header has no order."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        files["model.safetensors"] = file.metadata(), {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
    return files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pretrained"
    pretrained().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may ask the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("name", "pieces"), [(name, None) for name in MODELS] + [("transformer", 4), ("adaptive", 3), ("trellis", 4)]
)
def test_model_comes_back_to_the_same_predictions(name: str, pieces: int | None, tmp_path: Path) -> None:
    model = pretrained(name, **({} if pieces is None else {"piece_len": pieces}))
    model.save_pretrained(tmp_path / "a")
    back = PretrainedModel.from_pretrained(tmp_path / "a")
    assert (back.trained.tokenizer, back.card) == (model.trained.tokenizer, model.card)
    for part in ("model", "equilibrium", "optimizer", "train"):
        assert getattr(back.trained.config, part) == getattr(model.trained.config, part)
    assert not back.training
    how = back.trained.how
    assert (how.length if isinstance(how, Pieces) else None) == pieces
    assert torch.equal(predictions(back), predictions(model))
    back.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_parameters_stay_trainable_and_keep_their_precision(tmp_path: Path) -> None:
    model = pretrained().double()
    model.save_pretrained(tmp_path)
    back = PretrainedModel.from_pretrained(str(tmp_path))
    assert torch.equal(predictions(back), predictions(model))
    tokens = torch.arange(12).reshape(2, 6) % 9
    back(tokens, None, tokens.roll(1)).nll.mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in back.model.network.parameters())


def test_loading_draws_no_random_number_and_needs_the_files_no_more(folder: Path) -> None:
    before = torch.get_rng_state()
    model = PretrainedModel.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)
    expected = predictions(model)
    (folder / "model.safetensors").write_bytes(bytes(10_000))
    assert torch.equal(predictions(model), expected)


def test_written_files_can_be_read_by_others_and_carry_no_path(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    data = DataConfig(corpus="wikitext2", unit="word", folder="/home/me/wt", cache="/c")
    pretrained(data=data).save_pretrained(folder)
    assert PretrainedModel.from_pretrained(folder).trained.data == DataConfig(corpus="wikitext2", unit="word")


def test_text_is_what_the_sampled_tokens_stand_for(folder: Path) -> None:
    model = PretrainedModel.from_pretrained(folder)
    options = {"num_tokens": 5, "temperature": 2.0, "top_k": 6, "top_p": 0.3, "memory_len": 3, "seed": 4}
    prompts = ["the quick", "a fox jumps over"]
    ids = [TOKENIZER.encode(prompt) for prompt in prompts]
    tokens = list(generate(model.model, ids, how=model.trained.how, segment_len=7, **options))
    assert model.generate(prompts, **options) == [TOKENIZER.decode(row) for row in zip(*tokens, strict=True)]
    assert model.generate(prompts[0], num_tokens=3) == model.generate(prompts[:1], num_tokens=3)[0]
    assert model.generate(prompts, num_tokens=0) == ["", ""]
    assert len({model.generate("the", num_tokens=8, seed=seed) for seed in range(4)}) > 1
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate("")


def test_symbols_are_not_text_to_continue() -> None:
    trained = replace(pretrained("gru").trained, tokenizer=None)
    with pytest.raises(ValueError, match="the model predicts symbols, which are not text to continue"):
        PretrainedModel(trained, "").generate("the")


# A run.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A run on a text of its owner that has got as far as its result."""
    path = tmp_path_factory.mktemp("finished") / "run"
    train(
        RunConfig(
            data=DataConfig(files=(str(text_file),)),
            model=ModelConfig(layer=TRANSFORMER),
            equilibrium=EquilibriumConfig(eval_solver=Anderson(rtol=1e-2), pretrain_fraction=0.5),
            train=TrainConfig(steps=4, batch_size=4, segment_len=8, eval_segment_len=32, eval_every=2),
            run=FolderConfig(dir=str(path)),
        )
    )
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    """A copy of it to change."""
    return RunFolder(Path(shutil.copytree(finished, tmp_path / "run")))


def test_export_is_the_best_model_of_the_run(run: RunFolder, tmp_path: Path) -> None:
    assert main(["export", "--run", str(run.path), "--out", str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == contents(run.best)
    own, back = open_model(run.path), open_model(tmp_path / "out")
    assert (back.tokenizer, back.config.model, back.how) == (own.tokenizer, own.config.model, own.how)
    assert (back.config.train.segment_len, back.config.eval_segment_len, back.config.train.eval_batch_size) == (
        8,
        32,
        16,
    )
    assert own.data is not None
    assert back.data is None
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        first, expected = (opened.model(tokens, how=opened.how) for opened in (back, own))
        assert torch.equal(first.logits, expected.logits)
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
        assert b"fox.txt" not in path.read_bytes(), path.name


def test_weights_carry_the_step_and_the_loss_that_they_had(run: RunFolder) -> None:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    best = min((row for row in rows if row["split"] == "valid"), key=lambda row: row["nll"])
    with safe_open(run.best / "model.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts == {"step": best["step"], "valid_nll": best["nll"]}


def test_run_without_a_validation_has_no_model_yet(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(with_train(config, eval_every=100))
    monkeypatch.setattr(trainer, "evaluate", lambda split: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    with pytest.raises(FileNotFoundError, match="has no model yet: a run saves its best model at its first validation"):
        open_model(trainer.folder.path)


def test_checkpoints_of_version_0_1_get_a_sentence(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (run.checkpoints / "best.safetensors").write_bytes(b"")
    for command in (["eval", "--run", str(run.path)], ["train", "--run.dir", str(run.path), "--resume", "yes"]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is a checkpoint of version 0.1, which this version does not read" in line


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_model_card_holds_the_numbers_of_the_run(run: RunFolder) -> None:
    card = PretrainedModel.from_pretrained(run.path).card
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for split, text in (("valid", "validation"), ("test", "test")):
        row = min((row for row in rows if row["split"] == split), key=lambda row: row["nll"])
        cells = [f"{row[name]:.4g}" for name in ("forward_steps", "forward_residual", "forward_unconverged")]
        line = f"| {text} | {row['bits_per_character']:.4g} | {row['num_tokens']} | {' | '.join(cells)} |"
        assert line in card
    model, result = open_model(run.path).model, json.loads(run.result.read_text())
    numbers = [f"{result[name]:.4g}" for name in ("baseline_bits_per_character", "train_seconds", "peak_memory_mb")]
    for text in (*numbers, f"{model.num_params:,}", f"{model.num_params_non_embedding:,}", "Anderson("):
        assert text in card
    assert "Not recorded: license, languages and intended use.\n" in card
    assert "| seconds | not recorded |" not in card
    (measured,) = metadata(card)["model-index"][0]["results"]
    test = next(row for row in rows if row["split"] == "test")
    assert measured["metrics"][0]["value"] == test["bits_per_character"]
    assert metadata(card)["library_name"] == "deepeq"


def test_model_card_of_an_unfinished_run_says_what_was_not_recorded(config: RunConfig) -> None:
    trainer = make_trainer(config)
    trainer.fit()
    card = (trainer.folder.best / "README.md").read_text()
    assert "| test | not recorded |" in card
    assert "| seconds | not recorded |" in card
    assert "| validation | not recorded" not in card
    assert "model-index" not in metadata(card)


def test_symbols_have_no_vocabulary_and_are_evaluated_again(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = CopyMemoryConfig(blank_len=5, num_train=8, num_test=6)
    config = replace(with_layer(config, memory_len=0), data=DataConfig(corpus="copy_memory", copy_memory=task))
    config = with_train(config, segment_len=25, steps=1, eval_batch_size=4)
    train(config)
    out = tmp_path / "out"
    pretrained().save_pretrained(out)  # an earlier export, which has a vocabulary
    assert main(["export", "--run", str(config.run.dir), "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["README.md", "config.json", "model.safetensors"]
    assert main(["eval", "--run", str(out)]) == 0
    assert main(["eval", "--run", str(config.run.dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    exported, own = (json.loads(line) for line in lines)
    assert {name: exported[name] for name in own if name != "seconds"} == {n: own[n] for n in own if n != "seconds"}


def test_export_writes_again_over_an_earlier_export_and_over_nothing_else(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["export", "--run", str(run.path), "--out"]
    for _ in range(2):
        assert main([*command, str(out)]) == 0
        assert json.loads(capsys.readouterr().out)["folder"] == str(out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "file").write_text("mine")
    before = (tmp_path / "other" / "config.json").read_bytes(), run.config.read_bytes()
    for taken, message in (
        (tmp_path / "other", "is not empty and holds no earlier export"),
        (run.path, "is not empty and holds no earlier export"),
        (tmp_path / "file", "is a file; name a folder"),
    ):
        assert main([*command, str(taken)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert before == ((tmp_path / "other" / "config.json").read_bytes(), run.config.read_bytes())
    assert main(["eval", "--run", str(out)]) == 2
    assert "text that only its owner has" in capsys.readouterr().err


# The hub.


class Recorder:
    """Stands for the hub: keeps what would be uploaded."""

    uploads: dict[str, dict[str, Any]]
    failure: Exception | None = None

    def __init__(self, token: str | None = None) -> None:
        pass

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        return type("Repository", (), {"repo_id": f"me/{repo_id.rpartition('/')[2]}"})

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        self.uploads[repo_id] = contents(Path(folder_path))
        return f"https://hub/{repo_id}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    recorder = type("Recorder", (Recorder,), {"uploads": {}})
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", recorder)
    return recorder


def test_upload_is_what_save_writes(hub: type[Recorder], folder: Path) -> None:
    PretrainedModel.from_pretrained(folder).push_to_hub("fox")
    assert hub.uploads == {"me/fox": contents(folder)}


def test_export_uploads_when_asked_and_says_when_it_failed(
    hub: type[Recorder], run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--run", str(run.path), "--out", str(tmp_path / "out"), "--push", "me/fox"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["url"] == "https://hub/me/fox"
    assert set(hub.uploads["me/fox"]) == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    hub.failure = RuntimeError("401 Client Error\n\nYou need to log in")
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "out is written, but the upload to 'me/fox' failed: 401 Client Error You need to log in" in line


def test_download_takes_no_other_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(folder)

    monkeypatch.setattr("deepeq.train.pretrained.snapshot_download", download)
    model = PretrainedModel.from_pretrained("me/fox", revision="v1", token=False)
    assert torch.equal(predictions(model), predictions(PretrainedModel.from_pretrained(folder)))
    ((name, options),) = calls
    assert (name, options["revision"], options["token"]) == ("me/fox", "v1", False)
    assert set(options["allow_patterns"]) == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}


@pytest.mark.parametrize("name", ["me/fox", "a b", "../nowhere", "", "$(touch x)", "-x", "new\nline"])
def test_name_of_nothing_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reason = "cannot be downloaded: .+" if name == "me/fox" else "not the name of a repository"
    with pytest.raises(FileNotFoundError, match=f"is not a folder, and ({reason})") as error:
        PretrainedModel.from_pretrained(name, cache_dir=tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_unknown_option_is_an_error(folder: Path) -> None:
    with pytest.raises(TypeError, match="strict"):
        PretrainedModel.from_pretrained(folder, strict=False)  # pyright: ignore[reportCallIssue]


# Files from elsewhere.


class Trap:
    """A pickle of this creates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickles_are_never_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = pickle.dumps(Trap(tmp_path / "ran"))
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.safetensors.index.json", "model.pt"):
        (folder / name).write_bytes(content)
    with pytest.raises(FileNotFoundError, match="weights are read from safetensors only"):
        PretrainedModel.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is damaged or was not written by deepeq"):
        PretrainedModel.from_pretrained(folder)
    torch.save({"a": Trap(tmp_path / "ran")}, folder / "model.safetensors")
    assert main(["generate", "--run", str(folder), "--prompt", "the"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "ran").exists()


SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch ran"}}
FOREIGN = [
    ("equilibrium", {"eval_solver": SYSTEM}, "os.system"),
    ("equilibrium", {"eval_solver": {"class_path": "deepeq.models.TransformerConfig"}}, "eval_solver"),
    ("equilibrium", {"eval_solver": {"class_path": "deepeq.Broyden", "init_args": {"rtol": "!!python/x []"}}}, "rtol"),
    ("equilibrium", {"eval_solver": {"class_path": "deepeq.Broyden", "init_args": {"steps": 3}}}, "steps"),
    ("equilibrium", {"eval_solver": {"class_path": "deepeq.Broyden", "dict_kwargs": {"steps": 3}}}, "steps"),
    ("model", {"layer": {"class_path": "deepeq.train.Cosine"}}, "layer"),
    ("model", {"layer": {"class_path": "builtins.eval", "init_args": {"source": "1"}}}, "builtins.eval"),
    ("model", "/etc/hostname", "model"),
    ("data", "/etc/hostname", "data"),
    ("vocab_size", 0, "vocab_size=0 must be a whole number >= 1"),
    ("vocab_size", [1], "vocab_size"),
    ("more", 1, "more"),
    ("format", "another", "is not the configuration of a model of this version"),
    ("format", "deepeq-pretrained-1", "is of version 0.1, so export the model again"),
]


@pytest.mark.parametrize(("field", "value", "message"), FOREIGN)
def test_configuration_from_elsewhere_is_named_and_runs_no_code(
    folder: Path, field: str, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=f"config.json .*{message}") as error:
        PretrainedModel.from_pretrained(folder)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["pretrained"]


def test_sizes_that_the_weights_do_not_have_cost_no_memory(folder: Path) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["model"]["layer"]["init_args"] |= {"d_model": 2**20, "d_inner": 2**24, "num_heads": 2}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="model.safetensors belongs to another configuration"):
        PretrainedModel.from_pretrained(folder)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_file_cut_short_is_named(folder: Path, name: str, fraction: float, capsys: pytest.CaptureFixture[str]) -> None:
    content = (folder / name).read_bytes().rstrip()
    (folder / name).write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ValueError, match=f"{name} is (damaged|not readable)") as error:
        PretrainedModel.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file_is_named(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        PretrainedModel.from_pretrained(folder)
    assert main(["generate", "--run", str(folder), "--prompt", "the"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"3", b"[" * 100_000, b'{"format": "deepeq-pretrained-1"}'])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json_of_something_else_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is (damaged|not)") as error:
        PretrainedModel.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_weights_and_vocabulary_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    pretrained("lstm").save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    with pytest.raises(ValueError, match="model.safetensors belongs to another configuration"):
        PretrainedModel.from_pretrained(folder)
    changed = dict(tensors) | {next(iter(tensors)): next(iter(tensors.values())) + 1}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt", "sha256": "0" * 64})
    with pytest.raises(ValueError, match="model.safetensors is damaged .*checksum"):
        PretrainedModel.from_pretrained(folder)
    pretrained().save_pretrained(folder)
    Tokenizer.from_text("abc", "character").save(folder / "tokenizer.json")
    with pytest.raises(
        ValueError, match="has 4 tokens of the unit 'character', but the model has 10 of the unit 'word'"
    ):
        PretrainedModel.from_pretrained(folder)


HOSTILE = ['it\'s "my own"', "$(touch ran)", "x; touch ran", "new\nline", "[red] [", "{} %s", "-x", "~"]


@pytest.mark.parametrize("name", HOSTILE)
def test_folder_may_have_any_name(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = predictions(PretrainedModel.from_pretrained(folder))
    folder.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(predictions(PretrainedModel.from_pretrained(name)), expected)
    assert main(["generate", f"--run={name}", "--prompt", "the", "--num_tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("the")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("generate", name) for name in HOSTILE),
        *((command, '$(touch ran) it\'s "mine"; touch ran [red] {} %s\n') for command in ("eval", "plot", "export")),
    ],
)
def test_run_may_have_any_name(
    command: str,
    name: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / name)
    options = {"generate": ["--prompt", "the", "--num_tokens", "1"], "export": ["--out=$(touch ran) [/red]"]}
    assert main([command, f"--run={name}", *options.get(command, [])]) == 0
    assert capsys.readouterr().err == ""
    assert {path.name for path in tmp_path.iterdir()} - {"$(touch ran) ["} == {name}
