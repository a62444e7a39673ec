"""How much this process has compiled, and how long it took. Knows JAX's monitoring events only."""

import functools
import time
from collections.abc import Callable

import jax.monitoring

_SPANS = "/jax/core/compile/"
_TRACED = f"{_SPANS}jaxpr_trace_duration"
_PROGRAM = f"{_SPANS}backend_compile_duration"
_LARGE = 0.02  # seconds of tracing: a program that will take a while to compile
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


class CompileClock:
    """Counts from the first call of `compile_clock` on.

    Attributes:
        programs: compiled, or taken from the persistent cache.
        cached: those of them that came from the persistent cache.
        on_large: called, once, when a program that will take a while has been traced.
    """

    def __init__(self):
        self.programs = 0
        self.cached = 0
        self.on_large: Callable[[], None] | None = None
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
        if event == _TRACED and duration_secs > _LARGE and self.on_large is not None:
            call, self.on_large = self.on_large, None
            call()
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
