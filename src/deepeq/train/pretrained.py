"""The model folder: `config.json`, `model.safetensors`, `tokenizer.json` for text, and the card `README.md`.

The best model of a run is such a folder (RUN/best), an export is a copy of it, and the hub holds the same files.
`open_model` opens all of them.
"""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from deepeq.data import Corpus, DataConfig, DataSource, Tokenizer, load_corpus
from deepeq.deq import How
from deepeq.files import read_tensors, write_atomically, write_tensors
from deepeq.models import LanguageModel, ModelOutput, TransformerConfig, generate
from deepeq.train.config import RunConfig
from deepeq.train.recipe import RunFolder, load_config, recipe_parser, run_config, short_error, to_plain

FORMAT = "deepeq-model-1"
CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"

Prompt = TypeVar("Prompt", str, list[str])


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained model, and what it needs to predict as it did in its run."""

    config: RunConfig
    """The configuration of its run."""
    vocab_size: int
    """Number of tokens."""
    tokenizer: Tokenizer | None
    """The map between text and ids; None for symbols."""
    model: LanguageModel
    """The model, in evaluation mode."""
    data: DataConfig | None
    """Where the text is that it was trained on; None for text that only its owner has."""

    @property
    def unit(self) -> str:
        """What one token is: `character`, `word`, `bpe` or `symbol`."""
        return "symbol" if self.tokenizer is None else self.tokenizer.unit

    @property
    def how(self) -> How | None:
        """How evaluation and generation solve; None for an explicit network."""
        return self.config.evaluation_how()

    def load_corpus(self) -> DataSource:
        """Return the data that the model was trained on.

        Raises:
            OSError: A file is missing.
            ValueError: The text is not at hand, or has changed since.
        """
        if self.data is None:
            raise ValueError("the model was trained on text that only its owner has; evaluate the run that it is from")
        corpus = load_corpus(self.data)
        if isinstance(corpus, Corpus) and corpus.tokenizer != self.tokenizer:
            raise ValueError("the text that the model was trained on has changed; its tokens are others now")
        return corpus


def save_model(
    folder: Path, trained: TrainedModel, *, facts: dict[str, Any] | None = None, fabric: Fabric | None = None
) -> None:
    """Write a model folder without its card. The weights and the facts about them are replaced as one file.

    Args:
        folder: The folder; it is created if it is not there.
        trained: The model. Machine paths and the names of its owner's text are left out.
        facts: What is known of the weights, such as their step and validation loss.
        fabric: The processes that hold the model; all of them call this, and the first one writes.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    first, tensors = fabric is None or fabric.is_global_zero, {}
    for name, value in trained.model.state_dict().items():  # one by one: a device may lack room for all shards
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if first:
            tensors[name] = value.detach().contiguous().cpu()
    if not first:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt", "facts": json.dumps(facts or {})})
    if trained.tokenizer is not None:
        trained.tokenizer.save(folder / TOKENIZER)
    data = trained.data
    content = {"format": FORMAT, "vocab_size": trained.vocab_size, "unit": trained.unit} | to_plain(trained.config)
    content["data"] = None
    if data is not None and not data.is_private:
        content["data"] = to_plain(replace(data, folder=None, cache=None))
    del content["run"]
    # Last, because a folder without it is not a model: an interrupted first write is not taken for one.
    write_atomically(folder / CONFIG, json.dumps(content, indent=1) + "\n")


def open_model(source: str | Path, *, memory_len: int | None = None) -> TrainedModel:
    """Return the model of a run folder, of a model folder, or of a repository on the hub.

    Weights are read from safetensors only, and the configuration makes no classes but those of this library, so a file
    from elsewhere runs no code.

    Args:
        source: The folder, or the name `user/name`.
        memory_len: Number of positions before a segment that attention sees, instead of the configuration's.

    Raises:
        FileNotFoundError: There is no such folder or repository, or it holds no model.
        ValueError: A file is damaged or belongs to another model, or `memory_len` does not fit.
    """
    folder = Path(source)
    run = RunFolder(folder)
    if not folder.is_dir():
        folder = Path(_download(str(source)))
    elif run.config.is_file():
        run.refuse_old()
        folder = run.best
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{run.path} has no model yet: a run saves its best model at its first validation")
    config, vocab_size, data = _read_config(folder / CONFIG)
    if run.config.is_file():
        data = load_config(run.config, complete=True).data
    if memory_len is not None:
        if not isinstance(config.model.layer, TransformerConfig):
            raise ValueError(f"memory_len={memory_len!r} is of Transformers, and {source} has none; leave it out")
        layer = replace(config.model.layer, eval_memory_len=memory_len)
        config = replace(config, model=replace(config.model, layer=layer))
    tokenizer = None
    if data is None or not data.is_copy_memory:
        tokenizer = Tokenizer.load(folder / TOKENIZER)
        if (tokenizer.unit, len(tokenizer)) != (config.data.unit, vocab_size):
            raise ValueError(
                f"{folder / TOKENIZER} has {len(tokenizer)} tokens of the unit {tokenizer.unit!r}, but the model has "
                f"{vocab_size} of the unit {config.data.unit!r}"
            )
    model = _load_new(folder / WEIGHTS, vocab_size, config)
    return TrainedModel(config=config, vocab_size=vocab_size, tokenizer=tokenizer, model=model, data=data)


