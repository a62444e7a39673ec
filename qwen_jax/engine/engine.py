"""The engine: requests in from any thread, events out on its own.

Knows what an engine is made of; what a step holds is `scheduler`'s matter, how it runs is
`runner`'s. Two steps are on their way at most, so that the device works while the host makes text
of the tokens of the step before:

    device   [ step 1 ][ step 2 ][ step 3 ]
    host     plan 2    | text 1, plan 3 | text 2, plan 4
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from qwen_jax.engine.constraint import Factory
from qwen_jax.engine.core import Core
from qwen_jax.engine.driver import Driver
from qwen_jax.engine.events import Event, QueueFull
from qwen_jax.engine.faults import StepFailed
from qwen_jax.engine.lead import Compile, Lead
from qwen_jax.engine.pictures import FeatureStore
from qwen_jax.engine.request import Defaults, Request, Sink
from qwen_jax.engine.runner import Runner
from qwen_jax.engine.slots import settings
from qwen_jax.engine.totals import EngineStats, Totals
from qwen_jax.engine.warmup import Progress, warm_up
from qwen_jax.engine.wire import Add, Cancel
from qwen_jax.model.cache import row_ways
from qwen_jax.requests import Prompt, SamplingParams
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Weights

log = logging.getLogger(__name__)

FIRST_PAGES = 64  # of a cache in memory that others use too; it is doubled when rows grow into it


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine may take.

    Attributes:
        max_rows: most sequences at once.
        max_tokens: most tokens of a step with chunks of prompts.
        max_pages: how many pages the cache may have: enough for one row at its longest.
        max_waiting: most requests that wait; None for any number.
    """

    max_rows: int
    max_tokens: int
    max_pages: int
    max_waiting: int | None = None


class Handle:
    """A request that the engine has; ``request_id`` is that of its result."""

    def __init__(self, engine: "Engine", request: Request):
        self._engine, self._request = engine, request
        self.request_id = request.result.request_id

    def cancel(self) -> None:
        """Ends the request as it is, with finish reason "abort"; nothing if it is over."""
        self._engine._cancel(self._request)


