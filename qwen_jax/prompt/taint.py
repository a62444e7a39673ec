"""Strings that remember, character by character, that a user wrote them.

A chat template mixes its own text with the user's, and a special token is one only where the
template wrote all of it. So every character of the user's that could be part of a special token is
replaced, before rendering, by a *twin*: one unused code point per such character. Whatever the
template does with the pieces, twins never match a special token, and afterwards they are turned
back. `UserText` hides this from the template: it holds twins, and answers every question
(`in`, `==`, `startswith`, `split` …) about the text as the user wrote it.

Knows strings. Does not know templates, token ids or messages.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
_PLANES = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class Twins:
    """A one-to-one map from the characters of special tokens to code points used nowhere else."""

    def __init__(self, alphabet: Iterable[str], texts: Iterable[str]):
        """`alphabet`: characters to replace; `texts`: everything whose characters are taken."""
        taken = {ord(char) for text in texts for char in _PRIVATE.findall(text)}
        free = (code for plane in _PLANES for code in plane if code not in taken)
        self._to_twin = dict(zip(map(ord, sorted(set(alphabet))), free, strict=False))
        if len(self._to_twin) < len(set(alphabet)):
            raise ValueError("the messages use every private-use code point: cannot mark user text")
        self._to_char = {code: char for char, code in self._to_twin.items()}

    def mark(self, text: str) -> "UserText":
        """The same text, to be handed to a template."""
        marked = UserText(text.translate(self._to_twin), self)
        marked._original = text
        return marked

    def restore(self, text: str) -> str:
        """Turn twins back into what the user wrote."""
        return text.translate(self._to_char)

    def mark_all(self, value: Any) -> Any:
        """Mark every string in nested mappings and lists, keys too."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, Mapping):
            return {self.mark_all(key): self.mark_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark_all(item) for item in value]
        return value


class UserText(str):
    """A string whose buffer holds twins, and whose methods see the original.

    It may be a mixture: what a template adds to a user's text stays the template's. A twin is one
    code point for one, so positions and lengths agree and pieces are cut out of the buffer.
    """

    buffer: str
    twins: Twins
    _original: str | None

    def __new__(cls, buffer: str, twins: Twins) -> "UserText":
        self = super().__new__(cls, buffer)
        self.buffer = buffer
        self.twins = twins
        self._original = None
        return self

    @property
    def original(self) -> str:
        if self._original is None:
            self._original = self.twins.restore(self.buffer)
        return self._original

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return self.twins.mark(repr(self.original)).buffer

    def __hash__(self) -> int:
        return hash(self.original)

    def __eq__(self, other: object) -> bool:
        return self.original == original(other)

    def __ne__(self, other: object) -> bool:
        return self.original != original(other)

    def __lt__(self, other: str) -> bool:
        return self.original < original(other)

    def __le__(self, other: str) -> bool:
        return self.original <= original(other)

    def __gt__(self, other: str) -> bool:
        return self.original > original(other)

    def __ge__(self, other: str) -> bool:
        return self.original >= original(other)

    def __contains__(self, part: str) -> bool:  # type: ignore[override]
        return original(part) in self.original

    def __getitem__(self, key: SupportsIndex | slice) -> "UserText":
        return UserText(self.buffer[key], self.twins)

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return (UserText(char, self.twins) for char in self.buffer)

    def __add__(self, other: str) -> "UserText":
        return UserText(self.buffer + _buffer(other), self.twins)

    def __radd__(self, other: str) -> "UserText":
        return UserText(_buffer(other) + self.buffer, self.twins)

    def __mul__(self, times: SupportsIndex) -> "UserText":
        return UserText(self.buffer * times, self.twins)

    def __rmul__(self, times: SupportsIndex) -> "UserText":  # type: ignore[override]
        return self * times

    def strip(self, chars: str | None = None) -> "UserText":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> "UserText":
        return self[len(self) - len(self.original.lstrip(original(chars))) :]

    def rstrip(self, chars: str | None = None) -> "UserText":
        return self[: len(self.original.rstrip(original(chars)))]

    def removeprefix(self, prefix: str) -> "UserText":
        return self[len(self) - len(self.original.removeprefix(original(prefix))) :]

    def removesuffix(self, suffix: str) -> "UserText":
        return self[: len(self.original.removesuffix(original(suffix)))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._cut(self.original.split(original(sep), maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._cut(self.original.rsplit(original(sep), maxsplit), len(sep or ""))

    def partition(self, sep: str) -> tuple[str, str, str]:
        before, found, after = self._cut(list(self.original.partition(original(sep))), 0)
        return before, found, after

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        before, found, after = self._cut(list(self.original.rpartition(original(sep))), 0)
        return before, found, after

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._cut(self.original.splitlines(keepends=True), 0)
        if keepends:
            return lines
        return [line[: len(str(original(line)).splitlines()[0])] for line in lines]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> "UserText":  # type: ignore[override]
        if old == "":
            return self.twins.mark(self.original.replace("", original(new), count))
        pieces = self.split(old, count)
        return UserText(_buffer(new).join(map(_buffer, pieces)), self.twins)

    def _cut(self, pieces: list[str], gap: int) -> list[str]:
        """Pieces of the original, in order with `gap` characters (0: any) between them, as ours."""
        cut: list[str] = []
        position = 0
        for piece in pieces:
            start = self.original.index(piece, position)
            cut.append(self[start : start + len(piece)])
            position = start + len(piece) + gap
        return cut


def original(value: Any) -> Any:
    """What the user wrote, for a UserText or for nested mappings, lists and tuples of them."""
    if isinstance(value, UserText):
        return value.original
    if isinstance(value, dict):
        return {original(key): original(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(original, value))
    return value


def twins_in(value: Any) -> Twins | None:
    """The Twins of the first UserText in a nested value, None where there is none."""
    if isinstance(value, UserText):
        return value.twins
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return next((twins for twins in map(twins_in, value) if twins is not None), None)
    return None


def as_text(value: Any) -> str:
    """str(value); a UserText if there is one in it."""
    text = str(value)
    twins = None if isinstance(value, str) else twins_in(value)
    return text if twins is None else UserText(text, twins)


def join(separator: str, pieces: list[str]) -> str:
    """separator.join(pieces); a UserText if one of them is."""
    twins = twins_in([separator, *pieces])
    text = _buffer(separator).join(pieces)
    return text if twins is None else UserText(text, twins)


def _buffer(text: str) -> str:
    return text.buffer if isinstance(text, UserText) else text


def _on_original(name: str) -> Any:
    method = getattr(str, name)

    def call(self: UserText, *args: Any) -> Any:
        result = method(self.original, *map(original, args))
        return self.twins.mark(result) if isinstance(result, str) else result

    call.__name__ = name
    return call


_ON_ORIGINAL = (
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace",
    "istitle", "isupper", "lower", "rfind", "rindex", "startswith", "swapcase", "title", "upper",
)  # fmt: skip

for _name in _ON_ORIGINAL:
    setattr(UserText, _name, _on_original(_name))
