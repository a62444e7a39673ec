"""Stop strings in a stream of text. Knows text only; knows no tokens and no model."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through until a stop string is complete, whatever pieces it arrives in.

    A suffix that may be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False):
        """``include``: let the stop string itself through as well."""
        self._strings = tuple(strings)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, stops: bool = True) -> str:
        """Takes more text and returns what is safe to show; nothing any more after a match.

        stops: False lets strings that are complete with this text through; one that it only begins
        still counts.
        """
        if self.matched is not None:
            return ""
        if not self._strings:
            return text
        text = self._held + text
        found = [(text.find(s), -len(s), s) for s in self._strings if stops and s in text]
        if found:
            where, _, self.matched = min(found)
            self._held = ""
            return text[: where + len(self.matched) if self._include else where]
        keep = max(_overlap(text, s) for s in self._strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text still held back, when the stream ends without a match."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
