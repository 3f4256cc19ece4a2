"""Stopping a run from outside."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch.distributed import is_torchelastic_launched


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM comes; a second one ends the process as usual.

    Not so under `torchrun`, which passes on the signal that the terminal has sent already: there, only SIGKILL does,
    which `torchrun` sends to those that have not ended after half a minute.
    """
    received: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if not is_torchelastic_launched():
            signal.signal(number, usual[signal.Signals(number)])

    try:
        for number in usual:
            signal.signal(number, receive)
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
