"""The files of a trained model that is given away: configuration as JSON and weights, without optimizer or paths."""

import json
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

from deepeq.data import DataConfig
from deepeq.data.files import write_atomically
from deepeq.models import (
    LanguageModel,
    ModelConfig,
    RecurrentConfig,
    TCNConfig,
    TiedNetwork,
    TransformerConfig,
    TrellisConfig,
)
from deepeq.solvers import GMRES, Anderson, Broyden, FixedPointIteration, Solver
from deepeq.train.config import EquilibriumConfig, RunConfig, condensed, plain
from deepeq.train.cores import evaluation_core
from deepeq.train.storage import open_stored, write_file

FORMAT = "deepeq-pretrained-1"

_LAYERS = {f"deepeq.models.{kind.__name__}" for kind in (TransformerConfig, TrellisConfig, TCNConfig, RecurrentConfig)}
_SOLVERS = {f"deepeq.{kind.__name__}" for kind in (Anderson, Broyden, FixedPointIteration, GMRES)}


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """What a trained model needs to predict as it did in its run.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other.
    """

    vocab_size: int
    """Number of tokens."""
    level: Literal["character", "word", "symbol"]
    """What one token is; symbols have no vocabulary."""
    model: ModelConfig
    """Sizes of the network."""
    evaluation: Solver | None = None
    """Solver of its equilibria; None for an explicit network."""
    subsequence_len: int | None = None
    """Most positions that are solved together; None for a whole segment."""
    segment_len: int
    """Positions of a prompt that are read together."""
    eval_segment_len: int
    """Positions of a segment in evaluation."""
    eval_batch_size: int
    """Streams side by side in evaluation."""
    data: DataConfig | None = None
    """What it was trained on; None for text that only its owner has."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("vocab_size", "subsequence_len", "segment_len", "eval_segment_len", "eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}={value!r} must be >= 1")
        if (self.evaluation is None) != (self.model.depth > 0):
            problems.append(f"evaluation={self.evaluation!r} does not fit model.depth={self.model.depth!r}")
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def of(cls, run: RunConfig, *, vocab_size: int) -> "PretrainedConfig":
        """That of a run."""
        return cls(
            vocab_size=vocab_size,
            level="symbol" if run.data.is_copy_memory else run.data.level,
            model=run.model,
            evaluation=run.equilibrium.evaluation,
            subsequence_len=run.equilibrium.subsequence_len,
            segment_len=run.train.segment_len,
            eval_segment_len=run.train.eval_segment_len or run.train.segment_len,
            eval_batch_size=run.train.eval_batch_size,
            data=run.data,
        )

    def prepare(self, model: LanguageModel) -> LanguageModel:
        """The model in evaluation mode, and with the core of evaluation."""
        if self.evaluation is not None:
            assert isinstance(model.network, TiedNetwork)
            equilibrium = EquilibriumConfig(evaluation=self.evaluation, subsequence_len=self.subsequence_len)
            model.network.core = evaluation_core(model.network, equilibrium)
        return model.eval()


def write_config(path: Path, config: PretrainedConfig) -> None:
    """Write a configuration as JSON; paths of this machine are left out."""
    data = config.data
    if data is not None:
        own = bool(data.files) or data.corpus == "folder"
        data = None if own else replace(data, folder=None, cache=None)
    write_atomically(path, json.dumps({"format": FORMAT} | plain(replace(config, data=data)), indent=1) + "\n")


def read_config(path: Path) -> PretrainedConfig:
    """The configuration that `write_config` wrote; no class but those of this library is ever made from it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or foreign.
    """
    content = _read_json(path)
    if content.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is no configuration of a pretrained model of this version of deepeq")
    parser = _parser()
    try:
        _check_classes(content)
        values = parser.instantiate(parser.parse_object(content))
        return PretrainedConfig(**{part.name: values[part.name] for part in fields(PretrainedConfig)})
    except Exception as error:  # the parsing library raises many kinds; all mean that the file is at fault
        raise ValueError(f"{path} is damaged: {' '.join(condensed(str(error)).split())}") from error


def write_weights(path: Path, model: LanguageModel) -> None:
    """Write the parameters of a model as safetensors, with a checksum.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    write_file(path, model.state_dict(), {"format": "pt"})


def read_weights(path: Path, config: PretrainedConfig) -> LanguageModel:
    """The model of a configuration with the parameters that `write_weights` wrote; nothing is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or belongs to another configuration.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; weights are read from safetensors only")
    saved = open_stored(path).tensors
    with torch.device("meta"):  # what a configuration claims costs nothing before the weights are there
        model = LanguageModel(config.vocab_size, config.model)
    wanted = model.state_dict()
    wrong = sorted(set(wanted) ^ set(saved)) or [
        name for name, value in saved.items() if value.shape != wanted[name].shape or not value.dtype.is_floating_point
    ]
    if wrong:
        raise ValueError(f"{path} belongs to another configuration: {wrong[0]} differs, and {len(wrong) - 1} more do")
    # The tensors may lie in the file; in memory of their own they stay when it changes.
    model.load_state_dict({name: value.clone() for name, value in saved.items()}, assign=True)
    return config.prepare(model)


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PretrainedConfig)
    return parser


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is {path.parent} a folder that deepeq export wrote?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # Deep nesting exhausts the parser's stack before it is a syntax error.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object")
    return content


def _check_classes(content: dict[str, Any]) -> None:
    """The parser allows the classes of this library; a file from elsewhere gets no say beyond these."""
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError("model is no JSON object")
    for name, value, known in (
        ("model.layer", model.get("layer"), _LAYERS),
        ("evaluation", content.get("evaluation"), _SOLVERS),
    ):
        if value is None and name == "evaluation":
            continue
        if not isinstance(value, dict) or value.get("class_path") not in known:
            raise ValueError(f"{name}={value!r} must have a class_path of {', '.join(sorted(known))}")
