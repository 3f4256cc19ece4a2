"""The counter of the memory benchmark, and what it finds."""

import json
import sys
from dataclasses import replace
from functools import partial

import memory
import pytest
import torch
from memory import LiveBytes, Size, Step, broyden, count, equilibrium, stack
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepeq import GMRES, ImplicitAdjoint
from deepeq.models import LayerStack, TransformerConfig, TrellisConfig

TRELLIS = TrellisConfig(d_input=6, d_hidden=16, d_output=8, hidden_dropout=0.1, weight_dropout=0.3)
TRANSFORMER = TransformerConfig(
    d_model=16, num_heads=2, d_inner=24, memory_len=7, weight_norm=True, hidden_dropout=0.1, attention_dropout=0.1
)
SIZE = Size(2, 9)
STATE_BYTES = {TRELLIS: 4 * 2 * 9 * 2 * 16, TRANSFORMER: 4 * 2 * 9 * 16}
STEPS, HISTORY = 5, 3
RULE = broyden(STEPS, HISTORY)


def test_a_storage_counts_once_and_while_it_lives():
    with LiveBytes() as counter:
        a = torch.zeros(10, 10)
        view = a.t()[2:]
        b = a + 1
        b.add_(1)
        assert counter.live == 800
        del a
        assert counter.live == 800  # the view needs it
        del view
        assert counter.live == 400
        counter.restart()
        b = b.double()
    assert counter.live == 800
    assert counter.peak == 1200


def test_what_autograd_keeps_is_counted():
    with LiveBytes() as counter:
        x = torch.zeros(100, requires_grad=True)
        loss = x.exp().exp().sum()
        assert counter.live == 1200 + 4  # x, the results of both exponentials, the sum
        loss.backward()
        # Each product with a result makes a new gradient; the second result is gone when the first one's is made.
        assert counter.peak == 1600 + 8
        assert counter.lived_at_peak(x)
    assert counter.live == 800 + 4


@pytest.mark.parametrize("config", [TRELLIS, TRANSFORMER], ids=["trellis", "transformer"])
@pytest.mark.parametrize(
    "network",
    [
        partial(stack, depth=5),
        partial(stack, depth=5, checkpoint=True),
        partial(equilibrium, solver=RULE, backward=RULE),
        partial(equilibrium, solver=RULE, backward=GMRES(max_steps=4, restart=2)),
        partial(equilibrium, solver=RULE, backward=RULE, checkpoint=True),
        partial(equilibrium, solver=RULE, backward=RULE, piece_len=4),
    ],
    ids=["stack", "stack_checkpoint", "broyden", "gmres", "checkpoint", "pieces"],
)
def test_the_count_from_shapes_is_that_with_data(config, network):
    make = network(config)
    with sdpa_kernel(SDPBackend.MATH):  # not one that the processor chooses
        counted, with_data = count(make, SIZE), count(make, SIZE, data=True)
    # One vector of a solver's history more or less would be a state; units of the parts of a gradient depend on data.
    assert counted.peak == pytest.approx(with_data.peak, abs=0.75 * STATE_BYTES[config])
    assert counted._replace(peak=0) == with_data._replace(peak=0)
    assert counted.parameters == counted.gradients == 4 * sum(p.numel() for p in config.build().parameters())
    assert counted.peak > counted.start > counted.parameters


def test_the_count_from_shapes_is_that_with_data_for_layers_of_their_own():
    make = partial(LayerStack, TRANSFORMER, 3)
    assert count(make, SIZE) == count(make, SIZE, data=True)


def test_all_steps_are_taken():
    counted = count(equilibrium(TRELLIS, RULE, RULE), SIZE)
    assert counted.evaluations == STEPS + 1  # and one with a graph
    assert count(equilibrium(TRELLIS, RULE, RULE, piece_len=3), SIZE).evaluations == 3 * (STEPS + 1)


