"""How far a long transfer is. Knows bytes and clocks."""

import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Bytes of weights moved so far.

    Attributes:
        done, total: bytes.
        skipped: of ``done``, those that an earlier, interrupted run had moved.
        seconds: since the start.
    """

    done: int
    total: int
    skipped: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes per second of this run."""
        return (self.done - self.skipped) / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        return f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {self.rate / 1e9:.2f} GB/s"


Progress = Callable[[Transfer], None]


class Meter:
    """Counts bytes and tells a callback, if there is one."""

    def __init__(self, total: int, callback: Progress | None, skipped: int = 0):
        self._total, self._callback, self._skipped = total, callback, skipped
        self._done = skipped
        self._start = time.monotonic()

    def add(self, nbytes: int) -> None:
        """Counts and tells."""
        self._done += nbytes
        if self._callback is not None:
            seconds = time.monotonic() - self._start
            self._callback(Transfer(self._done, self._total, self._skipped, seconds))
