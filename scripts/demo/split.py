"""Which combinations are kept out of training: decided by the combination itself, once and for all.

Knows hashes; knows no lesson.
"""

import hashlib
import random
from collections.abc import Callable
from typing import TypeVar

ONE_IN = 8

_Made = TypeVar("_Made")


def is_held_out(*key: object) -> bool:
    """Whether a combination, e.g. ``("circle", "red", "top left")``, is for examination only."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % ONE_IN == 0


def draw(
    rng: random.Random,
    make: Callable[[random.Random], tuple[tuple, _Made]],
    *,
    held_out: bool,
) -> _Made:
    """Calls ``make`` until the key it returns beside its result is of the wanted side."""
    while True:
        key, made = make(rng)
        if is_held_out(*key) == held_out:
            return made
