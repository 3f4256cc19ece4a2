"""The copy-memory task: ten digits, a long blank, a delimiter, then the ten digits again.

Shapes: N sequences, T blank_len; a sequence has T + 20 positions.
"""

import hashlib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepeq.checks import check_count
from deepeq.data.batches import SPLITS, SequenceBatches, Split

NUM_SYMBOLS = 10
"""The blank 0, the digits 1 to 8, the delimiter 9."""

_NUM_DIGITS = 10
_BLANK, _DELIMITER = 0, 9
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class CopyMemoryConfig:
    """Size and seed of the copy-memory task; the defaults are those of Bai et al. (2019), table 1.

    Raises:
        ValueError: A size is not a positive integer, or the seed not an integer from 0 to 2^63 - 1.
    """

    blank_len: int = 400
    """T: the digits are seen in positions 1 to 10 and asked for in T + 11 to T + 20."""
    num_train: int = 20_000
    """Number of sequences to train on."""
    num_test: int = 2_000
    """Number of sequences to test on, and of others to validate on."""
    seed: int = 0
    """Seed of the digits, and of the order of the training sequences."""

    def __post_init__(self) -> None:
        for name in ("blank_len", "num_train", "num_test"):
            check_count(f"data.copy_memory.{name}", getattr(self, name), least=1)
        check_count("data.copy_memory.seed", self.seed, least=0)
        if self.seed > _MAX_SEED:
            raise ValueError(f"data.copy_memory.seed={self.seed!r} must be a whole number <= {_MAX_SEED}")


@dataclass(frozen=True, eq=False)
class CopyMemory:
    """The copy-memory task, in three splits that the configuration determines, the same on every machine.

    A sequence x of T + 20 positions holds ten digits drawn uniformly from 1 to 8, then blanks (0) except one
    delimiter: x[T+10] = 9, with positions counted from 1. The targets are y[1 : T+10] = 0 and
    y[T+11 : T+20] = x[1 : 10]. The loss is the mean cross-entropy over all T + 20 positions.

    References:
        Bai, Kolter, Koltun (2019), Deep Equilibrium Models, NeurIPS, appendix F. There is no validation split
        in the paper; here it is drawn after the test split, from the same generator.
    """

    config: CopyMemoryConfig = field(default_factory=CopyMemoryConfig)
    name: str = field(default="copy_memory", init=False)
    unit: str = field(default="symbol", init=False)
    vocab_size: int = field(default=NUM_SYMBOLS, init=False)
    tokenizer: None = field(default=None, init=False)
    """None: the symbols are numbers, there is no text to decode."""
    _digits: dict[Split, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.config.seed)
        digits = {
            split: torch.randint(1, 9, (num, _NUM_DIGITS), generator=generator)
            for split, num in (
                ("train", self.config.num_train),
                ("test", self.config.num_test),
                ("valid", self.config.num_test),
            )
        }
        object.__setattr__(self, "_digits", digits)

    @property
    def sequence_len(self) -> int:
        """Number of positions of a sequence, T + 20."""
        return self.config.blank_len + 2 * _NUM_DIGITS

    @property
    def fingerprint(self) -> str:
        """A checksum of all sequences."""
        checksum = hashlib.sha256(f"{self.name} {self.config.blank_len}".encode())
        for split in SPLITS:
            checksum.update(self._digits[split].to(torch.uint8).numpy().tobytes())
        return checksum.hexdigest()

    def sequences(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a split, each (N, T + 20) int64."""
        digits = self._digits[split]
        inputs = torch.full((len(digits), self.sequence_len), _BLANK)  # (N, T + 20)
        targets = inputs.clone()
        inputs[:, :_NUM_DIGITS] = digits
        inputs[:, self.config.blank_len + _NUM_DIGITS - 1] = _DELIMITER
        targets[:, -_NUM_DIGITS:] = digits
        return inputs, targets

    def bytes_per_token(self, split: Split) -> None:
        """Return None: symbols are not text."""

    def stream(self, split: Split, *, batch_size: int, segment_len: int) -> SequenceBatches:
        """Return the batches of a split; `segment` draws training sequences in another order in every epoch.

        Args:
            split: "train", "valid" or "test".
            batch_size: Number of sequences in a batch.
            segment_len: Length of a sequence, `blank_len + 20`.

        Raises:
            ValueError: segment_len is not T + 20, as sequences are not cut.
        """
        if segment_len != self.sequence_len:
            raise ValueError(
                f"segment_len must be {self.sequence_len} (data.copy_memory.blank_len + 20), as sequences of "
                f"copy_memory are not cut, got {segment_len}"
            )
        inputs, targets = self.sequences(split)
        seed = self.config.seed if split == "train" else None
        return SequenceBatches(inputs, targets, batch_size=batch_size, seed=seed)


def copy_memory_baseline(blank_len: int) -> float:
    """Return the loss, in nats per position, of predicting blanks with certainty and then digits uniformly.

    `10 ln 8 / (T + 20)` is what a model without memory can reach.

    Raises:
        ValueError: blank_len is not a positive integer.
    """
    CopyMemoryConfig(blank_len=blank_len)
    return _NUM_DIGITS * math.log(8) / (blank_len + 2 * _NUM_DIGITS)
