"""How much this process has compiled, and how long it took. Knows JAX's monitoring events only."""

import functools
import time

import jax.monitoring

_SPANS = "/jax/core/compile/"
_PROGRAM = f"{_SPANS}backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


class CompileClock:
    """Counts from the first call of `compile_clock` on.

    Attributes:
        programs: compiled, or taken from the persistent cache.
        cached: those of them that came from the persistent cache.
    """

    def __init__(self):
        self.programs = 0
        self.cached = 0
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._span)
        jax.monitoring.register_event_listener(self._event)

    @property
    def seconds(self) -> float:
        """Time spent tracing, lowering and compiling."""
        return sum(end - start for start, end in self._spans)

    def _span(self, event: str, duration_secs: float, **_) -> None:
        if not event.startswith(_SPANS):
            return
        self.programs += event == _PROGRAM
        end = time.perf_counter()
        # An inner function's tracing is reported first, and lies within the outer one's.
        while self._spans and self._spans[-1][0] >= end - duration_secs:
            self._spans.pop()
        self._spans.append((end - duration_secs, end))

    def _event(self, event: str, **_) -> None:
        self.cached += event == _CACHE_HIT


@functools.cache
def compile_clock() -> CompileClock:
    """The clock of this process: listeners of JAX's events cannot be taken back."""
    return CompileClock()
