"""The language model around the cell."""

import math

import torch

import deepeq
from deepeq.models import LanguageModel, TransformerConfig, nll

CONFIG = TransformerConfig(d_model=16, num_heads=2, d_inner=32, memory_len=6)


def contractive_model() -> LanguageModel:
    """A model in float64 whose plain iteration converges: the injected values outweigh the residual connection."""
    model = LanguageModel(11, TransformerConfig(d_model=16, num_heads=2, d_inner=32, memory_len=6, init_std=0.15))
    with torch.no_grad():
        model.embedding *= 5
        model.cell.output.weight *= 8
    return model.double()


def test_core_may_be_swapped_without_touching_the_parameters() -> None:
    model = LanguageModel(11, CONFIG)
    names, parameters = set(model.state_dict()), list(model.parameters())
    model.core = deepeq.Unrolled(model.cell, 3)
    assert set(model.state_dict()) == names
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    tokens = torch.randint(11, (2, 5))
    assert model(tokens).solution.num_evals == 3


def test_stack_and_equilibrium_predict_the_same_in_the_limit() -> None:
    model = contractive_model()
    tokens = torch.randint(11, (2, 5))
    model.core = deepeq.DEQ(model.cell, solver=deepeq.Broyden(rtol=1e-12, max_steps=100))
    equilibrium = model(tokens).logits
    model.core = deepeq.Unrolled(model.cell, 200)
    torch.testing.assert_close(equilibrium, model(tokens).logits, rtol=1e-9, atol=1e-9)


def test_softmax_is_tied_to_the_embedding() -> None:
    model = LanguageModel(11, CONFIG)
    sizes = [p.numel() for p in model.cell.parameters()]
    assert model.num_params == sum(sizes) + 11 * 16 + 11
    tokens = torch.randint(11, (2, 5))
    output = model(tokens)
    expected = output.solution.value @ model.embedding.T + model.bias
    torch.testing.assert_close(output.logits, expected)


def test_prediction_is_causal_across_segments() -> None:
    model = contractive_model()
    model.core = deepeq.DEQ(model.cell, solver=deepeq.Broyden(rtol=1e-11, max_steps=100))
    tokens = torch.randint(11, (2, 8))
    whole = model(tokens).logits
    first = model(tokens[:, :4])
    second = model(tokens[:, 4:], first.memory)
    halves = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(halves, whole, rtol=1e-7, atol=1e-7)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    torch.testing.assert_close(model(changed).logits[:, :5], whole[:, :5], rtol=1e-7, atol=1e-7)


def test_untrained_model_is_near_the_uniform_loss() -> None:
    model = LanguageModel(50, CONFIG)
    tokens = torch.randint(50, (4, 16))
    assert abs(nll(model(tokens).logits, tokens.roll(1)).item() - math.log(50)) < 0.5
