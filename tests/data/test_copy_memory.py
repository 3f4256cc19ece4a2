"""Copy memory: the sequences of the paper's appendix F, position by position, and the baseline without memory."""

import math

import numpy as np
import pytest
import torch

from deepeq.data import SPLITS, CopyMemory, CopyMemoryConfig, copy_memory_baseline

SMALL = CopyMemoryConfig(blank_len=30, num_train=300, num_test=40)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("blank_len", [1, 30])
def test_sequences_are_those_of_the_paper(split, blank_len: int):
    task = CopyMemory(CopyMemoryConfig(blank_len=blank_len, num_train=50, num_test=20))
    for x, y in zip(*(part.tolist() for part in task.sequences(split)), strict=True):
        # The paper counts positions from 1.
        x, y = dict(enumerate(x, start=1)), dict(enumerate(y, start=1))
        assert len(x) == len(y) == blank_len + 20
        for position in range(1, blank_len + 21):
            if position <= 10:
                assert 1 <= x[position] <= 8
            else:
                assert x[position] == (9 if position == blank_len + 10 else 0)
            copied = position - blank_len - 10
            assert y[position] == (x[copied] if copied >= 1 else 0)


def test_paper_sizes_are_the_default():
    task = CopyMemory()
    assert (task.sequence_len, task.vocab_size, task.unit, task.name) == (420, 10, "symbol", "copy_memory")
    assert [len(task.sequences(split)[0]) for split in SPLITS] == [20_000, 2_000, 2_000]


def test_digits_are_uniform_and_independent():
    inputs, _ = CopyMemory(CopyMemoryConfig(num_train=8_000)).sequences("train")
    digits = inputs[:, :10]
    counts = torch.bincount(digits.flatten(), minlength=9)[1:].double()
    # 80,000 draws: the standard deviation of a count is 94.
    assert (counts - 10_000).abs().max() < 400
    pairs = torch.bincount(digits[:, 0] * 9 + digits[:, 1], minlength=81).reshape(9, 9)[1:, 1:]
    # 8,000 draws over 64 cells of 125, with a standard deviation of 11.
    assert (pairs - 125).abs().max() < 50


def test_digits_are_the_mersenne_twisters_numbers_in_the_order_train_test_valid():
    # An independent implementation of the generator: a digit is 1 + (32 random bits mod 8).
    bits = np.random.RandomState(7).randint(0, 2**32, size=70, dtype=np.uint64)
    expected = torch.from_numpy((bits % 8 + 1).astype(np.int64)).reshape(7, 10)
    task = CopyMemory(CopyMemoryConfig(num_train=3, num_test=2, seed=7))
    digits = [task.sequences(split)[0][:, :10] for split in ("train", "test", "valid")]
    assert torch.equal(torch.cat(digits), expected)


def test_seed_alone_determines_the_sequences():
    fingerprint = CopyMemory(SMALL).fingerprint
    torch.manual_seed(5)
    assert CopyMemory(SMALL).fingerprint == fingerprint
    others = [CopyMemoryConfig(blank_len=31, num_train=300, num_test=40), CopyMemoryConfig(num_train=300, seed=1)]
    assert len({fingerprint, *(CopyMemory(other).fingerprint for other in others)}) == 3


def test_splits_share_no_sequence():
    digits = [{tuple(x) for x in CopyMemory(SMALL).sequences(split)[0][:, :10].tolist()} for split in SPLITS]
    assert len(set.union(*digits)) == sum(map(len, digits)) == 380


def test_training_is_shuffled_by_epoch_and_evaluation_is_in_order():
    task = CopyMemory(SMALL)
    train = task.stream("train", batch_size=64, segment_len=50)
    assert not torch.equal(train.segment(0, epoch=0)[0], train.segment(0, epoch=1)[0])
    assert torch.equal(train.segment(0, epoch=1)[0], train.segment(0, epoch=1)[0])
    for split in ("valid", "test"):
        batches = task.stream(split, batch_size=16, segment_len=50)
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(inputs, task.sequences(split)[0])
        assert torch.equal(targets, task.sequences(split)[1])
        assert torch.equal(batches.segment(1, epoch=9)[0], inputs[16:32])


def test_order_of_training_depends_on_the_seed():
    one, other = (
        CopyMemory(CopyMemoryConfig(blank_len=30, num_train=300, seed=seed)).stream(
            "train", batch_size=300, segment_len=50
        )
        for seed in (0, 1)
    )
    places = [
        (batches.segment(0)[0][:, None] == batches.inputs[None]).all(-1).float().argmax(1) for batches in (one, other)
    ]
    assert not torch.equal(*places)


def test_sequences_are_not_cut():
    with pytest.raises(ValueError, match=r"segment_len must be 50 \(data\.copy_memory\.blank_len \+ 20\).* got 25"):
        CopyMemory(SMALL).stream("train", batch_size=4, segment_len=25)


def test_baseline_is_the_loss_of_blanks_for_sure_and_uniform_digits():
    _, targets = CopyMemory(SMALL).sequences("test")
    probabilities = torch.zeros(*targets.shape, 10)
    probabilities[:, :-10, 0] = 1
    probabilities[:, -10:, 1:9] = 1 / 8
    loss = -probabilities.gather(-1, targets[..., None]).log().mean()
    assert copy_memory_baseline(30) == pytest.approx(loss.item(), rel=1e-5)
    assert copy_memory_baseline(400) == pytest.approx(10 * math.log(8) / 420, rel=1e-12)
    assert round(copy_memory_baseline(400), 4) == 0.0495


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blank_len": 0}, "data.copy_memory.blank_len=0 must be a whole number >= 1"),
        ({"num_train": 1.5}, "data.copy_memory.num_train=1.5 must be a whole number >= 1"),
        ({"num_test": -1}, "data.copy_memory.num_test=-1 must be a whole number >= 1"),
        ({"seed": -1}, "data.copy_memory.seed=-1 must be a whole number >= 0"),
        ({"seed": 2**63}, "data.copy_memory.seed=9223372036854775808 must be a whole number <= 9223372036854775807"),
    ],
)
def test_wrong_size_is_named_at_construction(fields: dict, message: str):
    with pytest.raises(ValueError, match="data") as caught:
        CopyMemoryConfig(**fields)
    assert str(caught.value).startswith(message)
