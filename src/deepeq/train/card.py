"""The model card of a trained model: what it is and how good it is, from what its run recorded and nothing else."""

import json
import math
import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from deepeq import __version__
from deepeq.data import DataConfig
from deepeq.data.published import PUBLISHED
from deepeq.models import LanguageModel, RecurrentConfig, TCNConfig, TransformerConfig, TrellisConfig
from deepeq.train.folder import RunFolder
from deepeq.train.metrics import quality, read_metrics
from deepeq.train.pretrained import PretrainedConfig

_QUALITIES = {
    "bits_per_character": "bits per character",
    "perplexity": "perplexity",
    "loss": "loss in nats a position",
}
_NAMES = {TransformerConfig: "Transformer", TrellisConfig: "TrellisNet", TCNConfig: "TCN"}
_PAPER = "[Bai, Kolter, Koltun, NeurIPS 2019](https://arxiv.org/abs/1909.01377)"

Values = dict[str, Any]


def model_card(config: PretrainedConfig, model: LanguageModel, run: RunFolder | None) -> str:
    """A model card in Markdown, with metadata for the hub; what the run did not record is named as missing.

    Raises:
        ValueError: `metrics.jsonl` or `result.json` of the run is damaged.
    """
    valid, test, result = ({}, {}, {}) if run is None else _records(run)
    missing: list[str] = []
    parts = [
        f"# {_title(config)}",
        _introduction(config),
        _table("## Sizes", _sizes(config, model)),
        _quality(config, valid, test, result, missing),
        _table("## Training", _training(config, result, missing)),
        f"Not recorded: {', '.join([*missing, 'license, languages and intended use'])}.",
        _use(config),
    ]
    return f"---\n{_metadata(config, test)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _records(run: RunFolder) -> tuple[Values, Values, Values]:
    """The row of the best validation, that of the test text, and the result, each empty if there is none."""
    rows = read_metrics(run.metrics) if run.metrics.is_file() else []
    rows = [row for row in rows if _is_number(row.get("nll"))]
    valid = min((row for row in rows if row["split"] == "valid"), key=lambda row: row["nll"], default={})
    test = next((row for row in rows if row["split"] == "test"), {})
    # A run that was resumed and did not finish again has no row of the test text, and a result of weights before.
    if not test or not run.result.is_file():
        return valid, test, {}
    try:
        result = json.loads(run.result.read_text(encoding="utf-8"))
    # Deep nesting exhausts the parser's stack before it is a syntax error.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{run.result} is damaged: it is not readable as JSON ({error})") from error
    if not isinstance(result, dict):
        raise ValueError(f"{run.result} is damaged: it is no JSON object")
    return valid, test, result


def _metadata(config: PretrainedConfig, test: Values) -> str:
    results = None
    kind, title = _corpus(config.data)
    metric, label = _metric(config)
    if _is_number(test.get(metric)):
        result = EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=title,
            dataset_split="test",
            metric_type=metric,
            metric_name=label,
            metric_value=test[metric],
        )
        results = [result]
    return ModelCardData(
        library_name="deepeq",
        pipeline_tag=None if config.level == "symbol" else "text-generation",
        # The hub finds models of its mixin by the last two.
        tags=[
            "deep-equilibrium-model" if config.evaluation else "explicit-network",
            "model_hub_mixin",
            "pytorch_model_hub_mixin",
        ],
        model_name=_title(config),
        eval_results=results,
    ).to_yaml()


def _title(config: PretrainedConfig) -> str:
    layer, depth = config.model.layer, config.model.depth
    name = layer.kind.upper() if isinstance(layer, RecurrentConfig) else _NAMES.get(type(layer), type(layer).__name__)
    if depth == 0:
        return f"DEQ-{name} language model"
    tied = "tied " if config.model.tied else ""
    return f"{name} language model of {depth} {tied}layer{'s' * (depth > 1)}"


