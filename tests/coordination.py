"""A job of two processes without a process: the coordination service is a dictionary.

Each process of the job is a thread, or one turn after the other: what a later one waits for was
said by an earlier one.
"""

import contextlib
import threading
from unittest import mock

import jax

from qwen_jax import distributed
from qwen_jax.engine import turns


class Service:
    """The coordination service as a dictionary that waits for what is not there yet."""

    def __init__(self):
        self.values, self._came = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self._came:
            assert allow_overwrite or key not in self.values, f"{key} is there already"
            self.values[key] = value
            self._came.notify_all()

    key_value_set_bytes = key_value_set

    def key_value_increment(self, key, increment):
        self.values[key] = str(int(self.values.get(key, 0)) + increment)
        return int(self.values[key])

    def blocking_key_value_get(self, key, timeout_ms):
        with self._came:
            if not self._came.wait_for(lambda: key in self.values, min(timeout_ms / 1000, 5)):
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]

    blocking_key_value_get_bytes = blocking_key_value_get

    def key_value_dir_get(self, key):
        return [(k, v) for k, v in self.values.items() if k.startswith(key)]

    def key_value_delete(self, key):
        self.values = {k: v for k, v in self.values.items() if not k.startswith(f"{key}/")}


@contextlib.contextmanager
def two_processes():
    """A job of two processes; `as_process` says which one the test is."""
    service = Service()
    with (
        mock.patch.object(distributed, "count", return_value=2),
        mock.patch.object(distributed, "client", return_value=service),
    ):
        yield service


def as_process(index):
    """Inside it the code is that of process ``index``, with its own count of names used."""
    return mock.patch.multiple(distributed, index=lambda: index, _uses={})


def make_turns():
    """The turns of the first engine of a process."""
    with mock.patch.object(turns, "_engines", iter([0])):
        return turns.Turns()


def share(engine):
    """Makes an engine of this process one that two processes have together."""
    engine._core.shared, engine._driver._turns = True, make_turns()
