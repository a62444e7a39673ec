"""A kernel's call at one real shape: what compiling, measuring and tuning have in common.

Knows functions, shapes and the least work they do; knows no operation. Every operation's `cases.py`
yields these from ``programs(device)``, so a script takes a new operation by its name.
"""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Program:
    """One call.

    Attributes:
        name: operation, model, shard, tokens and form of weights, joined by "/".
        fn: takes ``args``; traced where the mesh names the device.
        args: a tuple of trees of `jax.ShapeDtypeStruct`.
        moved: bytes that must pass through HBM at least.
        flops: operations of the matrix unit at least.
        trips: how often each loop of the kernel runs, by depth from outside in, as the schedule's
            estimate needs it; empty where it is not known.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    moved: float
    flops: float
    trips: tuple[float, ...] = ()