def _introduction(config: PretrainedConfig) -> str:
    what = f"It predicts the next {config.level}."
    if config.evaluation is None:
        return f"{what} An explicit network, as {_PAPER} compares with, trained with deepeq {__version__}."
    pieces = "" if config.subsequence_len is None else f", in pieces of at most {config.subsequence_len} positions"
    return (
        f"{what} Its hidden states are the equilibrium `z* = f(z*, x)` of one layer ({_PAPER}), which "
        f"`{config.evaluation}` finds{pieces}. Trained with deepeq {__version__}."
    )


def _sizes(config: PretrainedConfig, model: LanguageModel) -> dict[str, str]:
    return {
        "parameters": f"{model.num_params:,}",
        "of these, of the network": f"{model.num_params_non_embedding:,}",
        "vocabulary": f"{config.vocab_size:,} {config.level}s",
        "layer": f"`{config.model.layer}`",
    }


def _quality(config: PretrainedConfig, valid: Values, test: Values, result: Values, missing: list[str]) -> str:
    metric, label = _metric(config)
    solved = ("forward_steps", "forward_residual", "forward_unconverged") if config.evaluation else ()
    heads = [label, "tokens", *("steps of a solve", "worst residual", "share unconverged")[: len(solved)]]
    lines = ["## Quality", "", f"| text | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for split, row in (("validation", valid), ("test", test)):
        values = [row.get(name) for name in (metric, "num_tokens", *solved)]
        lines.append(f"| {split} | {' | '.join(map(_shown, values))} |")
        if not all(map(_is_number, values)):
            missing.append(f"quality on the {split} text" + (" in full" if row else ""))
    baseline = result.get(f"baseline_{metric}")
    if _is_number(baseline):
        what = "guesses without memory" if config.level == "symbol" else "a unigram model"
        lines += ["", f"On the test text, {what} has {_shown(baseline)}."]
    else:
        missing.append("the quality of a baseline")
    lines += ["", f"Read in {config.eval_batch_size} streams, in segments of {config.eval_segment_len} tokens."]
    return "\n".join(lines)


def _training(config: PretrainedConfig, result: Values, missing: list[str]) -> dict[str, str]:
    rows = {"data": _corpus(config.data)[1]}
    for name, label in (
        ("num_steps", "optimizer steps"),
        ("train_seconds", "seconds"),
        ("peak_memory_mb", "most memory in MiB"),
        ("num_threads", "threads"),
        ("seed", "seed"),
    ):
        if _is_number(result.get(name)):
            rows[label] = _shown(result[name])
        else:
            missing.append(label)
    for name, label in (("device", "device"), ("torch_version", "torch")):
        if re.fullmatch(r"[\w.+:-]+", str(result.get(name, ""))):
            rows[label] = str(result[name])
        else:
            missing.append(label)
    return rows


def _use(config: PretrainedConfig) -> str:
    call = "model(tokens).logits  # of the symbol after each of tokens (B, T)"
    if config.level != "symbol":
        call = 'print(model.generate("The ", num_tokens=100, temperature=0.8))'
    lines = [
        "## Use",
        "",
        "```python",
        "from deepeq.train import PretrainedModel",
        "",
        'model = PretrainedModel.from_pretrained("FOLDER")  # or the name of a repository',
        call,
        "```",
    ]
    if _corpus(config.data)[0] != "own":
        lines += ["", "`deepeq eval --run FOLDER --split test` measures it again."]
    return "\n".join(lines)


def _corpus(data: DataConfig | None) -> tuple[str, str]:
    """Name and title of a corpus; of the user's own text, nothing is told."""
    if data is None or data.files or data.corpus == "folder":
        return "own", "text of its owner"
    if data.corpus == "copy_memory":
        return data.corpus, f"the copy-memory task at T = {data.copy_memory.blank_len}"
    if data.corpus == "pydoc":
        return data.corpus, "the language reference of Python"
    return data.corpus, PUBLISHED[data.corpus].title


def _metric(config: PretrainedConfig) -> tuple[str, str]:
    (name,) = quality(config.level, 0.0)
    return name, _QUALITIES[name]


def _table(heading: str, rows: dict[str, str]) -> str:
    return "\n".join([heading, "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _shown(value: Any) -> str:
    if not _is_number(value):
        return "not recorded"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