def load_weights(folder: Path, model: LanguageModel) -> None:
    """Copy the weights of a model folder into a model, which may be sharded.

    Raises:
        FileNotFoundError: There are none.
        ValueError: The file is damaged, or belongs to another model.
    """
    saved = _read_weights(folder / WEIGHTS)
    wanted = model.state_dict()
    _check_names(folder / WEIGHTS, wanted, saved)
    for name, target in wanted.items():
        value = saved[name]
        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.detach().copy_(value)


class PretrainedModel(nn.Module, PyTorchModelHubMixin):
    """A trained language model with its tokenizer, its way to solve and its model card.

    `from_pretrained(source)` opens a run, a model folder or a repository on the hub; `save_pretrained(folder)` writes a
    model folder, and `push_to_hub(name)` uploads it.

    Args:
        trained: What `open_model` returned.
        card: The model card in Markdown.
    """

    def __init__(self, trained: TrainedModel, card: str) -> None:
        super().__init__()
        self.trained, self.card, self.model = trained, card, trained.model
        self.eval()

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  (unknown options are mistakes)
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Return the model of a run, of a model folder, or of a repository on the hub.

        Args:
            pretrained_model_name_or_path: The folder, or `user/name`.
            force_download: Whether to download what is in the cache again.
            token: For repositories that are not public; None for the one that `hf auth login` stored.
            cache_dir: Folder of downloads.
            local_files_only: Whether to use the cache without asking the hub.
            revision: Branch, tag or commit.

        Raises:
            FileNotFoundError: There is no such folder or repository, or it lacks a file.
            ValueError: A file is damaged, or belongs to another model.
        """
        source = str(pretrained_model_name_or_path)
        if not os.path.isdir(source):
            options: dict[str, Any] = {"force_download": force_download, "token": token, "cache_dir": cache_dir}
            source = _download(source, local_files_only=local_files_only, revision=revision, **options)
        trained = open_model(source)
        card = next(
            (path for path in (Path(source, CARD), RunFolder(Path(source)).best / CARD) if path.is_file()), None
        )
        return cls(trained, "" if card is None else card.read_text(encoding="utf-8"))

    def forward(self, tokens: Tensor, memory: Any = None, targets: Tensor | None = None) -> ModelOutput:
        """Predict the token after each token, as `LanguageModel` does.

        Args:
            tokens: Ids `(B, T)`.
            memory: Memory of the tokens before.
            targets: Ids of the next tokens, `(B, T)`, for the loss.
        """
        return self.model(tokens, memory, targets, how=self.trained.how)

    def generate(
        self,
        prompt: Prompt,
        *,
        num_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        memory_len: int | None = None,
        seed: int = 0,
    ) -> Prompt:
        """Return the text that continues a prompt, or each of several prompts.

        Args:
            prompt: A text that is not empty, or several.
            num_tokens: Number of tokens to sample for each prompt.
            temperature: Divisor of the logits; 0 takes the likeliest token.
            top_k: Number of likeliest tokens to sample among; 0 for all.
            top_p: Probability that the fewest likeliest tokens to sample among must have together; 1 for all tokens.
            memory_len: Number of positions to remember; None for as many as in evaluation.
            seed: Seed of the random numbers.

        Raises:
            ValueError: The model is not of text, a prompt is empty, or an argument is out of range.
        """
        tokenizer = self.trained.tokenizer
        if tokenizer is None:
            raise ValueError("the model predicts symbols, which are not text to continue")
        prompts = prompt if isinstance(prompt, list) else [prompt]
        steps = generate(
            self.model,
            [tokenizer.encode(text) for text in prompts],
            how=self.trained.how,
            num_tokens=num_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            segment_len=self.trained.config.train.segment_len,
            memory_len=memory_len,
            seed=seed,
        )
        texts = [tokenizer.decode(tokens) for tokens in zip(*steps, strict=True)] or [""] * len(prompts)
        result: Any = texts if isinstance(prompt, list) else texts[0]
        return result

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the model card, for the base class; it takes no options."""
        return ModelCard(self.card)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_atomically(save_directory / CARD, self.card)
        if self.trained.tokenizer is None:
            (save_directory / TOKENIZER).unlink(missing_ok=True)  # of an earlier model
        save_model(save_directory, self.trained)


