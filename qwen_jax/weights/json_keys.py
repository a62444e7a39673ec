"""Reads a JSON object strictly: every key is asked for by name, and what nobody asked for raises.

Knows JSON types and close spellings; knows no model. A misspelt key is never a default in disguise.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

REQUIRED = object()  # the default of a key that must be there


class Keys:
    """The keys of one JSON object: each is taken once, and what is left is judged by `finish`.

    Args:
        raw: the parsed object.
        where: what to call it in an error.
    """

    def __init__(self, raw: Any, where: str):
        if not isinstance(raw, Mapping):
            raise ValueError(f"{where}: expected a JSON object, found {raw!r}")
        self.where = where
        self._left = dict(raw)
        self._known: set[str] = set()

    def take(self, key: str, default: Any = REQUIRED, *, also: str | None = None) -> Any:
        """The value of ``key``; null counts as absent.

        Args:
            key: its name.
            default: of an absent key; without one, absence raises.
            also: another spelling of the same key.

        Raises:
            ValueError: the key is missing, or its two spellings differ.
        """
        names = [key] if also is None else [key, also]
        self._known.update(names)
        found = {n: v for n in names if (v := self._left.pop(n, None)) is not None}
        values = list(found.values())
        if not values and default is REQUIRED:
            raise ValueError(f"{self.where}: the key {key!r} is missing{self._near(key)}")
        if any(value != values[0] for value in values[1:]):
            raise ValueError(f"{self.where}: two spellings of one key differ: {found}")
        return values[0] if values else default

    def items(self) -> list[tuple[str, Any]]:
        """The keys not taken yet that are not null, with their values."""
        return [(key, value) for key, value in self._left.items() if value is not None]

    def same(self, key: str, *allowed: Any, also: str | None = None) -> None:
        """Takes a key that may be absent and must otherwise have one of the allowed values."""
        value = self.take(key, allowed[0], also=also)
        if value not in allowed:
            options = " or ".join(repr(a) for a in allowed)
            raise ValueError(f"{self.where}: {key}={value!r} is not supported, only {options}")

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        """Takes true or false."""
        return self._checked(key, self.take(key, default), bool, "true or false")

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """Takes a positive number."""
        what = "a positive number"
        value = self._checked(key, self.take(key, default), (int, float), what)
        if not 0 < value < math.inf:
            raise ValueError(f"{self.where}: {key}={value!r} is not {what}")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        """Takes a positive number that may be absent."""
        if self._left.get(key) is None:
            return self.take(key, None)
        return self.number(key)

    def integer(
        self, key: str, default: Any = REQUIRED, *, least: int = 1, also: str | None = None
    ) -> int:
        """Takes an integer that is ``least`` or more."""
        return self._integer(key, self.take(key, default, also=also), least)

    def integers(self, key: str, default: Any = REQUIRED, *, least: int = 0) -> tuple[int, ...]:
        """Takes a list of integers that are ``least`` or more; one integer is a list of one."""
        value = self.take(key, default)
        if not isinstance(value, (list, tuple)):
            value = [value]
        return tuple(self._integer(key, each, least) for each in value)

    def finish(self, ignore: frozenset[str] = frozenset()) -> None:
        """Raises for keys that are left, say something, and are not to be ignored.

        Args:
            ignore: names that are known to say nothing here; so are all with a leading "_".
        """
        unknown = {
            key: value
            for key, value in self._left.items()
            if value and key not in ignore and not key.startswith("_")
        }
        if unknown:
            listed = "; ".join(f"{k!r} (= {v!r}){self._near(k)}" for k, v in unknown.items())
            raise ValueError(
                f"{self.where}: unknown keys that might change the result: {listed}. "
                "Remove those that do not"
            )

    def _integer(self, key: str, value: Any, least: int) -> int:
        what = f"an integer of {least} or more"
        if self._checked(key, value, int, what) < least:
            raise ValueError(f"{self.where}: {key}={value!r} is not {what}")
        return value

    def _checked(self, key: str, value: Any, kind: Any, what: str) -> Any:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.where}: {key}={value!r} is not {what}")
        return value

    def _near(self, key: str) -> str:
        """A hint, where a missing key was left over or an unknown one asked for by its like."""
        near = difflib.get_close_matches(key, {*self._known, *self._left} - {key}, n=1, cutoff=0.8)
        return f", did you mean {near[0]!r}?" if near else ""
