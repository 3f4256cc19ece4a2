"""Batches of sequences: every sequence once a pass, shuffled by epoch or in order, and the sentences of the errors."""

import pytest
import torch

from deepeq.data import Batches, SequenceBatches


def numbered(num: int, *, batch_size: int = 4, seed: int | None = None) -> SequenceBatches:
    """Sequences that tell their place: row i is 10 i, 10 i + 1, 10 i + 2."""
    inputs = 10 * torch.arange(num)[:, None] + torch.arange(3)  # (N, T)
    return SequenceBatches(inputs, inputs + 1000, batch_size=batch_size, seed=seed)


def rows(batches: Batches, *, epoch: int) -> list[int]:
    return [int(i) for index in range(batches.num_segments) for i in batches.segment(index, epoch=epoch)[0][:, 0] // 10]


def test_one_pass_in_order_leaves_no_sequence_out():
    batches = numbered(10, seed=3)
    parts = list(batches)
    assert [len(inputs) for inputs, _ in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]), batches.inputs)
    assert torch.equal(torch.cat([targets for _, targets in parts]), batches.targets)
    assert (batches.num_segments, batches.num_tokens) == (3, 30)
    assert not batches.continuous


def test_every_epoch_has_every_sequence_once_in_another_order():
    batches = numbered(50, seed=3)
    orders = [rows(batches, epoch=epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in [*orders, range(50)]}) == 5


def test_order_depends_on_seed_and_epoch_alone():
    order = rows(numbered(50, seed=3), epoch=2)
    torch.manual_seed(99)
    assert rows(numbered(50, seed=3), epoch=2) == order
    assert rows(numbered(50, seed=4), epoch=2) != order


def test_without_seed_every_epoch_is_in_order():
    assert rows(numbered(9), epoch=0) == rows(numbered(9), epoch=5) == list(range(9))


def test_inputs_stay_with_their_targets():
    batches = numbered(10, seed=1)
    for index in range(batches.num_segments):
        inputs, targets = batches.segment(index, epoch=1)
        assert torch.equal(inputs + 1000, targets)


def test_batches_are_copies_of_64_bits():
    ids = torch.arange(12, dtype=torch.int32).reshape(4, 3)
    batches = SequenceBatches(ids, ids, batch_size=2)
    for part in (*batches.segment(0), *next(iter(batches))):
        assert part.dtype == torch.int64
        part.fill_(-1)
    assert torch.equal(ids, torch.arange(12, dtype=torch.int32).reshape(4, 3))


@pytest.mark.parametrize("index", [-1, 3])
def test_batch_outside_the_pass_is_refused(index: int):
    with pytest.raises(IndexError, match=rf"index must lie in 0 \.\. 2 \(num_segments - 1\), got {index}"):
        numbered(10).segment(index)


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((4,), (4,)), ((0, 3), (0, 3))])
def test_shapes_that_do_not_fit_are_named(shapes: tuple[tuple[int, ...], tuple[int, ...]]):
    inputs, targets = (torch.zeros(shape, dtype=torch.int64) for shape in shapes)
    with pytest.raises(ValueError, match="inputs and targets must have one shape"):
        SequenceBatches(inputs, targets, batch_size=2)


def test_values_that_are_no_integers_are_named():
    ids = torch.zeros(4, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"targets must hold integers, got torch\.float32"):
        SequenceBatches(ids, ids.float(), batch_size=2)
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number >= 1"):
        SequenceBatches(ids, ids, batch_size=0)


@pytest.mark.parametrize("seed", [None, 3])
def test_parts_of_batches_are_their_rows(seed):
    inputs = torch.arange(24).view(12, 2)
    batches = SequenceBatches(inputs, inputs + 1, batch_size=8, seed=seed)
    parts = [batches.shard(index, 2) for index in range(2)]
    assert [part.num_tokens for part in parts] == [12, 12]
    for epoch in range(2):
        for index in range(batches.num_segments):
            whole, ours = batches.segment(index, epoch=epoch), [part.segment(index, epoch=epoch) for part in parts]
            for which in range(2):
                assert torch.equal(torch.cat([pair[which] for pair in ours]), whole[which])


def test_batches_that_cannot_be_dealt_out_evenly_are_refused():
    inputs = torch.arange(22).view(11, 2)
    with pytest.raises(ValueError, match="batch_size=8 must be a multiple of 3"):
        SequenceBatches(inputs, inputs, batch_size=8).shard(0, 3)
    with pytest.raises(ValueError, match="a batch of 3, which must be a multiple of 2"):
        SequenceBatches(inputs, inputs, batch_size=8).shard(0, 2)
    with pytest.raises(ValueError, match=r"part=\(0, 2\) is dealt out already"):
        SequenceBatches(inputs[:8], inputs[:8], batch_size=8).shard(0, 2).shard(0, 2)
