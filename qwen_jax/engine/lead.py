"""An engine of several processes, of which process 0 alone has requests: it leads, others follow.

Knows numbers of requests and what is told of them; knows neither steps nor tokens. Without a leader
every process submits the same requests in the same order, and nothing is told.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from qwen_jax.engine.core import Core
from qwen_jax.engine.driver import Call, Driver
from qwen_jax.engine.events import EngineClosed, Event, Failed, Finished
from qwen_jax.engine.request import Request, Sink
from qwen_jax.engine.wire import Add, Cancel, Over, decode, encode
from qwen_jax.requests import Prompt, SamplingParams

Compile = Callable[[SamplingParams, Prompt], SamplingParams]
"""Parameters with their form compiled for a prompt, as `Forms.compiled`."""

Make = Callable[[Add, Sink], Request]


class Lead:
    """Who has the requests of an engine, and what the others are told of them.

    Args:
        core, driver: of the engine.
    """

    def __init__(self, core: Core, driver: Driver):
        self._core, self._driver = core, driver
        self._numbers = itertools.count()
        self._leads = False
        self._led = 0  # requests with smaller numbers were led, and are over

    def number(self) -> int:
        """Of the next request: the same in all processes, for its seed may depend on it."""
        return next(self._numbers)

    def told(self, found: Add | Cancel) -> bytes | None:
        """What the other processes are told of a call; None where they make it too."""
        return encode(found) if self._leads else None

    def is_over(self, request: Request) -> bool:
        """Whether nothing can be done about a request any more."""
        return request.done or request.number < self._led

    @contextlib.contextmanager
    def lead(self) -> Iterator[None]:
        """See `Engine.lead`."""
        self._driver.rest()
        self._leads = True
        try:
            yield
        except BaseException as error:
            self._stop(repr(error))
            raise
        self._stop("")

    def _stop(self, why: str) -> None:
        told: Future[None] = Future()

        def end() -> None:
            _fail_all(self._core)
            told.set_result(None)

        with self._driver.lock:
            self._driver.check_open()
            self._leads, self._led = False, self.number()
            self._driver.post(end, encode(Over(self._led + 1, why)))
        told.result()
        with self._driver.lock:
            self._driver.check_open()  # an engine that has stopped makes its calls and tells nobody

    def follow(self, make: Make, compiled: Compile) -> None:
        """See `Engine.follow`.

        make: a request of what process 0 tells.
        """
        self._driver.rest()
        followed = _Followed(self._core, self._driver, make, compiled)
        self._driver.follow(followed.call)
        self._numbers = itertools.count(followed.over.number)
        if followed.over.why:
            raise RuntimeError(f"process 0 has failed: {followed.over.why}")


class _Followed:
    """The requests of process 0, as another process has them.

    Attributes:
        over: the last thing that was told, once it was.
    """

    over: Over

    def __init__(self, core: Core, driver: Driver, make: Make, compiled: Compile):
        self._core, self._driver, self._make, self._compiled = core, driver, make, compiled
        self._requests: dict[int, Request] = {}

    def call(self, raw: bytes) -> Call:
        """What is to be done about something that was told."""
        told = decode(raw)
        match told:
            case Add():
                return lambda: self._add(told)
            case Cancel():
                return lambda: self._cancel(told.number)
            case Over():
                return lambda: self._end(told)

    def _add(self, told: Add) -> None:
        def forget(event: Event) -> None:
            if isinstance(event, Finished | Failed):
                del self._requests[told.number]

        params = self._compiled(told.params, told.prompt)
        request = self._make(dataclasses.replace(told, params=params), forget)
        self._requests[told.number] = request
        self._core.add(request)

    def _cancel(self, number: int) -> None:
        if number in self._requests:  # else it came to its end before process 0 knew
            self._core.cancel(self._requests[number])

    def _end(self, over: Over) -> None:
        _fail_all(self._core)
        self.over = over
        self._driver.stop_following()


def _fail_all(core: Core) -> None:
    core.fail_all(lambda name: EngineClosed(f"{name}: process 0 leads no more"))
