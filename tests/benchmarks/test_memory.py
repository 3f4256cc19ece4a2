"""The counter of the memory benchmark, and what it finds."""

from functools import partial

import memory
import pytest
import torch
from memory import LiveBytes, Size, Step, broyden, count, equilibrium, stack
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepeq import GMRES
from deepeq.models import LayerStack, TransformerConfig, TrellisConfig
from tests.benchmarks.conftest import Bench

TRELLIS = TrellisConfig(d_input=6, d_hidden=16, d_output=8, hidden_dropout=0.1, weight_dropout=0.3)
TRANSFORMER = TransformerConfig(
    d_model=16, num_heads=2, d_inner=24, memory_len=7, weight_norm=True, hidden_dropout=0.1, attention_dropout=0.1
)
SIZE = Size(2, 9)
STATE_BYTES = {TRELLIS: 4 * 2 * 9 * 2 * 16, TRANSFORMER: 4 * 2 * 9 * 16}
STEPS, HISTORY = 3, 2
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


NETWORKS = {
    "stack": partial(stack, depth=5),
    "stack_checkpoint": partial(stack, depth=5, checkpoint=True),
    "broyden": partial(equilibrium, solver=RULE, backward=RULE),
    "gmres": partial(equilibrium, solver=RULE, backward=GMRES(max_steps=4, restart=2)),
    "checkpoint": partial(equilibrium, solver=RULE, backward=RULE, checkpoint=True),
    "pieces": partial(equilibrium, solver=RULE, backward=RULE, piece_len=4),
}
CASES = [pytest.param(TRELLIS, network, id=f"{name}-trellis") for name, network in NETWORKS.items()]
CASES += [
    pytest.param(TRANSFORMER, network, id=f"{name}-transformer", marks=[] if name == "gmres" else pytest.mark.slow)
    for name, network in NETWORKS.items()
]


@pytest.mark.parametrize(("config", "network"), CASES)
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
    backward = []
    step = Step(equilibrium(config, RULE, RULE, piece_len=piece_len, on_backward=backward.append), SIZE)
    step.run()
    pieces = 1 if piece_len is None else 3
    assert step.evaluations == pieces * (STEPS + 1)
    assert len(backward) == pieces
    # Not near their end either, where rounding could bring a residual down to zero.
    assert all(
        (solution.num_steps == STEPS).all() and (solution.relative_residual > 1e-6).all() for solution in backward
    )


@pytest.mark.slow
def test_bytes_are_affine_in_the_batch():
    make = equilibrium(TRELLIS, RULE, RULE)
    one, two, five = (count(make, Size(batch_size, 20)).peak for batch_size in (1, 2, 5))
    assert two > one
    assert five == one + 4 * (two - one)


def test_a_stack_grows_with_its_depth_and_a_deq_with_its_history_alone():
    size = Size(2, 40)
    stacks = [count(stack(TRELLIS, depth), size).peak for depth in (3, 4, 5)]
    state = 4 * 2 * size.batch_size * size.length * TRELLIS.d_hidden  # bytes of (h, c)
    assert stacks[2] - stacks[1] == pytest.approx(stacks[1] - stacks[0], abs=state / 10)
    assert stacks[1] - stacks[0] > state
    peaks = {
        steps: count(equilibrium(TRELLIS, broyden(*steps), broyden(*steps)), size).peak
        for steps in ((4, 2), (8, 2), (4, 4))
    }
    assert peaks[8, 2] == pytest.approx(peaks[4, 2], abs=state / 10)
    # A window that has to restart keeps one state more than a history that holds all steps.
    assert peaks[4, 4] - peaks[4, 2] == pytest.approx(state, abs=state / 10)


def test_layers_that_are_not_tied_are_compared_where_the_paper_has_them() -> None:
    names = [about["network"] for about, _ in memory.networks("wikitext103_transformer_small", SIZE, 2)]
    assert names[:3] == ["16 tied layers", "16 tied layers, checkpointing", "4 layers of their own"]


def test_the_benchmark_writes_its_files(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = "ptb_trellisnet"
    monkeypatch.setattr(memory, "CHECKS", {})
    monkeypatch.setattr(memory, "HISTORIES", (5,))
    monkeypatch.setattr(memory, "PARTS", (3,))
    monkeypatch.setattr(memory, "COMPARISONS", {recipe: memory.COMPARISONS[recipe]._replace(depth=2)})
    options = f"--recipes {recipe} --curve_recipe {recipe} --batch_size 2 --length 6 --max_steps 2"
    result = bench(memory, *options.split(), *["--curve_depths", "1", "--curve_steps", "1"])
    rows = {row["network"]: row for row in result["rows"]}
    assert {"2 tied layers", "2 tied layers, checkpointing", "DEQ, history 5, pieces of 2"} <= rows.keys()
    deq = rows["DEQ, history of all steps"]
    assert deq["history"] == deq["backward_history"] == 2
    assert deq["less_by"] == 1 - deq["peak"] / rows["2 tied layers"]["peak"]
    assert deq["parameters"] + deq["gradients_at_peak"] + deq["rest_at_peak"] == deq["peak"]
    assert deq["paper_less_by"] == pytest.approx(1 - 1.2 / 8.5)
    assert list(result["curve"]["peaks"]["tied layers"]) == ["1"]
    assert "| DEQ, history 5, checkpoint=True |" in result["table"]


@pytest.mark.slow
def test_the_resident_size_grows_by_the_count():
    rows = memory.check()
    assert [row["network"] for row in rows] == list(memory.CHECKS)
    for row in rows:
        assert row["ratio"] == pytest.approx(1.0, abs=0.05)
