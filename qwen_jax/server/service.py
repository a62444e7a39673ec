"""What all routes share: the model, its limits, and the requests in progress.

Knows the pieces and how they are used from the event loop: what takes long runs on threads.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from starlette.requests import Request

from qwen_jax.requests import Prompt
from qwen_jax.server import limits
from qwen_jax.server.calls import Calls
from qwen_jax.server.errors import ApiError, bad_request, shutting_down
from qwen_jax.server.fetch import Fetcher
from qwen_jax.server.media import MediaSource
from qwen_jax.server.metrics import Metrics
from qwen_jax.server.settings import Settings
from qwen_jax.structured.spec import Grammar, StructuredOutputs

Result = TypeVar("Result")
_WORKERS, _COMPILERS = 4, 2  # threads for prompts and pictures, and for grammars


class Service:
    """One model and its server.

    Args:
        llm: an `LLM`: its engine, inputs, forms, tokenizer, template, config and runtime are used.
        settings: of the server.

    Attributes:
        began: when, in seconds since 1970.
        draining: whether nothing more is taken.
        ends: what is to be given back in the end.
    """

    def __init__(self, llm: Any, settings: Settings):
        self.llm, self.settings = llm, settings
        self.model_name = settings.model_names[0]
        self.began = int(time.time())
        self.draining = False
        self.ends = contextlib.ExitStack()
        self.metrics = Metrics(self.model_name, llm.engine.stats)
        self.gate = limits.Gate(settings.max_requests)
        fetcher = Fetcher(
            settings.media_hosts, most=settings.max_media, timeout=settings.fetch_timeout
        )
        self.media = MediaSource(fetcher, settings.media_folder, settings.media_limits)
        self._open: set[Calls] = set()
        self._over = False  # no time left for what still runs
        self._threads = concurrent.futures.ThreadPoolExecutor(_WORKERS, "prepare")
        self._compilers = concurrent.futures.ThreadPoolExecutor(_COMPILERS, "compile")

    # ---- requests ----------------------------------------------------------------------------

    async def read(self, request: Request) -> Any:
        """The JSON of a request's body."""
        settings = self.settings
        return await limits.read_json(
            request, most=settings.max_body, timeout=settings.body_timeout
        )

    def check_model(self, name: str | None) -> str:
        """The name for the reply; raises ApiError 404 for a model that is not here."""
        if name is None:
            return self.model_name
        if name not in self.settings.model_names:
            raise ApiError(
                404,
                f"there is no model {name[:200]!r}; this server has "
                f"{', '.join(self.settings.model_names)}",
                param="model",
                code="model_not_found",
            )
        return name

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests in progress; raises ApiError 429 where there is none."""
        self.gate.enter()
        try:
            yield
        finally:
            self.gate.leave()

    def new_calls(self) -> Calls:
        """For one request; `close` must follow."""
        calls = Calls(self.metrics, timeout=self.settings.request_timeout)
        self._open.add(calls)
        if self._over:
            calls.fail(shutting_down())
        return calls

    def close(self, calls: Calls) -> None:
        """Ends what still runs of a request."""
        calls.cancel()
        self._open.discard(calls)

    # ---- work --------------------------------------------------------------------------------

    async def on_thread(self, work: Callable[[], Result]) -> Result:
        """Runs what takes long; what the library refuses is the client's mistake."""
        with bad_request():
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, _without_panic, work
            )

    async def compile(self, wish: StructuredOutputs, prompt: Prompt) -> Grammar:
        """The grammar of a wish, for an answer to a prompt.

        Raises:
            ApiError: it cannot be compiled, or takes too long.
        """
        seconds, loop = self.settings.compile_timeout, asyncio.get_running_loop()
        try:
            with bad_request():
                async with asyncio.timeout(seconds):
                    make = functools.partial(self.llm.forms.grammar, wish, prompt)
                    work = loop.run_in_executor(self._compilers, _without_panic, make)
                    # It cannot be interrupted: what it says after the time is over is for nobody.
                    work.add_done_callback(lambda done: done.cancelled() or done.exception())
                    return await asyncio.shield(work)
        except TimeoutError:
            raise ApiError(
                400, f"the form of the output took more than {seconds:g} seconds to compile"
            ) from None

    # ---- the end -----------------------------------------------------------------------------

    async def drain(self) -> None:
        """Takes nothing more; waits for what runs, and fails what takes too long."""
        self.draining = True
        deadline = time.monotonic() + self.settings.shutdown_timeout
        while self.gate.inside and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._over = True
        for calls in list(self._open):
            calls.fail(shutting_down())

    def shut(self) -> None:
        """Ends the threads, and gives back what `ends` holds."""
        self.ends.close()
        for pool in (self._threads, self._compilers):
            pool.shutdown(wait=False, cancel_futures=True)

    def health(self) -> Mapping[str, Any]:
        """What the server is and how busy."""
        stats = self.llm.engine.stats()
        return {
            "status": "draining" if self.draining else "ok",
            "model": self.model_name,
            "max_model_len": self.llm.max_model_len,
            "kernels": dict(self.llm.runtime.kernels),
            "load": {
                "running": stats.running,
                "waiting": stats.waiting,
                "kv_cache_usage": stats.pages_used / max(stats.pages_total, 1),
                "in_progress": self.gate.inside,
            },
        }


def _without_panic(work: Callable[[], Result]) -> Result:
    """A fault in a library written in Rust as an `Exception`, which it is not by itself."""
    try:
        return work()
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(f"a library has failed: {error}") from error
        raise