@pytest.mark.parametrize("config", [TRELLIS, TRANSFORMER], ids=["trellis", "transformer"])
@pytest.mark.parametrize("piece_len", [None, 4])
def test_all_steps_are_taken_with_data_too(config, piece_len):
    step = Step(equilibrium(config, RULE, RULE, piece_len=piece_len), SIZE)
    layer, backward = step.network.core, []
    assert isinstance(layer.adjoint, ImplicitAdjoint)
    layer.adjoint = replace(layer.adjoint, callback=backward.append)
    step.run()
    pieces = 1 if piece_len is None else 3
    assert step.evaluations == pieces * (STEPS + 1)
    assert len(backward) == pieces
    # Not near their end either, where rounding could bring a residual down to zero.
    assert all(
        (solution.num_steps == STEPS).all() and (solution.relative_residual > 1e-6).all() for solution in backward
    )


def test_bytes_are_affine_in_the_batch():
    make = equilibrium(TRELLIS, RULE, RULE)
    one, two, five = (count(make, Size(batch_size, 40)).peak for batch_size in (1, 2, 5))
    assert two > one
    assert five == one + 4 * (two - one)


def test_a_stack_grows_with_its_depth_and_a_deq_with_its_history_alone():
    size = Size(2, 40)
    stacks = [count(stack(TRELLIS, depth), size).peak for depth in (4, 6, 8)]
    state = 4 * 2 * size.batch_size * size.length * TRELLIS.d_hidden  # bytes of (h, c)
    assert stacks[2] - stacks[1] == pytest.approx(stacks[1] - stacks[0], abs=state / 10)
    assert stacks[1] - stacks[0] > 2 * state
    peaks = {
        steps: count(equilibrium(TRELLIS, broyden(*steps), broyden(*steps)), size).peak
        for steps in ((8, 4), (16, 4), (8, 8))
    }
    assert peaks[16, 4] == pytest.approx(peaks[8, 4], abs=state / 10)
    # A window that has to restart keeps one state more than a history that holds all steps.
    assert peaks[8, 8] - peaks[8, 4] == pytest.approx(3 * state, abs=state / 10)


def test_the_benchmark_writes_its_files(tmp_path, monkeypatch, capsys):
    recipe = "wikitext103_transformer_small"
    monkeypatch.setattr(memory, "CHECKS", {})
    monkeypatch.setattr(memory, "HISTORIES", (5,))
    monkeypatch.setattr(memory, "PARTS", (3,))
    monkeypatch.setattr(memory, "COMPARISONS", {recipe: memory.COMPARISONS[recipe]._replace(depth=3)})
    options = f"--recipes {recipe} --curve_recipe {recipe} --batch_size 2 --length 6 --max_steps 3"
    options += " --curve_depths 1 2 --curve_steps 1 2 --out"
    monkeypatch.setattr(sys, "argv", ["memory", *options.split(), str(tmp_path)])
    memory.main()
    result = json.loads((tmp_path / "memory.json").read_text())
    rows = {row["network"]: row for row in result["rows"]}
    assert {"3 tied layers", "4 layers of their own", "DEQ, history 5", "DEQ, history 5, pieces of 2"} <= rows.keys()
    deq = rows["DEQ, history of all steps"]
    assert deq["history"] == deq["backward_history"] == 3
    assert deq["less_by"] == 1 - deq["peak"] / rows["3 tied layers"]["peak"]
    assert deq["parameters"] + deq["gradients_at_peak"] + deq["rest_at_peak"] == deq["peak"]
    assert deq["paper_less_by"] == pytest.approx(1 - 1.1 / 6.8)
    assert list(result["curve"]["peaks"]["tied layers"]) == ["1", "2"]
    assert "--curve_depths 1 2" in result["command"]
    assert "| DEQ, history 5, checkpoint=True |" in (tmp_path / "memory.md").read_text()
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert "3 tied layers" in capsys.readouterr().err


@pytest.mark.slow
def test_the_resident_size_grows_by_the_count():
    rows = memory.check()
    assert [row["network"] for row in rows] == list(memory.CHECKS)
    for row in rows:
        assert row["ratio"] == pytest.approx(1.0, abs=0.05)
