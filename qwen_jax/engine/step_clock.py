"""Shares the time out between prompts, decoding, compiling and the host. Knows steps and clocks."""

import contextlib
import time
from collections.abc import Iterator

from qwen_jax.engine.compile_clock import compile_clock
from qwen_jax.engine.scheduler import Step
from qwen_jax.engine.totals import Totals


class StepClock:
    """Adds to ``totals``. The device works from a `starts` or a `landed` to the next `landed`."""

    def __init__(self, totals: Totals):
        self._totals, self._clock = totals, compile_clock()
        self._since, self._compiled = self._now()

    def starts(self) -> None:
        """A step goes to a device that has nothing to do."""
        self._since, self._compiled = self._now()

    def landed(self, step: Step, steps: int) -> float | None:
        """A step has come back, after ``steps`` forward passes.

        Returns:
            Seconds per pass, for a step that only decoded and during which nothing was compiled.
        """
        totals, (now, compiled) = self._totals, self._now()
        compiling = compiled - self._compiled
        seconds = max(now - self._since - compiling, 0.0)
        self._since, self._compiled = now, compiled
        known = step.prompt_tokens
        decoding = sum(1 for part in step.parts if not part.known)
        share = known / max(known + decoding, 1)
        totals.prefill_time += seconds * share
        totals.decode_time += seconds * (1 - share)
        totals.compile_time += compiling
        totals.steps += steps
        return None if known or compiling or not steps else seconds / steps

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Counts what the thread works inside; a turn in which something was compiled is left out.

        In time of the processor, so that others on the machine do not count.
        """
        worked, compiled = time.thread_time(), self._clock.seconds
        yield
        if self._clock.seconds == compiled:
            self._totals.host_time += time.thread_time() - worked

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Counts the time inside as waiting for the device."""
        began = time.perf_counter()
        yield
        self._totals.wait_time += time.perf_counter() - began

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), self._clock.seconds