class Engine:
    """Continuous batching over one model. All methods may be called from any thread.

    Args:
        params, config, runtime: the model.
        defaults: what all requests have in common.
        limits: what it may take.
        features: of pictures; None where the model sees none.
        constraints: makes `SamplingParams.structured_outputs` a factory of constraints; None where
            there is no structured output.

    Attributes:
        max_rows: most sequences at once.

    Raises:
        ValueError: limits that the runtime's buckets, or one another, do not allow.
    """

    def __init__(
        self,
        params: Weights,
        config: ModelConfig,
        runtime: Runtime,
        defaults: Defaults,
        limits: Limits,
        *,
        features: FeatureStore | None = None,
        constraints: Callable[[Any], Factory] | None = None,
    ):
        pieces = row_ways(runtime)  # a row is in one of them
        if limits.max_pages // pieces * runtime.page_size < defaults.max_model_len:
            where = f" in {pieces} pieces" if pieces > 1 else ""
            raise ValueError(
                f"max_pages={limits.max_pages:,} of {runtime.page_size} tokens{where} do not hold "
                f"max_model_len={defaults.max_model_len:,}"
            )
        # Pages of a cache in pieces cannot change places; an accelerator's memory is ours alone.
        growing = pieces == 1 and runtime.mesh.devices.flat[0].platform == "cpu"
        runner = Runner(
            params,
            config,
            runtime,
            features,
            max_rows=limits.max_rows,
            max_tokens=limits.max_tokens,
            max_model_len=defaults.max_model_len,
            num_pages=min(limits.max_pages, FIRST_PAGES) if growing else limits.max_pages,
        )
        self.runner = runner
        self._core = Core(
            runner,
            defaults.tokenizer,
            max_rows=limits.max_rows,
            max_tokens=limits.max_tokens,
            max_pages=limits.max_pages,
            shared=len({device.process_index for device in runtime.mesh.devices.flat}) > 1,
        )
        self.max_rows = limits.max_rows
        self._config, self._defaults, self._limits = config, defaults, limits
        self._constraints = constraints
        self._driver = Driver(self._core)
        self._lead = Lead(self._core, self._driver)
        self._queued: list[Request] = []  # that may still wait; only kept where they are limited

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        sink: Sink,
        *,
        request_id: str | None = None,
        name: str = "",
    ) -> Handle:
        """Takes a request in.

        Args:
            prompt: with at least one token.
            params: how to go on from it.
            sink: called with each event on the engine's thread; it must not block.
            request_id: of the result; default: a number.
            name: of the request in errors; default: "request" and its number.

        Raises:
            ValueError: it cannot run; it says why.
            QueueFull: ``max_waiting`` requests wait.
            EngineClosed: the engine takes no more requests.
        """
        params.check(
            name or "request",
            vocab_size=self._config.text.vocab_size,
            has_tokenizer=self._defaults.tokenizer is not None,
        )
        asked = Add(self._lead.number(), prompt, params, name)
        request = self._request(asked, sink, request_id)
        settings(request.rows[0])  # raises where they leave no token
        told = self._lead.told(asked)
        with self._driver.lock:
            self._driver.check_open()
            self._queue(request)
            self._driver.post(lambda: self._core.add(request), told)
        return Handle(self, request)

    def _request(self, asked: Add, sink: Sink, request_id: str | None = None) -> Request:
        constraint = None
        if asked.params.structured_outputs is not None:
            if self._constraints is None:
                raise ValueError(f"{asked.name or 'request'}: there is no structured output here")
            constraint = self._constraints(asked.params.structured_outputs)
        request = Request(
            asked.number,
            asked.prompt,
            asked.params,
            sink,
            request_id=request_id,
            name=asked.name,
            defaults=self._defaults,
            constraint=constraint,
        )
        request.sink = functools.partial(self._send, request, sink)
        return request

    def _send(self, request: Request, sink: Sink, event: Event) -> None:
        """Gives an event to its owner. Where that fails, which is not our code, the request ends
        and the others go on."""
        try:
            sink(event)
        except Exception:
            log.exception("%s: its sink has failed; the request is cancelled", request.name)
            request.sink = lambda _: None
            self._cancel(request)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Requests that are submitted inside begin together, when it is left."""
        with self._driver.lock:
            yield

    def stats(self) -> EngineStats:
        """How busy it is, and what it has done."""
        return self._core.stats()

    @property
    def totals(self) -> Totals:
        """Tokens and times of everything so far."""
        return dataclasses.replace(self._core.totals)

    def warmup(self, progress: Progress | None = None) -> None:
        """Compiles everything that a request can need, with the cache at its full size.

        progress: called with the programs done, and all there are.
        """
        done: Future[None] = Future()

        def run() -> None:
            try:
                self._driver.check_open()
                self._core.resize()
                warm_up(self.runner, progress)
            except StepFailed as failure:
                done.set_exception(failure.__cause__)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._driver.lock:
            self._driver.check_open()
            self._driver.post(run)
        done.result()

    def start(self) -> None:
        """Starts the thread, which a request does too."""
        with self._driver.lock:
            self._driver.check_open()
            self._driver.post(lambda: None)

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits for those that are there; whether all are over."""
        return self._driver.drain(timeout)

    def close(self) -> None:
        """Ends the thread; every request that is not over fails with `EngineClosed`."""
        self._driver.close()

    # ---- several processes -----------------------------------------------------------------------

    @property
    def shared(self) -> bool:
        """Whether it is on the devices of several processes, which all must take its requests."""
        return self._core.shared

    def lead(self) -> contextlib.AbstractContextManager[None]:
        """In process 0: what is submitted inside is told to the other processes, which `follow`.

        Requests that are not over when it is left fail.

        Raises:
            EngineClosed: the engine has stopped.
        """
        return self._lead.lead()

    def follow(self, compiled: Compile) -> None:
        """In another process: works on what process 0 submits, until that leaves `lead`.

        compiled: makes the form of a request's text, see `Forms.compiled`.

        Raises:
            RuntimeError: process 0 has failed.
            EngineClosed: the engine has stopped.
        """
        self._lead.follow(self._request, compiled)

    def _queue(self, request: Request) -> None:
        most = self._limits.max_waiting
        if most is None:
            return
        self._queued = [r for r in self._queued if not r.seated and not r.done]
        if len(self._queued) >= most:
            raise QueueFull(f"{len(self._queued)} requests wait already, max_waiting={most}")
        self._queued.append(request)

    def _cancel(self, request: Request) -> None:
        with self._driver.lock:
            if not self._lead.is_over(request):
                told = self._lead.told(Cancel(request.number))
                self._driver.post(lambda: self._core.cancel(request), told)
