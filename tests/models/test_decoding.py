"""Decoding: a position at a time gives what solving for the whole prefix gives, at the cost of one position."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import deepeq
from deepeq.models import (
    KeyValues,
    LanguageModel,
    LayerConfig,
    ModelConfig,
    RecurrentConfig,
    TCNConfig,
    TiedNetwork,
    TransformerCell,
    TransformerConfig,
    TrellisConfig,
    join_memories,
)
from deepeq.nn import causal_mask, relative_attention, single_query_attention

TRANSFORMER = TransformerConfig(d_model=16, num_heads=2, d_inner=24, memory_len=20, init_std=0.15)
TRELLIS = TrellisConfig(d_input=6, d_hidden=8, d_output=6, init_std=0.2)
VARIANTS = {
    "post": TRANSFORMER,
    "pre": replace(TRANSFORMER, norm="pre"),
    "weight_norm": replace(TRANSFORMER, weight_norm=True),
    "window": replace(TRANSFORMER, window=4),
    "head_dim": replace(TRANSFORMER, head_dim=3),
    "trellis": TRELLIS,
    "dilated_trellis": replace(TRELLIS, dilation=2, kernel_size=3),
}
SOLVER = deepeq.Broyden(rtol=1e-11, max_steps=300, history_size=100)
EXACT = deepeq.Equilibrium(solver=SOLVER)


def make_model(layer: LayerConfig = TRANSFORMER, **values: object) -> LanguageModel:
    """A model in float64 whose equilibrium is one: injected values outweigh the residual connection."""
    model = LanguageModel(11, ModelConfig(layer=layer, **values)).double().eval()  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        model.embedding.tables[0] *= 5
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):  # those of attention, zero at first
                parameter.normal_(std=0.5)
        if isinstance(model.network, TiedNetwork) and isinstance(layer, TransformerConfig):
            model.network.cell.output_projection.weight *= 8
    return model


def cell_of(model: LanguageModel) -> TransformerCell:
    assert isinstance(model.network, TiedNetwork)
    assert isinstance(model.network.cell, TransformerCell)
    return model.network.cell


def tokens_of(batch_size: int, length: int) -> Tensor:
    return torch.randint(11, (batch_size, length))


@torch.no_grad()
def decode(model: LanguageModel, tokens: Tensor, sizes: list[int], memory: Any, how: deepeq.deq.How = EXACT) -> Tensor:
    """Log-probabilities after the last position of each segment, `(B, len(sizes), V)`."""
    found = []
    for segment in tokens.split(sizes, dim=1):
        output = model.predict(segment, memory, how=how)
        memory = output.memory
        found.append(output.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 1, 1, 3, 1, 1]])
def test_decoded_logits_equal_those_of_the_whole_prefix(name: str, sizes: list[int]) -> None:
    model, tokens = make_model(VARIANTS[name]), tokens_of(2, 12)
    with torch.no_grad():
        whole = model(tokens, how=EXACT)
    assert whole.solution.result is deepeq.Result.CONVERGED
    memory = model.start_memory(2)
    assert isinstance(memory, KeyValues) == isinstance(VARIANTS[name], TransformerConfig)
    last = torch.tensor(sizes).cumsum(0) - 1
    actual = decode(model, tokens, sizes, memory)
    torch.testing.assert_close(actual, whole.logits[:, last], rtol=1e-8, atol=1e-8)


def test_prediction_is_that_of_the_last_position() -> None:
    model, tokens = make_model(), tokens_of(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(model.predict(tokens).logits, model(tokens).logits[:, -1:])
    output = model.predict(tokens)
    assert output.logits is not None
    assert output.logits.requires_grad
    assert not output.memory.z.requires_grad


@pytest.mark.parametrize("how", [deepeq.Pieces(equilibrium=EXACT, length=2), deepeq.Stack(depth=3)])
def test_decoding_works_however_the_cell_is_solved(how: deepeq.deq.How) -> None:
    model, tokens = make_model(), tokens_of(2, 9)
    sizes = [4, 1, 3, 1]
    plain = decode(model, tokens, sizes, None, how)
    torch.testing.assert_close(decode(model, tokens, sizes, model.start_memory(2), how), plain, rtol=1e-9, atol=1e-9)


def test_kept_positions_are_those_of_the_memory_that_was_asked_for() -> None:
    model, tokens = make_model(replace(TRANSFORMER, memory_len=9, eval_memory_len=3)), tokens_of(2, 14)
    sizes = [5, *[1] * 9]
    plain = decode(model, tokens, sizes, None)
    torch.testing.assert_close(decode(model, tokens, sizes, model.start_memory(2)), plain)
    longer = decode(model, tokens, sizes, model.start_memory(2, length=6))
    assert not torch.allclose(longer[:, 1:], plain[:, 1:])
    cell_of(model).config = replace(TRANSFORMER, memory_len=6)
    torch.testing.assert_close(longer, decode(model, tokens, sizes, None))
    assert model.start_memory(2, length=6).limit == 6


def test_decoding_without_memory_in_the_configuration_keeps_what_is_asked_for() -> None:
    model, tokens = make_model(replace(TRANSFORMER, memory_len=0)), tokens_of(1, 7)
    assert model.start_memory(1) is None
    with torch.no_grad():
        whole = model(tokens, how=EXACT).logits
    torch.testing.assert_close(
        decode(model, tokens, [3, 1, 2, 1], model.start_memory(1, length=7))[:, -1], whole[:, -1]
    )


@pytest.mark.parametrize("training", [True, False])
def test_texts_of_different_lengths_share_a_batch(training: bool) -> None:
    model = make_model().train(training)
    texts, continuation = [tokens_of(1, length) for length in (1, 6, 3)], tokens_of(3, 4)
    memories, expected = [], []
    for text, more in zip(texts, continuation, strict=True):
        memory = model.start_memory(1, length=7)
        with torch.no_grad():
            memories.append(model.predict(text, memory, how=EXACT).memory)
        expected.append(decode(model, more.unsqueeze(0), [1, 2, 1], memories[-1]))
    joined = join_memories([join_memories(memories[:2]), memories[2]])
    assert joined.empty.tolist() == [5, 0, 3]
    torch.testing.assert_close(decode(model, continuation, [1, 2, 1], joined), torch.cat(expected))
    with torch.no_grad():
        later = model.predict(continuation, joined, how=EXACT).memory
    assert later.empty.tolist() == [2, 0, 0]  # three of ten slots are dropped


def test_memories_join_where_their_lengths_agree() -> None:
    model = make_model(TRELLIS)
    with torch.no_grad():
        memories = [model.predict(tokens_of(2, length)).memory for length in (1, 5)]
    joined = join_memories(memories)
    assert torch.equal(joined.h, torch.cat([memory.h for memory in memories]))
    stack = make_model(TRANSFORMER, depth=2, tied=False)
    with torch.no_grad():
        memories = [stack.predict(tokens_of(2, length)).memory for length in (2, 5, 5)]
    assert join_memories(memories) is None
    assert join_memories(memories[1:])[1].z.shape == (4, 5, 16)
    assert join_memories([None, None]) is None


def test_cost_of_a_token_grows_with_attention_alone() -> None:
    model, num_evals, counted = make_model(), 3, []
    how = deepeq.Stack(depth=num_evals)
    for length in (8, 16):
        with torch.no_grad():
            memory = model.predict(tokens_of(1, length), model.start_memory(1), how=how).memory
            memory = model.predict(tokens_of(1, 1), memory, how=how).memory  # here the table of position keys doubles
            with FlopCounterMode(display=False) as flops:
                model.predict(tokens_of(1, 1), memory, how=how)
        counted.append(flops.get_total_flops())
    attention = 2 * 2 * 16  # keys and values of one more position
    assert counted[1] - counted[0] == 8 * num_evals * attention


def test_solve_starts_from_the_equilibrium_of_the_position_most_alike() -> None:
    model, tokens = make_model(), torch.tensor([[3, 7, 1, 5, 2, 3, 7]])
    cell = cell_of(model)
    with torch.no_grad():
        memory = model.predict(tokens[:, :6], model.start_memory(1), how=EXACT).memory
        guess = cell.guess(model.embedding(tokens[:, 6:]), memory)
        torch.testing.assert_close(guess, memory.z[:, 1:2])
        layer, x = deepeq.DEQ(cell, solver=SOLVER), model.embedding(tokens[:, 6:])
        started, afresh = model.predict(tokens[:, 6:], memory, how=EXACT).solution, layer(x, memory=memory)
        from_guess = layer(x, guess, memory)
        torch.testing.assert_close(started.residual_history, from_guess.residual_history, rtol=1e-6, atol=0)
        assert not torch.allclose(started.residual_history[0], afresh.residual_history[0])
        torch.testing.assert_close(started.value, afresh.value)
        assert cell.guess(model.embedding(tokens[:, 5:]), memory) is None
        assert cell.guess(model.embedding(tokens[:, :1]), model.start_memory(1)) is None
        first = model.predict(tokens[:, :1], model.start_memory(1)).memory
        torch.testing.assert_close(cell.guess(model.embedding(tokens[:, 1:2]), first), first.z)


def test_guess_does_not_look_at_empty_slots() -> None:
    model = make_model()
    with torch.no_grad():
        short, long = (model.predict(tokens_of(1, length), model.start_memory(1)).memory for length in (2, 6))
        memory = join_memories([short, long])._replace(z=-torch.ones(2, 6, 16, dtype=torch.float64))
        memory.x[0, :4], memory.z[0, :4] = 100.0, 7.0
        guess = cell_of(model).guess(model.embedding(tokens_of(2, 1)), memory)
    assert bool((guess == -1.0).all())


def test_memory_is_not_changed_by_what_follows() -> None:
    model = make_model()
    tokens = tokens_of(2, 6)
    with torch.no_grad():
        memory = model.predict(tokens[:, :4], model.start_memory(2)).memory
        first = decode(model, tokens[:, 4:], [1, 1], memory)
        decode(model, (tokens[:, 4:] + 1) % 11, [1, 1], memory)
    torch.testing.assert_close(decode(model, tokens[:, 4:], [1, 1], memory), first, rtol=0, atol=0)


def test_dropout_in_training_acts_on_decoding_too() -> None:
    model = make_model(replace(TRANSFORMER, attention_dropout=0.5)).train()
    with torch.no_grad():
        memory = model.predict(tokens_of(1, 8), model.start_memory(1)).memory
        token = tokens_of(1, 1)
        assert not torch.allclose(model.predict(token, memory).logits, model.predict(token, memory).logits)
        model.eval()
        torch.testing.assert_close(model.predict(token, memory).logits, model.predict(token, memory).logits)


def test_networks_whose_memory_suits_decoding_start_with_none() -> None:
    for layer, values in (
        (TRANSFORMER, {"depth": 2, "tied": False}),
        (TCNConfig(d_input=6, d_hidden=6, kernel_size=2), {"depth": 2, "tied": False}),
        (RecurrentConfig(d_input=6, d_hidden=6), {"depth": 1, "tied": False}),
        (replace(TRANSFORMER, window=1), {}),
        (TRELLIS, {}),
    ):
        assert make_model(layer, **values).start_memory(2, length=5) is None


def test_attention_of_one_query_is_the_last_row_of_relative_attention() -> None:
    heads, length, channels = 6, 5, 3  # two samples of three heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    query, key, value = draw(2, 3, 1, channels), draw(2, 3, length, channels), draw(2, 3, length, channels)
    position, content_bias, position_bias = draw(3, length, channels), draw(3, 1, channels), draw(3, 1, channels)
    expected = relative_attention(
        query,
        key,
        value,
        position=position,
        content_bias=content_bias,
        position_bias=position_bias,
        mask=causal_mask(1, length, like=query),
    )
    keys, values = (key + position).flatten(0, 1), value.flatten(0, 1)
    bias = ((position_bias - content_bias) * position).sum(2) / channels**0.5  # (H, S)
    bias = bias.repeat(2, 1).unsqueeze(1)
    actual = single_query_attention(
        (query + content_bias).flatten(0, 1),
        keys[:, -1:],
        values[:, -1:],
        earlier_key=keys[:, :-1],
        earlier_value=values[:, :-1],
        earlier_bias=bias[:, :, :-1],
        bias=bias[:, :, -1:],
    )
    torch.testing.assert_close(actual, expected.flatten(0, 1))
    assert actual.shape == (heads, 1, channels)
