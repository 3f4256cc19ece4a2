"""Generation: what it samples, from which distribution, for one text and for many."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from deepeq import Broyden, Equilibrium, FixedPointIteration
from deepeq.models import (
    Decoding,
    LanguageModel,
    ModelConfig,
    RecurrentConfig,
    Sampling,
    TiedNetwork,
    TransformerConfig,
    TrellisConfig,
    generate,
)

PROMPT = torch.arange(10) % 7
EXACT = Equilibrium(solver=Broyden(rtol=1e-11, max_steps=200))


def make_model(**values: object) -> LanguageModel:
    """A Transformer whose equilibrium is one: injected values outweigh the residual connection."""
    layer = {"d_model": 16, "num_heads": 2, "d_inner": 32, "init_std": 0.15, "memory_len": 20, **values}
    model = LanguageModel(7, ModelConfig(layer=TransformerConfig(**layer))).double().eval()  # pyright: ignore
    network = model.network
    assert isinstance(network, TiedNetwork)
    with torch.no_grad():
        model.embedding.tables[0] *= 5
        network.cell.output_projection.weight *= 8
    return model


def sampled(model: LanguageModel, prompts: list[Tensor], **values: object) -> list[list[int]]:
    """The tokens of each prompt."""
    options = {"how": EXACT, "num_tokens": 4, "temperature": 0.0, **values}
    return [list(text) for text in zip(*generate(model, prompts, **options), strict=True)]  # pyright: ignore


@torch.no_grad()
def greedy(model: LanguageModel, prompt: Tensor, num_tokens: int = 4) -> list[int]:
    """The likeliest tokens, each from solving for the whole prefix."""
    found: list[int] = []
    for _ in range(num_tokens):
        tokens = torch.cat([prompt, torch.tensor(found, dtype=torch.int64)])
        found.append(int(model(tokens.unsqueeze(0), how=EXACT).logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("memory_len", [0, 20])
def test_generation_sees_the_whole_prompt_whatever_the_segments(memory_len: int) -> None:
    model = make_model(memory_len=memory_len)
    for segment_len in (3, 10, 20) if memory_len else (20,):
        assert sampled(model, [PROMPT], segment_len=segment_len) == [greedy(model, PROMPT)]


def test_generation_from_a_trellis_network_sees_the_whole_prompt() -> None:
    layer = TrellisConfig(d_input=8, d_hidden=12, d_output=8, init_std=0.3)
    model = LanguageModel(7, ModelConfig(layer=layer)).double().eval()
    prompts = [PROMPT, PROMPT[:3]]
    for segment_len in (3, 20):
        assert sampled(model, prompts, segment_len=segment_len) == [greedy(model, prompt) for prompt in prompts]


def test_memory_reaches_as_far_as_it_is_asked_to() -> None:
    model = make_model(memory_len=1)
    assert sampled(model, [PROMPT], memory_len=30, num_tokens=12) == [greedy(model, PROMPT, 12)]
    assert sampled(model, [PROMPT], memory_len=0, segment_len=30, num_tokens=12) == [greedy(model, PROMPT, 12)]
    changed = PROMPT.clone()
    changed[:5] = (changed[:5] + 1) % 7
    texts = [
        Decoding(model, tokens.unsqueeze(0), how=EXACT, memory_len=0, segment_len=5) for tokens in (PROMPT, changed)
    ]
    torch.testing.assert_close(texts[0].log_probs, texts[1].log_probs)  # a window of five
    for text in texts:
        text.advance([3])
    torch.testing.assert_close(texts[0].log_probs, texts[1].log_probs)


@pytest.mark.parametrize("kind", ["transformer", "trellis", "transformer_xl", "lstm", "no_memory"])
def test_text_of_a_prompt_does_not_depend_on_its_batch_mates(kind: str) -> None:
    layers = {
        "transformer": ModelConfig(layer=replace(TransformerConfig(d_model=16, d_inner=16, num_heads=2), memory_len=6)),
        "trellis": ModelConfig(layer=TrellisConfig(d_input=8, d_hidden=12, d_output=8)),
        "transformer_xl": ModelConfig(layer=TransformerConfig(d_model=16, d_inner=16), depth=2, tied=False),
        "lstm": ModelConfig(layer=RecurrentConfig(d_input=8, d_hidden=8), depth=1, tied=False),
        "no_memory": ModelConfig(layer=TransformerConfig(d_model=16, d_inner=16, memory_len=0)),
    }
    model = LanguageModel(7, layers[kind]).double().eval()
    # Products of a batch round differently than those of one text, which accelerated solvers can amplify to another
    # token where they are far from an equilibrium; plain iteration does not.
    plain = Equilibrium(solver=FixedPointIteration(rtol=1e-3, max_steps=12), on_failure="ignore")
    how = plain if isinstance(model.network, TiedNetwork) else None
    prompts = [PROMPT, PROMPT[:3], PROMPT[2:5], PROMPT[:1]]
    options = {"how": how, "num_tokens": 12, "temperature": 1.0, "segment_len": 4, "seed": 5}
    together = sampled(model, prompts, **options)
    assert sampled(model, prompts[:1], **options) == together[:1]
    assert sampled(model, [PROMPT[:2], *prompts[1:]], **options)[1:] == together[1:]
    assert len({tuple(text) for text in sampled(model, [PROMPT] * 3, **options)}) == 3


def test_seed_decides_the_text() -> None:
    model = make_model()
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


def test_nothing_of_generation_reaches_the_caller() -> None:
    model = make_model(weight_norm=True)
    tokens = generate(model, [PROMPT], num_tokens=3)
    next(tokens)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    list(tokens)
    model(PROMPT.unsqueeze(0)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_are_normalized_once_for_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(weight_norm=True)
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


def test_no_tokens_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "predict", lambda *arguments: pytest.fail("solved"))
    assert list(generate(make_model(), [PROMPT], num_tokens=0)) == []


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
        ({"seed": 2**63}, r"seed=9223372036854775808 must be < 2\^63"),
    ],
)
def test_mistakes_are_named_before_anything_is_computed(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(make_model(), **{"prompts": [PROMPT], "num_tokens": 1, **values})


def test_memory_of_another_kind_cannot_be_chosen() -> None:
    model = LanguageModel(7, ModelConfig(layer=TrellisConfig(d_input=8, d_hidden=12, d_output=8)))
    with pytest.raises(ValueError, match="memory_len=9 must be left out, or 0, for this model"):
        generate(model, [PROMPT], num_tokens=1, memory_len=9)
    assert len(list(generate(model, [PROMPT], num_tokens=2, memory_len=0))) == 2


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_prediction_that_is_no_number_is_reported(temperature: str) -> None:
    model = LanguageModel(7, ModelConfig(layer=RecurrentConfig(d_input=8, d_hidden=8), depth=1, tied=False))
    with torch.no_grad():
        model.embedding.tables[0].fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the model predicts nan; its parameters are damaged"):
        next(generate(model, [PROMPT], num_tokens=1, temperature=float(temperature)))
