"""The thread that drives an engine, one at a time: calls from outside, and turns.

Knows threads and locks; knows no request but as something that is not over. The thread ends when
there has been nothing to do for a while, and the next call starts another. Of an engine that lies
on the devices of several processes each has its own thread; they take the same calls at the same
turns, which all processes make, or process 0 makes and the others hear of.
"""

import atexit
import collections
import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Posted:
    """A call that waits for its turn; ``told``: what the other processes hear of it, if they do."""

    call: Call
    told: bytes | None


class Driver:
    """Runs a core. All methods may be called from any thread.

    Args:
        core: what runs.

    Attributes:
        lock: a condition, to be held for `check_open` and `post`.
    """

    def __init__(self, core: Core):
        self._core = core
        self._turns = Turns() if core.shared else None
        self.lock = threading.Condition()
        self._calls: collections.deque[Posted] = collections.deque()
        self._make: Callable[[bytes], Call] | None = None  # of what process 0 tells
        self._follows = False
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

    def post(self, call: Call, told: bytes | None = None) -> None:
        """Has the thread make a call between two turns; nothing if it has ended for good.

        told: in process 0, what the others are told of it; None where they make it too.
        """
        if self._closed:
            return
        self._idle = False
        self._calls.append(Posted(call, told))
        self._wake()

    def rest(self) -> None:
        """Returns when there is nothing to do."""
        with self.lock:
            self.lock.wait_for(lambda: self._idle or self._closed)

    def follow(self, make: Callable[[bytes], Call]) -> None:
        """Makes the calls that process 0 tells of, until one of them is `stop_following`.

        Raises:
            EngineClosed: the engine has stopped.
        """
        with self.lock:
            self.check_open()
            self._make, self._follows = make, True
            self._wake()
            self.lock.wait_for(lambda: self._closed or not self._follows)
            if self._follows:
                self.check_open()

    def stop_following(self) -> None:
        """Has `follow` return. What is still told is heard with the calls after it."""
        with self.lock:
            self._follows = False
            self.lock.notify_all()

    def _wake(self) -> None:
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
            return bool(self._calls) or self._core.busy or self._closed or self._follows

        with self.lock:
            if not work():
                self._idle = True
                self.lock.notify_all()  # whoever drains
                if not self.lock.wait_for(work, _LINGER):
                    self._thread = None
                    return None
            if self._closed or self._turns is None:
                return None if self._closed else self._take_calls(len(self._calls))
            posted = list(self._calls)
        if self._turns.decides:
            return self._decide(self._turns, posted)
        return self._hear(self._turns)

    def _decide(self, turns: Turns, posted: list[Posted]) -> list[Call] | None:
        """The calls of the next turn, in process 0; None to end."""
        told = tuple(each.told for each in posted if each.told is not None)
        core = self._core
        turns.say(Turn(len(posted), core.scheduler.step_seconds, core.digest, told))
        with self.lock:
            return None if self._closed else self._take_calls(len(posted))

    def _hear(self, turns: Turns) -> list[Call] | None:
        """The calls of the next turn, in another process than 0; None to end."""
        core = self._core
        while (turn := turns.hear()) is None:
            if self._closed:
                return None
        core.scheduler.step_seconds = turn.step_seconds
        if turn.digest != core.digest:
            raise RuntimeError(
                f"process {distributed.index()} has got other tokens than process 0: are files, "
                "libraries and devices the same?"
            )
        if turn.told:
            if self._make is None:
                raise RuntimeError("process 0 leads: all other processes must follow")
            return [self._make(each) for each in turn.told]
        with self.lock:
            if turn.calls and self._follows:
                raise RuntimeError("process 0 does not lead: no other process may follow")
            self.lock.wait_for(lambda: len(self._calls) >= turn.calls or self._closed)
            return None if self._closed else self._take_calls(turn.calls)

    def _take_calls(self, count: int) -> list[Call]:
        return [self._calls.popleft().call for _ in range(count)]

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
