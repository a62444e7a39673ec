"""How far a batch is. Knows counts and clocks; knows no line."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Summary:
    """A batch as it stands.

    Attributes:
        total: lines of this shard, without empty ones.
        completed: lines with an answer in the output.
        failed: lines in the error file.
        resumed: of both, those that earlier runs had done.
        prompt_tokens, generated_tokens: of this run.
        seconds: of this run.
    """

    total: int
    completed: int
    failed: int
    resumed: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float

    @property
    def left(self) -> int:
        """Lines that are not done."""
        return self.total - self.completed - self.failed

    @property
    def eta(self) -> float | None:
        """Seconds until the end, at the speed of this run; None before its first line."""
        done = self.completed + self.failed - self.resumed
        return self.left * self.seconds / done if done else None

    def __str__(self) -> str:
        rate = self.generated_tokens / max(self.seconds, 1e-9)
        eta = "?" if self.eta is None else clock(self.eta)
        return (
            f"{self.completed + self.failed:,}/{self.total:,} lines ({self.failed:,} failed), "
            f"{rate:,.0f} tok/s, {clock(self.seconds)} so far, {eta} left"
        )


class Meter:
    """Counts lines; the engine counts tokens itself.

    Args:
        stats: the engine's, with prompt_tokens and generated_tokens.
        total, completed, failed: see `Summary`, of the earlier runs.
    """

    def __init__(self, stats: Callable[[], Any], *, total: int, completed: int, failed: int):
        self._stats, self._total = stats, total
        self.completed, self.failed, self._resumed = completed, failed, completed + failed
        before = stats()
        self._prompt, self._generated = before.prompt_tokens, before.generated_tokens
        self._began = time.monotonic()

    def count(self, failed: bool) -> None:
        """A line is done; of several threads one at a time may say so."""
        if failed:
            self.failed += 1
        else:
            self.completed += 1

    def summary(self) -> Summary:
        """Where it is now."""
        now = self._stats()
        return Summary(
            total=self._total,
            completed=self.completed,
            failed=self.failed,
            resumed=self._resumed,
            prompt_tokens=now.prompt_tokens - self._prompt,
            generated_tokens=now.generated_tokens - self._generated,
            seconds=time.monotonic() - self._began,
        )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
