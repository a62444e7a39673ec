"""Work that process 0 does for all processes that have a model together: it serves, or reads files.

Knows processes, signals and texts; knows no request.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from qwen_jax import distributed
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.lead import Compile


def led(engine: Engine, compiled: Compile, work: Callable[[], str]) -> str:
    """What ``work`` returns in process 0, the only one that calls it.

    The requests that it submits are worked on by all processes, which must call this too. Where the
    engine lies in one process this just calls ``work``.

    Args:
        engine: of the model.
        compiled: see `Engine.follow`.
        work: its result is told to the others.

    Raises:
        RuntimeError: process 0 has failed, or the engine has stopped.
    """
    if not engine.shared:
        return work()
    if distributed.index() == 0:
        with engine.lead():
            found = work()
        return distributed.from_first("led", lambda: found)
    with _deaf():
        engine.follow(compiled)
    return distributed.from_first("led", str)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Leaves ctrl-C and SIGTERM, which reach all processes of a job, to process 0: it brings its
    work to an end, and the others have to help with that."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # on no other there are signals
        for kind in (signal.SIGINT, signal.SIGTERM):
            before[kind] = signal.signal(kind, lambda *_: None)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
