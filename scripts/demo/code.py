"""Python to read and to fill in: the standard library's own sources.

Held out are whole files. Knows files and text; knows no token.
"""

import functools
import pathlib
import random
import re
import sysconfig

from demo.sample import Gap, Text
from demo.split import is_held_out

_LARGEST, _SMALLEST = 200_000, 2_000  # bytes: below tables of data, above lists of imports
_IDENTIFIER = re.compile(r"[A-Za-z_]\w{2,}")
_SKIP = ("test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "turtledemo")
BEFORE, AFTER, PLAIN = 260, 160, 500  # characters


@functools.cache
def sources(*, held_out: bool) -> tuple[str, ...]:
    """The files of one side, in a fixed order."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if set(parts) & set(_SKIP) or is_held_out("file", *parts) != held_out:
            continue
        if _SMALLEST <= path.stat().st_size <= _LARGEST:
            found.append(path.read_text(encoding="utf-8", errors="replace"))
    return tuple(found)


def reading(rng: random.Random) -> Text:
    """A stretch of a file, from the start of a line."""
    text = rng.choice(sources(held_out=False))
    start = text.rfind("\n", 0, rng.randrange(len(text))) + 1
    text = text[start : start + PLAIN]
    return Text(text, cut=rng.randrange(len(text)))


def gap(rng: random.Random, *, held_out: bool = False) -> Gap:
    """An identifier that is named elsewhere too, or a line, or any stretch, taken out."""
    while True:
        text = rng.choice(sources(held_out=held_out))
        at = rng.randrange(len(text))
        start, stop = max(0, at - BEFORE), min(len(text), at + AFTER)
        start = text.find("\n", start, at) + 1 or start
        window, at = text[start:stop], at - start
        taken = _taken(rng, window, at, identifier=held_out)
        if taken is None:
            continue
        first, last = taken
        wrapped = held_out or rng.random() < 0.8
        return Gap(window[:first], window[first:last], window[last:], wrapped)


def _taken(rng, window: str, at: int, *, identifier: bool) -> tuple[int, int] | None:
    kind = 0.0 if identifier else rng.random()
    if kind < 0.6:
        words = [m for m in _IDENTIFIER.finditer(window) if m.start() > 60]
        words = [m for m in words if window.count(m.group()) > 1]
        return rng.choice(words).span() if words else None
    if kind < 0.85:
        first = window.rfind("\n", 0, at) + 1
        last = window.find("\n", at)
        inside = last - first - len(window[first:last]) + len(window[first:last].lstrip())
        indent = len(window[first:last]) - len(window[first:last].lstrip())
        return (first + indent, last) if last > first + indent > 60 and inside < 60 else None
    last = min(len(window), at + rng.randint(1, 30))
    return (at, last) if at > 60 else None
