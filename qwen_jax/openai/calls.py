"""Requests of the engine, seen from the event loop.

Knows the engine's events and threads; knows no HTTP. The engine calls back on its own thread; what
it says is taken over to the loop, in order.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from qwen_jax.engine.events import Delta, Event, Failed, Finished
from qwen_jax.openai.errors import ApiError, bad_request, of_engine
from qwen_jax.requests import Prompt, SamplingParams
from qwen_jax.results import RequestOutput


class Engine(Protocol):
    """What is used of `engine.engine.Engine`."""

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        sink: Any,
        *,
        request_id: str | None = None,
        name: str = "",
    ) -> Any: ...

    def stats(self) -> Any: ...


class Meter(Protocol):
    """What is told how prompts go on."""

    def first_token(self, seconds: float) -> None: ...

    def next_tokens(self, seconds: float, count: int) -> None: ...

    def finished(
        self, result: RequestOutput, params: SamplingParams, *, seconds: float, decoding: float
    ) -> None: ...


class Calls:
    """One or several prompts of one client, as one stream of events.

    Attributes:
        results: of the prompts that are finished, by their index.
    """

    def __init__(self, meter: Meter | None, *, timeout: float | None):
        self.results: dict[int, RequestOutput] = {}
        self._meter, self._timeout = meter, timeout
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._handles: list[Any] = []
        self._clocks: list[_Clock] = []

    def submit(
        self,
        engine: Engine,
        jobs: Sequence[tuple[Prompt, SamplingParams]],
        *,
        request_id: str,
    ) -> None:
        """Hands all prompts over, or none.

        Raises:
            ApiError: one of them cannot run, or the queue is full.
        """
        try:
            for i, (prompt, params) in enumerate(jobs):
                own = request_id if len(jobs) == 1 else f"{request_id}-{i}"
                self._clocks.append(_Clock(self._meter, params))
                with bad_request():
                    handle = engine.submit(
                        prompt, params, self._sink(i), request_id=own, name=f"request {own}"
                    )
                self._handles.append(handle)
        except ApiError:
            self.cancel()
            raise

    async def events(self) -> AsyncIterator[tuple[int, Delta]]:
        """(which prompt, what is new of it), until all are finished.

        Raises:
            ApiError: one failed, or the time is over; all are cancelled then.
        """
        deadline = None if self._timeout is None else self._loop.time() + self._timeout
        try:
            while len(self.results) < len(self._handles):
                async with asyncio.timeout_at(deadline):
                    index, event = await self._queue.get()
                match event:
                    case Delta():
                        self._clocks[index].tick(event)
                        yield index, event
                    case Finished(result):
                        self.results[index] = result
                        self._clocks[index].stop(result)
                    case Failed(error):
                        raise of_engine(error)
        except TimeoutError:
            raise ApiError(
                503, f"the request took longer than {self._timeout:g} seconds", code="timeout"
            ) from None
        finally:
            self.cancel()

    async def finish(self) -> list[RequestOutput]:
        """All results, in the order of the prompts; raises as `events`."""
        async for _ in self.events():
            pass
        return [self.results[i] for i in range(len(self._handles))]

    def cancel(self) -> None:
        """Ends whatever still runs; may be called again."""
        for index, handle in enumerate(self._handles):
            if index not in self.results:
                handle.cancel()

    def fail(self, error: ApiError) -> None:
        """Makes `events` raise ``error`` next."""
        self._queue.put_nowait((0, Failed(error)))

    def _sink(self, index: int):
        def take(event: Event) -> None:
            # A loop that is closed has nobody left who waits.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return take


class _Clock:
    """Times of one prompt, for the meter."""

    def __init__(self, meter: Meter | None, params: SamplingParams):
        self._meter, self._params = meter, params
        self._began = time.perf_counter()
        self._first = 0.0
        self._last: dict[int, float] = {}

    def tick(self, delta: Delta) -> None:
        if self._meter is None:
            return
        now = time.perf_counter()
        if not self._first:
            self._first = now
            self._meter.first_token(now - self._began)
        if delta.index in self._last and delta.token_ids:
            gap = (now - self._last[delta.index]) / len(delta.token_ids)
            self._meter.next_tokens(gap, len(delta.token_ids))
        self._last[delta.index] = now

    def stop(self, result: RequestOutput) -> None:
        if self._meter is None:
            return
        now = time.perf_counter()
        self._meter.finished(
            result,
            self._params,
            seconds=now - self._began,
            decoding=now - self._first if self._first else 0.0,
        )
