"""Sizes and costs against arithmetic by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepeq import GMRES, Anderson, Broyden, FixedPointIteration
from deepeq.cli import main
from deepeq.data import DataConfig
from deepeq.models import LanguageModel, ModelConfig, TransformerConfig, TrellisConfig
from deepeq.train import EquilibriumConfig, RunConfig, TrainConfig, describe_model

EQUILIBRIUM = EquilibriumConfig(
    solver=Anderson(history_size=3, max_steps=20),
    backward_solver=GMRES(max_steps=7),
    eval_solver=Broyden(history_size=5, max_steps=9),
)
TRELLIS = RunConfig(
    data=DataConfig(corpus="penn_treebank", unit="word"),
    model=ModelConfig(layer=TrellisConfig(d_input=4, d_hidden=6, d_output=4)),
    equilibrium=EQUILIBRIUM,
    train=TrainConfig(segment_len=10),
)
TRANSFORMER = replace(
    TRELLIS, model=ModelConfig(layer=TransformerConfig(d_model=8, num_heads=2, d_inner=12, memory_len=5))
)


def test_parameters_of_a_trellis_network_are_those_of_its_equations() -> None:
    info = describe_model(TRELLIS)
    convolutions = 4 * 6 * (2 * 4) + 4 * 6 * (2 * 6) + 4 * 6  # inputs, state, bias
    normalization = 2 * 4 * 6  # one length for each row
    assert info["num_params_non_embedding"] == convolutions + normalization
    assert info["num_params_embedding"] == 10_000 * 4 + 10_000
    assert info["num_params"] == info["num_params_embedding"] + info["num_params_non_embedding"]
    assert info["num_params"] == LanguageModel(10_000, TRELLIS.model).num_params


def test_costs_of_a_trellis_network_are_those_of_one_convolution() -> None:
    info = describe_model(TRELLIS)
    assert info["flops_per_evaluation"] == 2 * 10 * (2 * 6) * (4 * 6)
    assert info["state_size"] == 2 * 10 * 6
    assert info["state_bytes"] == 4 * info["state_size"]
    # Taps: twelve rows of eleven positions are copied to ten of twelve, after joining history and state.
    join, taps = (6 + 60) + 66, 2 * 66 + 120  # what each reads and writes, in numbers
    product = 120 + 288 + 240
    gates = 3 * 240 + 3 * 2 * 60 + 2 * 60  # adding the input's part, three sigmoids, one hyperbolic tangent
    update = (6 + 60 + 66) + 3 * 180 + 120 + 180  # shifting c; two products and a sum; tanh; a product
    assert info["bytes_per_evaluation"] == pytest.approx(4 * (join + taps + product + gates + update), rel=0.1)


def test_costs_of_a_transformer_count_attention_over_its_memory() -> None:
    queries, keys, d_model = 10, 15, 8
    projections = 2 * queries * d_model * (3 * d_model + d_model + 2 * 12)
    attention = 3 * 2 * queries * keys * d_model  # by content, by distance, over values
    assert describe_model(TRANSFORMER)["flops_per_evaluation"] == projections + attention


def test_histories_are_the_vectors_that_solvers_keep() -> None:
    info = describe_model(TRANSFORMER)
    assert info["solver_history_bytes"] == 4 * 80 * (1 + 3)
    assert info["backward_solver_history_bytes"] == 4 * 80 * (
        2 + 5
    )  # of 7 steps, the first and the last need no vector of the space
    assert info["eval_solver_history_bytes"] == 4 * 80 * 5
    plain = replace(TRANSFORMER, equilibrium=replace(EQUILIBRIUM, solver=FixedPointIteration()))
    assert describe_model(plain)["solver_history_bytes"] == 0


def test_explicit_network_is_counted_as_a_whole() -> None:
    explicit = replace(TRANSFORMER, equilibrium=EquilibriumConfig(), model=replace(TRANSFORMER.model, depth=3))
    info = describe_model(explicit)
    assert info["depth"] == 3
    assert "state_size" not in info
    assert info["num_params"] == describe_model(TRANSFORMER)["num_params"]
    attention = 3 * 2 * 10 * 15 * 8
    injection = 2 * 8 * (10 * 24 + 10 * 16 * 2 - 5 * 16 * 2 + 15 * 8)  # x; memory's keys and values, twice; positions
    layers = 3 * (2 * 10 * 8 * (3 * 8 + 8 + 2 * 12) + attention)
    assert info["flops_per_evaluation"] == pytest.approx(layers + injection, rel=0.02)


def test_pieces_are_what_is_counted_where_a_segment_is_solved_in_pieces() -> None:
    pieces = replace(TRELLIS, equilibrium=replace(EQUILIBRIUM, piece_len=4))
    info = describe_model(pieces)
    assert (info["segment_len"], info["solve_len"], info["state_size"]) == (10, 4, 2 * 4 * 6)
    assert info["flops_per_evaluation"] == 2 * 4 * (2 * 6) * (4 * 6)


class NothingAllocated(TorchDispatchMode):
    """Fails on the first real tensor with more than a thousand numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            assert not isinstance(leaf, Tensor) or leaf.is_meta or leaf.numel() < 1000, func
        return result


def test_nothing_is_allocated() -> None:
    with NothingAllocated():
        info = describe_model(TRANSFORMER, vocab_size=10**9)
    assert info["num_params_embedding"] == 10**9 * 9
    with pytest.raises(AssertionError), NothingAllocated():
        torch.zeros(2000)


def test_command_prints_json_and_reads_the_text_where_its_size_is_not_published(
    text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--data.files", str(text_file)]) == 0
    from_text = json.loads(capsys.readouterr().out)
    assert main(["info", "--data.files", str(text_file), "--vocab_size", "7"]) == 0
    given = json.loads(capsys.readouterr().out)
    assert given["vocab_size"] == 7 < from_text["vocab_size"] < 40
