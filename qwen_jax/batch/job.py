"""Works on the lines of a batch: many requests at once, each answer on the disk before it counts.

Knows lines, the engine's answers and the files; knows no option and no terminal. Lines are handed
to the engine in their order; answers come in any.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from qwen_jax.batch.inputs import Inputs, Item
from qwen_jax.batch.outputs import Outputs
from qwen_jax.batch.progress import Meter
from qwen_jax.openai.batch_lines import Answer, Batch, answer_line, has_failed, refuse_line
from qwen_jax.openai.batch_results import Results
from qwen_jax.openai.errors import ApiError

MakeAnswer = Callable[[], contextlib.AbstractContextManager[Answer]]
"""Called on the event loop, for as long as the context is open."""

_RETRY = 0.2  # seconds until a request that found the queue full is tried again


class Job:
    """Answers lines until there are no more, or it is stopped.

    Args:
        items: the lines.
        inputs: where they come from, for the places of those that are wrong.
        outputs: where the answers go.
        batch: what the answers share.
        meter: counts them.
        in_flight: requests that the engine has at once; more than it has rows, so that none of
            these waits for the host.
    """

    def __init__(
        self,
        items: Iterator[Item],
        inputs: Inputs,
        outputs: Outputs,
        batch: Batch,
        meter: Meter,
        *,
        in_flight: int,
    ):
        self._items, self._inputs, self._outputs = items, inputs, outputs
        self._batch, self._meter, self._in_flight = batch, meter, in_flight
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self, make_answer: MakeAnswer) -> None:
        """Works until the end.

        Raises:
            OSError: an answer cannot be written.
            RuntimeError: the engine takes no more requests.
        """
        self._loop = asyncio.get_running_loop()
        paths = (self._outputs.output, self._outputs.errors)
        reading = asyncio.Lock()
        async with Results(paths, self._meter.count) as results:
            with make_answer() as answer:
                work = [self._work(answer, results, reading) for _ in range(self._in_flight)]
                self._tasks = [self._loop.create_task(each) for each in work]
                try:
                    done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
                finally:
                    await self._end_tasks()
        for task in done:
            if not task.cancelled():
                task.result()

    def stop(self, grace: float) -> None:
        """Takes no new line; what runs has ``grace`` seconds, and is done again when the batch is
        resumed if these are not enough. May be called from any thread, and again."""
        self._stopping.set()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                self._loop.call_soon_threadsafe(self._loop.call_later, grace, self._drop)

    def _drop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _end_tasks(self) -> None:
        self._drop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, answer: Answer, results: Results, reading: asyncio.Lock) -> None:
        while (item := await self._next(reading)) is not None:
            await results.add(await self._answer(answer, item))

    async def _next(self, reading: asyncio.Lock) -> Item | None:
        async with reading:
            if self._stopping.is_set():
                return None
            return await asyncio.to_thread(next, self._items, None)

    async def _answer(self, answer: Answer, item: Item) -> dict[str, Any]:
        place = self._inputs.place(item.k)
        if isinstance(item.request, ApiError):
            return refuse_line(self._batch, item.custom_id, item.request, **place)
        while True:
            try:
                line = await answer_line(answer, item.request, self._batch)
            except ApiError as error:
                if error.status != 429:
                    raise RuntimeError("the engine has stopped; the log says why") from error
                await asyncio.sleep(_RETRY)
            else:
                return line | place if has_failed(line) else line
