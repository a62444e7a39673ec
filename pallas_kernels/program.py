"""A kernel's call at one real shape: what compiling, measuring and tuning have in common.

Knows functions, shapes and the least work they do; knows no operation. Every operation's `cases.py`
yields these from ``programs(device)``, so a script takes a new operation by its name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Program:
    """One call.

    Attributes:
        name: operation, model, shard, tokens and form of weights, joined by "/".
        fn: takes ``args``; traced where the mesh names the device.
        args: a tuple of trees of `jax.ShapeDtypeStruct`.
        make: concrete ``args`` from a seed.
        moved: bytes that must pass through HBM at least.
        flops: operations of the matrix unit at least.
        copied: bytes that the kernel's own copies take.
        trips: how often each loop of the kernel's deepest nest runs, from outside in; what runs
            once for certain is no loop in a schedule.
        baselines: other ways to the same result, by name.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    make: Callable[[int], tuple[Any, ...]]
    moved: float
    flops: float
    copied: float
    trips: tuple[float, ...]
    baselines: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
