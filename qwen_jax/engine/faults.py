"""Errors of the device, told apart from our own."""

from collections.abc import Callable, Sequence
from typing import Any

from qwen_jax.engine.row import Row


class DeviceError(RuntimeError):
    """A step that a request was in has failed; names the request."""


class StepFailed(Exception):
    """Something on the device has raised; the cause says what. ``rows`` are those it was for."""

    def __init__(self, rows: Sequence[Row]):
        super().__init__()
        self.rows = rows


def on_device(call: Callable, *args: Any, rows: Sequence[Row] = ()) -> Any:
    """Makes a call that works on the device; raises `StepFailed` from whatever it raises."""
    try:
        return call(*args)
    except Exception as error:
        raise StepFailed(rows) from error
