"""What several processes agree on before each turn of an engine.

Knows process numbers, counts, seconds and bytes; knows no request. Every process has the same
requests, but not at the same moment, and measures its own times. So process 0 says before each turn
how many of the calls it takes and how long a step is, and the others do the same: their schedulers
plan the same steps. Where process 0 alone has requests it says what the calls are, too. A sum over
all tokens so far goes with it, so that processes which have come apart stop with an error, and do
not wait for each other's collectives.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax

from qwen_jax import distributed

_BLOCK = 256  # turns whose words are removed together, when those after them are over
_PATIENCE_MS = 1000  # between two looks at whether the engine was closed
_TRANSFER_MS = 60_000  # for what is there already
_PIECE = 2**20  # bytes of a value: no message between processes is much larger
_engines = itertools.count()  # in this order everywhere


@dataclasses.dataclass(frozen=True)
class Turn:
    """What process 0 decided.

    Attributes:
        calls: that are made before the turn.
        step_seconds: what a decode step takes.
        digest: over the tokens of all steps so far.
        told: what each call is; empty where all processes make the calls by themselves.
    """

    calls: int
    step_seconds: float
    digest: int
    told: tuple[bytes, ...] = ()


class Turns:
    """The turns of one engine, in one job of several processes."""

    def __init__(self):
        self._place = distributed.key(f"turns/{next(_engines)}")
        self._client = distributed.client()
        self._number = 0

    @property
    def decides(self) -> bool:
        """Whether this is the process that the others follow."""
        return distributed.index() == 0

    def say(self, turn: Turn) -> None:
        """Process 0 tells the others its next turn."""
        place = self._key(self._number)
        told = b"".join(turn.told)
        for start in range(0, len(told), _PIECE):
            piece = told[start : start + _PIECE]
            self._client.key_value_set_bytes(f"{place}/told/{start}", piece)
        numbers = (turn.calls, repr(turn.step_seconds), turn.digest, *map(len, turn.told))
        self._client.key_value_set(place, " ".join(map(str, numbers)))
        block, first = divmod(self._number, _BLOCK)
        if first == 0 and block > 1:
            self._client.key_value_delete(f"{self._place}/{block - 2}")
        self._number += 1

    def hear(self) -> Turn | None:
        """The next turn of process 0; None if it has not come to one in the last second."""
        try:
            place = self._key(self._number)
            text = self._client.blocking_key_value_get(place, _PATIENCE_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return None
        self._number += 1
        calls, seconds, digest, *sizes = text.split()
        told = tuple(self._told(place, [int(size) for size in sizes]))
        return Turn(int(calls), float(seconds), int(digest), told)

    def _told(self, place: str, sizes: list[int]) -> Iterator[bytes]:
        """What the calls of a turn are. The last process that hears it removes it."""
        if not sizes:
            return
        pieces = [
            self._client.blocking_key_value_get_bytes(f"{place}/told/{start}", _TRANSFER_MS)
            for start in range(0, sum(sizes), _PIECE)
        ]
        if self._client.key_value_increment(f"{place}/heard", 1) == distributed.count() - 1:
            self._client.key_value_delete(f"{place}/told")
        whole, start = b"".join(pieces), 0
        for size in sizes:
            yield whole[start : start + size]
            start += size

    def _key(self, number: int) -> str:
        return f"{self._place}/{number // _BLOCK}/{number}"