def export(source: str | Path, folder: str | Path, *, repository: str | None = None) -> dict[str, Any]:
    """Copy the model folder of a run, and upload it if a repository is named.

    Args:
        source: The run folder, or a model folder.
        folder: The folder to write, which is empty or holds an earlier export.
        repository: Name on the hub, `user/name`; None for no upload.

    Returns:
        The folder, its files, and the address of the upload.

    Raises:
        ValueError: The folder holds something else, or a file of the run is damaged.
        OSError: The folder cannot be written, or the upload failed.
    """
    folder = Path(folder)
    _check_free(folder)
    open_model(source)  # a damaged model is not given away
    origin = RunFolder(Path(source)).best if RunFolder(Path(source)).config.is_file() else Path(source)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    written = []
    for name in (WEIGHTS, TOKENIZER, CARD, CONFIG):  # the configuration last, as in `save_model`
        (folder / name).unlink(missing_ok=True)
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
            written.append(name)
    result: dict[str, Any] = {"folder": str(folder), "files": sorted(written)}
    if repository is None:
        return result
    try:
        return result | {"url": str(PretrainedModel.from_pretrained(folder).push_to_hub(repository))}
    except Exception as error:  # the network's libraries raise many kinds; all mean that the upload failed
        message = " ".join(str(error).split())
        raise OSError(f"{folder} is written, but the upload to {repository!r} failed: {message}") from error


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        _read_config(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not empty and holds no earlier export ({error}); name another folder") from error


def _download(name: str, **options: Any) -> str:
    try:
        return snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, TOKENIZER, CARD], **options)
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is not a folder, and not the name of a repository (user/name)") from error
    except Exception as error:  # the network's libraries raise many kinds; all mean that there is no model
        message = " ".join(str(error).split())
        raise FileNotFoundError(f"{name!r} is not a folder, and cannot be downloaded: {message}") from error


def _read_config(path: Path) -> tuple[RunConfig, int, DataConfig | None]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is {path.parent} a run or a model folder?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        if content.get("format") == "deepeq-pretrained-1":
            raise ValueError("it is of version 0.1, so export the model again")
        if content.pop("format", None) != FORMAT:
            raise ValueError("it is not the configuration of a model of this version of deepeq")
        vocab_size, unit, data = (content.pop(name) for name in ("vocab_size", "unit", "data"))
        if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size!r} must be a whole number >= 1")
        parser = recipe_parser()
        # Of text that only its owner has, the unit is all that is known.
        own = {"unit": unit} | ({"vocab_size": vocab_size} if unit == "bpe" else {})
        content["data"] = own if data is None else data
        config = run_config(parser.instantiate(parser.parse_object(content)))
    except Exception as error:  # the parsing library raises many kinds; all mean that the file is at fault
        raise ValueError(f"{path} is damaged: {short_error(str(error))}") from error
    return config, vocab_size, None if data is None else config.data


def _load_new(path: Path, vocab_size: int, config: RunConfig) -> LanguageModel:
    saved = _read_weights(path)
    with torch.device("meta"):  # what a configuration claims costs nothing before the weights are compared
        model = LanguageModel(vocab_size, config.model)
    _check_names(path, model.state_dict(), saved)
    # The tensors may lie in the file; in memory of their own they stay when it changes.
    model.load_state_dict({name: value.clone() for name, value in saved.items()}, assign=True)
    return model.eval()


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; weights are read from safetensors only")
    return read_tensors(path)[0]


def _check_names(path: Path, wanted: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    wrong = sorted(set(wanted) ^ set(saved)) or [
        name for name, value in saved.items() if value.shape != wanted[name].shape or not value.is_floating_point()
    ]
    if wrong:
        raise ValueError(f"{path} belongs to another configuration: {wrong[0]} differs, and {len(wrong) - 1} more do")
