"""The thread that drives an engine, one at a time: calls from outside, and turns.

Knows threads and locks; knows no request but as something that is not over. The thread ends when
there has been nothing to do for a while, and the next call starts another.
"""

import atexit
import collections
import logging
import threading
import weakref
from collections.abc import Callable

from qwen_jax import distributed
from qwen_jax.engine.core import Core
from qwen_jax.engine.events import EngineClosed
from qwen_jax.engine.turns import Turn, Turns

log = logging.getLogger(__name__)

_LINGER = 2.0  # seconds that the thread waits for a call before it ends

Call = Callable[[], None]


class Driver:
    """Runs a core. All methods may be called from any thread.

    Attributes:
        lock: a condition, to be held for `check_open` and `post`.
    """

    def __init__(self, core: Core):
        self._core = core
        self._turns = Turns() if distributed.count() > 1 else None
        self.lock = threading.Condition()
        self._calls: collections.deque[Call] = collections.deque()
        self._thread: threading.Thread | None = None
        self._draining = self._closed = False
        self._idle = True  # nothing to do, and nothing in hand
        self._error: BaseException | None = None
        _drivers.add(self)

    def check_open(self) -> None:
        """Raises `EngineClosed` if no more requests are taken."""
        if self._error is not None:
            raise EngineClosed(f"the engine has stopped: {self._error!r}") from self._error
        if self._closed or self._draining:
            raise EngineClosed("the engine is closed: it takes no more requests")

    def post(self, call: Call) -> None:
        """Has the thread make a call between two turns; nothing if it has ended for good."""
        if self._closed:
            return
        self._idle = False
        self._calls.append(call)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="qwen-jax engine", daemon=True)
            self._thread.start()
        self.lock.notify_all()

    def drain(self, timeout: float | None) -> bool:
        """Takes no more requests and waits for those that are there; whether all are over."""
        with self.lock:
            self._draining = True
            return self.lock.wait_for(lambda: self._idle, timeout)

    def close(self) -> None:
        """Ends the thread for good; what is not over fails."""
        with self.lock:
            self._closed = True
            thread = self._thread
            self.lock.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        try:
            while (calls := self._next_calls()) is not None:
                for call in calls:
                    call()
                self._core.turn()
        except BaseException as error:
            log.exception("the engine has stopped")
            self._error = error
        if self._thread is threading.current_thread():
            self._end()

    def _next_calls(self) -> list[Call] | None:
        """What to do before the next turn; None to end the thread."""

        def work() -> bool:
            return bool(self._calls) or self._core.busy or self._closed

        with self.lock:
            if not work():
                self._idle = True
                self.lock.notify_all()  # whoever drains
                if not self.lock.wait_for(work, _LINGER):
                    self._thread = None
                    return None
            if self._closed or self._turns is None:
                return None if self._closed else self._take_calls(len(self._calls))
            count = len(self._calls)
        return self._agree(self._turns, count)

    def _agree(self, turns: Turns, count: int) -> list[Call] | None:
        """The same calls in every process: ``count`` of them in process 0; None to end."""
        core = self._core
        if turns.decides:
            turns.say(Turn(count, core.scheduler.step_seconds, core.digest))
        else:
            while (turn := turns.hear()) is None:
                if self._closed:
                    return None
            count, core.scheduler.step_seconds = turn.calls, turn.step_seconds
            if turn.digest != core.digest:
                raise RuntimeError(
                    f"process {distributed.index()} has got other tokens than process 0: are "
                    "files, libraries and devices the same?"
                )
        with self.lock:
            self.lock.wait_for(lambda: len(self._calls) >= count or self._closed)
            return None if self._closed else self._take_calls(count)

    def _take_calls(self, count: int) -> list[Call]:
        return [self._calls.popleft() for _ in range(count)]

    def _end(self) -> None:
        """Leaves no request without a last event, when the thread ends for good."""
        with self.lock:
            self._closed = True
            calls = self._take_calls(len(self._calls))
        for call in calls:
            call()
        why = f"the engine has stopped: {self._error!r}" if self._error else "the engine was closed"
        self._core.fail_all(lambda name: EngineClosed(f"{name}: {why}"))
        with self.lock:
            self._idle = True
            self.lock.notify_all()


_drivers: "weakref.WeakSet[Driver]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A device must not be at work when the interpreter goes."""
    for driver in list(_drivers):
        driver.close()
