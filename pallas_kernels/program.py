"""A kernel's call at one real shape: what compiling, measuring and tuning have in common.

Knows functions, shapes and the least work they do; knows no operation. Every operation's `cases.py`
yields these from ``programs(device)``, and from ``refused(device)`` what a kernel does not take, so
a script takes a new operation by its name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tunable:
    """What can be measured of a program whose kernel has tile sizes.

    Attributes:
        key: by which `tuning.lookup` finds the sizes; programs may share it.
        tiles: the sizes to try, those of the kernel's own rule first.
        with_tiles: the program's ``fn`` with other sizes.
    """

    key: str
    tiles: tuple[Mapping[str, int], ...]
    with_tiles: Callable[[Mapping[str, int]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Refused:
    """A call that the device's kernel does not take: its name, as `Program` has it, and why."""

    name: str
    reason: str


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
        tunable: None where the kernel has no sizes to choose.
        carried: which arguments are updated in place, by number, and the name of what each becomes
            in the result; they are donated.
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
    tunable: Tunable | None = None
    carried: Mapping[int, str] = dataclasses.field(default_factory=dict)
