"""Generation: what it samples, from which distribution, for one text and for many."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from deepeq import DEQ, Broyden, FixedPointIteration
from deepeq.cli import main
from deepeq.models import LanguageModel, ModelConfig, RecurrentConfig, TiedNetwork, TransformerConfig, TrellisConfig
from deepeq.train import RunConfig, generate
from deepeq.train.generation import Decoding, Sampling
from tests.train.conftest import with_layer

PROMPT = torch.arange(10) % 7


def make_model(config: RunConfig, **values: object) -> LanguageModel:
    """A Transformer whose equilibrium is one: injected values outweigh the residual connection."""
    model = LanguageModel(7, with_layer(config, **{"init_std": 0.15, "memory_len": 20, **values}).model).double().eval()
    network = model.network
    assert isinstance(network, TiedNetwork)
    with torch.no_grad():
        model.embedding.tables[0] *= 5
        network.cell.output_projection.weight *= 8
    network.core = DEQ(network.cell, solver=Broyden(rtol=1e-11, max_steps=200))
    return model


def sampled(model: LanguageModel, prompts: list[Tensor], **values: object) -> list[list[int]]:
    """The tokens of each prompt."""
    options = {"num_tokens": 4, "temperature": 0.0, **values}
    return [list(text) for text in zip(*generate(model, prompts, **options), strict=True)]  # pyright: ignore


@torch.no_grad()
def greedy(model: LanguageModel, prompt: Tensor, num_tokens: int = 4) -> list[int]:
    """The likeliest tokens, each from solving for the whole prefix."""
    found: list[int] = []
    for _ in range(num_tokens):
        tokens = torch.cat([prompt, torch.tensor(found, dtype=torch.int64)])
        found.append(int(model(tokens.unsqueeze(0)).logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("memory_len", [0, 20])
def test_generation_sees_the_whole_prompt_whatever_the_segments(config: RunConfig, memory_len: int) -> None:
    model = make_model(config, memory_len=memory_len)
    for segment_len in (3, 10, 20) if memory_len else (20,):
        assert sampled(model, [PROMPT], segment_len=segment_len) == [greedy(model, PROMPT)]


def test_generation_from_a_trellis_network_sees_the_whole_prompt(config: RunConfig) -> None:
    layer = TrellisConfig(d_input=8, d_hidden=12, d_output=8, init_std=0.3)
    model = LanguageModel(7, replace(config.model, layer=layer)).double().eval()
    network = model.network
    assert isinstance(network, TiedNetwork)
    network.core = DEQ(network.cell, solver=FixedPointIteration(rtol=1e-12, max_steps=200))
    prompts = [PROMPT, PROMPT[:3]]
    for segment_len in (3, 20):
        assert sampled(model, prompts, segment_len=segment_len) == [greedy(model, prompt) for prompt in prompts]


def test_memory_reaches_as_far_as_it_is_asked_to(config: RunConfig) -> None:
    model = make_model(config, memory_len=1)
    assert sampled(model, [PROMPT], memory_len=30, num_tokens=12) == [greedy(model, PROMPT, 12)]
    assert sampled(model, [PROMPT], memory_len=0, segment_len=30, num_tokens=12) == [greedy(model, PROMPT, 12)]
    changed = PROMPT.clone()
    changed[:5] = (changed[:5] + 1) % 7
    texts = [Decoding(model, tokens.unsqueeze(0), memory_len=0, segment_len=5) for tokens in (PROMPT, changed)]
    torch.testing.assert_close(texts[0].log_probs, texts[1].log_probs)  # a window of five
    for text in texts:
        text.advance([3])
    torch.testing.assert_close(texts[0].log_probs, texts[1].log_probs)


@pytest.mark.parametrize("kind", ["transformer", "trellis", "transformer_xl", "lstm", "no_memory"])
def test_text_of_a_prompt_does_not_depend_on_its_batch_mates(config: RunConfig, kind: str) -> None:
    layers = {
        "transformer": ModelConfig(layer=replace(TransformerConfig(d_model=16, d_inner=16, num_heads=2), memory_len=6)),
        "trellis": ModelConfig(layer=TrellisConfig(d_input=8, d_hidden=12, d_output=8)),
        "transformer_xl": ModelConfig(layer=TransformerConfig(d_model=16, d_inner=16), depth=2, tied=False),
        "lstm": ModelConfig(layer=RecurrentConfig(d_input=8, d_hidden=8), depth=1, tied=False),
        "no_memory": ModelConfig(layer=TransformerConfig(d_model=16, d_inner=16, memory_len=0)),
    }
    model = LanguageModel(7, layers[kind]).double().eval()
    if isinstance(model.network, TiedNetwork):
        # Products of a batch round differently than those of one text, which accelerated solvers can amplify to another
        # token where they are far from an equilibrium; plain iteration does not.
        assert isinstance(model.network.core, DEQ)
        model.network.core.solver = FixedPointIteration(rtol=1e-3, max_steps=12)
    prompts = [PROMPT, PROMPT[:3], PROMPT[2:5], PROMPT[:1]]
    options = {"num_tokens": 12, "temperature": 1.0, "segment_len": 4, "seed": 5}
    together = sampled(model, prompts, **options)
    assert sampled(model, prompts[:1], **options) == together[:1]
    assert sampled(model, [PROMPT[:2], *prompts[1:]], **options)[1:] == together[1:]
    assert len({tuple(text) for text in sampled(model, [PROMPT] * 3, **options)}) == 3


def test_seed_decides_the_text(config: RunConfig) -> None:
    model = make_model(config)
    texts = [sampled(model, [PROMPT], num_tokens=20, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


LOG_PROBS = torch.tensor([[0.1, 0.5, 0.2, 0.15, 0.05]], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [0.1, 0.5, 0.2, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.01, 0.25, 0.04, 0.0225, 0.0025]),
        ({"top_k": 2}, [0, 5, 2, 0, 0]),
        ({"top_k": 9}, [0.1, 0.5, 0.2, 0.15, 0.05]),
        ({"top_p": 0.4}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.6}, [0, 5, 2, 0, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.8, "top_k": 3}, [0, 5, 2, 0, 0]),  # of the three, the first two have 0.7 / 0.85
        ({"top_p": 0.75, "temperature": 0.5}, [0, 0.25, 0, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_that_was_asked_for(values: dict, expected: list[float]) -> None:
    sampling, wanted = Sampling(**values), torch.tensor([expected], dtype=torch.float64)
    probabilities = sampling.probabilities(LOG_PROBS)
    torch.testing.assert_close(probabilities / probabilities.sum(), wanted / wanted.sum())
    generators = [torch.Generator().manual_seed(index) for index in range(400)]
    drawn = torch.tensor(sampling.choose(LOG_PROBS.expand(400, 5), generators)).bincount(minlength=5) / 400
    torch.testing.assert_close(drawn.double(), (wanted / wanted.sum())[0], rtol=0, atol=0.08)
    assert set(drawn.nonzero().flatten().tolist()) <= set(wanted[0].nonzero().flatten().tolist())


def test_temperature_zero_takes_the_likeliest() -> None:
    assert Sampling(temperature=0.0, top_p=0.1).choose(LOG_PROBS, []) == [1]


def test_nothing_of_generation_reaches_the_caller(config: RunConfig) -> None:
    model = make_model(config, weight_norm=True)
    tokens = generate(model, [PROMPT], num_tokens=3)
    next(tokens)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    list(tokens)
    model(PROMPT.unsqueeze(0)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_are_normalized_once_for_a_text(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(config, weight_norm=True)
    network = model.network
    assert isinstance(network, TiedNetwork)
    parametrization = network.cell.qkv.parametrizations.weight[0]  # pyright: ignore
    calls, original = [], type(parametrization).forward
    monkeypatch.setattr(type(parametrization), "forward", lambda self, *a: calls.append(self) or original(self, *a))
    plain, texts = greedy(model, PROMPT), []
    calls.clear()
    texts += sampled(model, [PROMPT])
    assert calls.count(parametrization) == 1
    assert texts == [plain]
    assert not parametrize._cache_enabled


def test_no_tokens_cost_nothing(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "predict", lambda *arguments: pytest.fail("solved"))
    assert list(generate(make_model(config), [PROMPT], num_tokens=0)) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": []}, "there is no prompt; give at least one"),
        ({"prompts": [PROMPT[:0]]}, "the prompt is empty; give at least one token"),
        ({"prompts": [PROMPT, PROMPT[:0]]}, "prompt 2 of 2 is empty; give at least one token"),
        ({"prompts": PROMPT}, r"prompt 1 of 10 must be ids \(N,\), got torch.int64 of shape \(\)"),
        ({"prompts": [PROMPT.float()]}, r"the prompt must be ids \(N,\), got torch.float32"),
        ({"prompts": [PROMPT + 1]}, r"the prompt has ids outside 0 .. 6"),
        ({"prompts": [PROMPT - 1]}, r"the prompt has ids outside 0 .. 6"),
        ({"num_tokens": -1}, "num_tokens=-1 must be a whole number >= 0"),
        ({"num_tokens": 1.5}, "num_tokens=1.5 must be a whole number >= 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be >= 0 and finite"),
        ({"temperature": math.nan}, "temperature=nan must be >= 0 and finite"),
        ({"temperature": math.inf}, "temperature=inf must be >= 0 and finite"),
        ({"top_k": -1}, "top_k=-1 must be a whole number >= 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
        ({"top_p": math.nan}, r"top_p=nan must lie in \(0, 1\]"),
        ({"segment_len": 0}, "segment_len=0 must be a whole number >= 1"),
        ({"memory_len": -1}, "memory_len=-1 must be a whole number >= 0"),
        ({"seed": -1}, "seed=-1 must be a whole number >= 0"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be a whole number >= 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_computed(config: RunConfig, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(make_model(config), **{"prompts": [PROMPT], "num_tokens": 1, **values})


def test_memory_of_another_kind_cannot_be_chosen(config: RunConfig) -> None:
    model = LanguageModel(7, replace(config.model, layer=TrellisConfig(d_input=8, d_hidden=12, d_output=8)))
    with pytest.raises(ValueError, match="memory_len=9 must be left out, or 0, for this model"):
        generate(model, [PROMPT], num_tokens=1, memory_len=9)
    assert len(list(generate(model, [PROMPT], num_tokens=2, memory_len=0))) == 2


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_prediction_that_is_no_number_is_reported(config: RunConfig, temperature: str) -> None:
    model = LanguageModel(7, ModelConfig(layer=RecurrentConfig(d_input=8, d_hidden=8), depth=1, tied=False))
    with torch.no_grad():
        model.embedding.tables[0].fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the model predicts nan; its parameters are damaged"):
        next(generate(model, [PROMPT], num_tokens=1, temperature=float(temperature)))


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[[str], Path]:
    """The folder of a very short run on characters or on words."""
    made: dict[str, Path] = {}

    def make(level: str) -> Path:
        if level not in made:
            path = tmp_path_factory.mktemp(level)
            (path / "recipe.yaml").write_text(
                f"data: {{files: ['{text_file}'], level: {level}}}\n"
                "model: {layer: {class_path: deepeq.models.TransformerConfig, "
                "init_args: {d_model: 16, num_heads: 2, d_inner: 32, memory_len: 8}}}\n"
                "train: {steps: 2, batch_size: 4, segment_len: 8, eval_batch_size: 2, accelerator: cpu}\n"
            )
            assert main(["train", "--config", str(path / "recipe.yaml"), "--run.dir", str(path / "run")]) == 0
            made[level] = path / "run"
        return made[level]

    return make


def test_generate_streams_one_prompt_as_text(
    make_run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    texts, run = [], str(make_run("character"))
    capsys.readouterr()
    for options in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--seed", "1", "--top_p", "0.3"]):
        assert main(["generate", "--run", run, "--prompt", "the quick", "--num_tokens", "20", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert texts[0].startswith("the quick")
    assert len(texts[0]) == len("the quick") + 20 + 1


def test_generate_prints_many_prompts_as_lines_of_json(
    make_run: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, file = str(make_run("word")), tmp_path / "prompts.txt"
    file.write_text("the dog\n\nthe quick brown fox jumps over the lazy dog, and the dog\n")
    capsys.readouterr()
    command = ["generate", "--run", run, "--num_tokens", "5", "--prompts_file", str(file), "--memory_len", "30"]
    assert main([*command, "--prompt", "fox", "a zebra sleeps", "--prompt", "the"]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    prompts = ["fox", "a zebra sleeps", "the", "the dog", "the quick brown fox jumps over the lazy dog, and the dog"]
    assert [line["prompt"] for line in lines] == prompts
    assert captured.err == "deepeq: 2 of 19 words are unknown to the model, which reads <unk>\n"
    assert all(line["continuation"] for line in lines)
    assert main(["generate", "--run", run, "--num_tokens", "5", "--prompt", "the"]) == 0
    assert len(capsys.readouterr().out.split()) >= 1
    file.write_text("the\n")
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "the"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is no prompt; give at least one"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--top_p", "0"], "top_p=0.0 must lie in (0, 1]"),
        (["--prompt", "a", "--top_k", "-1"], "top_k=-1 must be a whole number >= 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0 must be >= 0"),
        (["--prompt", "a", "--memory_len", "-1"], "memory_len=-1 must be a whole number >= 0"),
        (["--prompts_file", "nowhere.txt"], "nowhere.txt"),
        (["--prompts_file", sys.executable], "is no text in UTF-8"),
    ],
)
def test_generate_refuses_mistakes_in_one_sentence(
    make_run: Callable[[str], Path], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(make_run("character"))
    capsys.readouterr()
    assert main(["generate", "--run", run, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_bench_runs_the_script_and_passes_its_exit_code_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data-pipeline", "--tokens", "many"]) == 2
    assert "invalid int value: 'many'" in capfd.readouterr().err
    assert main(["bench", "nothing", "--out", "x"]) == 2
    message = capfd.readouterr().err
    assert "'nothing' is no benchmark; there are" in message
    assert "decode" in message


@pytest.mark.slow
def test_benchmark_of_decoding_measures_both_ways(
    make_run: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the process that is started
    run = str(make_run("character"))
    command = ["bench", "decode", "--out", str(tmp_path), "--run", run, "--num_tokens", "8"]
    assert main(command) == 0
    result = json.loads((tmp_path / "decode.json").read_text())
    assert [prompt["prompt_len"] for prompt in result["prompts"]] == [1, 2, 8]
    assert all(prompt["speedup"] > 0 for prompt in result["prompts"])
    assert result["tight"]["log_prob_difference"]["median"] < 1e-2
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert "times faster" in capfd.readouterr().err
