"""Trained models as folders that can be given away, and on the Hugging Face hub."""

import os
from pathlib import Path
from typing import Any, Self, TypeVar

from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from deepeq.data import Vocabulary
from deepeq.data.copy_memory import NUM_SYMBOLS
from deepeq.data.files import write_atomically
from deepeq.models import LanguageModel, ModelOutput
from deepeq.train.card import model_card
from deepeq.train.folder import RunFolder
from deepeq.train.generation import generate
from deepeq.train.pretrained import (
    PretrainedConfig,
    read_config,
    read_weights,
    write_config,
    write_weights,
)

_CONFIG, _WEIGHTS, _VOCABULARY, _CARD = "config.json", "model.safetensors", "vocabulary.json", "README.md"

Prompt = TypeVar("Prompt", str, list[str])


class PretrainedModel(nn.Module, PyTorchModelHubMixin):
    """A trained language model with all that it needs to predict: its solver, its vocabulary, its model card.

    `save_pretrained(folder)` writes `config.json`, `model.safetensors`, `vocabulary.json` and the model card
    `README.md`; `push_to_hub(name)` uploads them; `from_pretrained` reads them back to the same predictions.

    Args:
        config: Its configuration.
        model: The network, which gets the core of evaluation and is put into evaluation mode.
        vocabulary: The map between text and ids; None for symbols.
        card: Its model card in Markdown.

    Raises:
        ValueError: configuration and vocabulary do not fit.
    """

    def __init__(
        self, config: PretrainedConfig, model: LanguageModel, vocabulary: Vocabulary | None, card: str
    ) -> None:
        super().__init__()
        level, size = ("symbol", config.vocab_size) if vocabulary is None else (vocabulary.level, len(vocabulary))
        if (level, size) != (config.level, config.vocab_size):
            raise ValueError(
                f"the vocabulary of {size} {level}s belongs to another model, of {config.vocab_size} {config.level}s"
            )
        self.config, self.vocabulary, self.card = config, vocabulary, card
        self.model = config.prepare(model)
        self.eval()

    @classmethod
    def from_run(cls, run_dir: str | Path) -> Self:
        """The model of the best checkpoint of a run, with a model card of what the run recorded.

        Raises:
            FileNotFoundError: the folder holds no run, or no checkpoint yet.
            ValueError: a file in it is damaged.
        """
        run = RunFolder(Path(run_dir))
        config, vocabulary, model = _open_run(run)
        return cls(config, model, vocabulary, model_card(config, model, run))

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
        """The model in a folder that `save_pretrained` wrote, or else in a repository on the hub of this name.

        Weights are read from safetensors alone, and the configuration makes no classes but those of this library, so
        that a file from elsewhere runs no code.

        Args:
            pretrained_model_name_or_path: The folder, or `user/name`.
            force_download: Whether to download again what is in the cache.
            token: For repositories that are not public; None for the one that `hf auth login` stored.
            cache_dir: Where downloads are kept.
            local_files_only: Whether to use the cache without asking the hub.
            revision: Branch, tag or commit.

        Raises:
            FileNotFoundError: there is no such folder or repository, or it lacks a file.
            ValueError: a file is damaged, or belongs to another model.
        """
        name = str(pretrained_model_name_or_path)
        if not os.path.isdir(name):
            options: dict[str, Any] = {"force_download": force_download, "token": token, "cache_dir": cache_dir}
            name = _download(name, local_files_only=local_files_only, revision=revision, **options)
        folder = Path(name)
        config = read_config(folder / _CONFIG)
        model = read_weights(folder / _WEIGHTS, config)
        vocabulary = None if config.level == "symbol" else Vocabulary.load(folder / _VOCABULARY)
        card = folder / _CARD
        text = card.read_text(encoding="utf-8") if card.is_file() else model_card(config, model, None)
        return cls(config, model, vocabulary, text)

    def forward(self, tokens: Tensor, memory: Any = None, targets: Tensor | None = None) -> ModelOutput:
        """Predict the token after each of `tokens` `(B, T)`, as `LanguageModel` does."""
        return self.model(tokens, memory, targets)

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
        """The text that comes after a prompt, or after each of several.

        Args:
            prompt: A text that is not empty, or several.
            num_tokens: Number of tokens to sample for each.
            temperature: Divides the logits; 0 takes the likeliest token.
            top_k: Sample among so many of the likeliest tokens; 0 for all.
            top_p: Sample among the fewest likeliest tokens that have this probability together; 1 for all.
            memory_len: Positions to remember; None for as many as in evaluation.
            seed: Of the random numbers.

        Raises:
            ValueError: the model is not one of text, a prompt is empty, or an argument is out of range.
        """
        if self.vocabulary is None:
            raise ValueError(f"the model predicts {self.config.level}s, which are no text to continue")
        prompts = prompt if isinstance(prompt, list) else [prompt]
        steps = list(
            generate(
                self.model,
                [self.vocabulary.encode(text) for text in prompts],
                num_tokens=num_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                segment_len=self.config.segment_len,
                memory_len=memory_len,
                seed=seed,
            )
        )
        texts = [self.vocabulary.decode([tokens[place] for tokens in steps]) for place in range(len(prompts))]
        result: Any = texts if isinstance(prompt, list) else texts[0]
        return result

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card, for the base class; it takes no options."""
        return ModelCard(self.card)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_weights(save_directory / _WEIGHTS, self.model)
        if self.vocabulary is None:
            (save_directory / _VOCABULARY).unlink(missing_ok=True)  # that of an earlier model
        else:
            self.vocabulary.save(save_directory / _VOCABULARY)
        write_atomically(save_directory / _CARD, self.card)
        # Last: a folder without it is none of a model, and a write that was interrupted is not taken for one.
        write_config(save_directory / _CONFIG, self.config)

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        raise ValueError(f"{model_file} is a pickle, which is never read; weights have to be in {_WEIGHTS}")


def open_model(folder: Path) -> tuple[PretrainedConfig, Vocabulary | None, LanguageModel]:
    """Configuration, vocabulary and model of a run's best checkpoint, or of a folder that `save_pretrained` wrote.

    Raises:
        FileNotFoundError: it holds neither.
        ValueError: a file in it is damaged.
    """
    if not (folder / _CONFIG).is_file():
        return _open_run(RunFolder(folder))
    loaded = PretrainedModel.from_pretrained(folder)
    return loaded.config, loaded.vocabulary, loaded.model


def export_run(run_dir: str | Path, folder: str | Path, *, repository: str | None = None) -> dict[str, Any]:
    """Write the pretrained model of a run into a folder, and upload it if a repository is named.

    Returns:
        The folder, its files, and the address of the upload.

    Raises:
        ValueError: the folder holds something else, or a file of the run is damaged.
        OSError: the folder cannot be written, or the upload failed.
    """
    folder = Path(folder)
    _check_free(folder)
    model = PretrainedModel.from_run(run_dir)
    model.save_pretrained(folder)
    written = [name for name in (_CONFIG, _WEIGHTS, _VOCABULARY, _CARD) if (folder / name).is_file()]
    result: dict[str, Any] = {"folder": str(folder), "files": written}
    if repository is None:
        return result
    try:
        return result | {"url": str(model.push_to_hub(repository))}
    except Exception as error:  # the network's libraries raise many kinds; all mean that the upload failed
        raise OSError(f"{folder} is written, but the upload to {repository!r} failed: {_sentence(error)}") from error


def _open_run(run: RunFolder) -> tuple[PretrainedConfig, Vocabulary | None, LanguageModel]:
    config, vocabulary, model = run.load_model()
    size = NUM_SYMBOLS if vocabulary is None else len(vocabulary)
    return PretrainedConfig.of(config, vocab_size=size), vocabulary, model


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        read_config(folder / _CONFIG)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not empty and holds no earlier export ({error}); name another folder") from error


def _download(name: str, **options: Any) -> str:
    try:
        return snapshot_download(name, allow_patterns=[_CONFIG, _WEIGHTS, _VOCABULARY, _CARD], **options)
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is no folder, and no name of a repository (user/name)") from error
    except Exception as error:  # the network's libraries raise many kinds; all mean that there is no model
        raise FileNotFoundError(f"{name!r} is no folder, and cannot be downloaded: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())
