"""What a request needs on its way from a body to a reply: the model, its pictures, threads, time.

Knows the pieces and how they are used from an event loop: what takes long runs on threads. Does not
know where a body comes from.
"""

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from qwen_jax.openai.calls import Calls, Meter
from qwen_jax.openai.errors import ApiError, bad_request
from qwen_jax.openai.media import MediaSource
from qwen_jax.requests import Prompt
from qwen_jax.structured.spec import Grammar, StructuredOutputs

Result = TypeVar("Result")
_WORKERS, _COMPILERS = 4, 2  # threads for prompts and pictures, and for grammars


class Answerer:
    """One model that answers requests.

    Args:
        llm: an `LLM`: its engine, inputs, forms, tokenizer, template and config are used.
        names: what requests may call the model; the first one is what replies say.
        media: where pictures come from.
        meter: is told how the prompts go on, if there is one.
        request_timeout: seconds for a whole request, None for any time.
        compile_timeout: seconds for a schema or a grammar to be compiled.
    """

    def __init__(
        self,
        llm: Any,
        names: Sequence[str],
        *,
        media: MediaSource,
        meter: Meter | None,
        request_timeout: float | None,
        compile_timeout: float,
    ):
        self.llm, self.names, self.media = llm, names, media
        self._meter = meter
        self._request_timeout, self._compile_timeout = request_timeout, compile_timeout
        self._open: set[Calls] = set()
        self._over: ApiError | None = None
        self._threads = concurrent.futures.ThreadPoolExecutor(_WORKERS, "prepare")
        self._compilers = concurrent.futures.ThreadPoolExecutor(_COMPILERS, "compile")

    def check_model(self, name: str | None) -> str:
        """The name for the reply; raises ApiError 404 for a model that is not here."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise ApiError(
                404,
                f"there is no model {name[:200]!r} here; there is {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        return name

    def new_calls(self) -> Calls:
        """For one request; `close` must follow."""
        calls = Calls(self._meter, timeout=self._request_timeout)
        self._open.add(calls)
        if self._over is not None:
            calls.fail(self._over)
        return calls

    def close(self, calls: Calls) -> None:
        """Ends what still runs of a request."""
        calls.cancel()
        self._open.discard(calls)

    def fail_all(self, error: ApiError) -> None:
        """Ends every request with an error, those that are still to come too."""
        self._over = error
        for calls in list(self._open):
            calls.fail(error)

    def shut(self) -> None:
        """Ends the threads."""
        for pool in (self._threads, self._compilers):
            pool.shutdown(wait=False, cancel_futures=True)

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
        seconds, loop = self._compile_timeout, asyncio.get_running_loop()
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


def _without_panic(work: Callable[[], Result]) -> Result:
    """A fault in a library written in Rust as an `Exception`, which it is not by itself."""
    try:
        return work()
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(f"a library has failed: {error}") from error
        raise
