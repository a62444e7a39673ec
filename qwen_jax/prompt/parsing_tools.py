"""Incremental parsers of tool calls: what both formats share, and the Hermes format.

Knows the format, the rules for broken calls, and deltas. Does not know reasoning or transport.
Each parser turns text into deltas; the whole message is the sum of the deltas, so streaming and
not streaming cannot differ, and neither can two ways of chunking the same text.

Both formats share these rules. Content is the text before the first call. `<tool_call>` that no
call follows is content like any other text (models mention it in prose), at once and not only at
the end. Text between and after calls is not content. A last call may lack its closing tags.
"""

import dataclasses
import json
import logging
import re
from typing import Any

from qwen_jax.prompt.parsing_schema import to_json
from qwen_jax.prompt.parsing_tags import TagScanner

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ReasoningDelta:
    """More text of the reasoning."""

    text: str


@dataclasses.dataclass(frozen=True)
class ContentDelta:
    """More text of the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCallDelta:
    """Part of call number `index`: its name (first delta of a call), or more of its arguments.

    The `arguments` of one call join to one JSON object.
    """

    index: int
    name: str | None = None
    arguments: str = ""


Delta = ReasoningDelta | ContentDelta | ToolCallDelta


class PlainParser:
    """No tools: all text is content."""

    def push(self, text: str) -> list[Delta]:
        return [ContentDelta(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


class ToolParser:
    """What both formats share: the loop over states, and what becomes of text outside calls."""

    def __init__(self) -> None:
        self._scanner = TagScanner()
        self._calls = 0
        self._held = ""  # an opening tag and what follows it, until it is known to open a call
        self._state = self._text
        self._out: list[Delta] = []

    def push(self, text: str) -> list[Delta]:
        """Take more text; the deltas that it completes."""
        self._scanner.buffer += text
        while self._state():
            pass
        out, self._out = self._out, []
        return out

    def finish(self) -> list[Delta]:
        """End the text: what was held back is a call or content."""
        self._end()
        out, self._out = self._out, []
        return out

    def _text(self) -> bool:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError

    def _content(self, text: str) -> None:
        if text and self._calls == 0:
            self._out.append(ContentDelta(text))

    def _release(self, more: str = "") -> None:
        """What was held turned out to be no call: it is content."""
        self._content(self._held + more)
        self._held = ""

    def _start_call(self, name: str) -> None:
        self._out.append(ToolCallDelta(self._calls, name=name))
        self._calls += 1
        self._held = ""

    def _arguments(self, fragment: str) -> None:
        self._out.append(ToolCallDelta(self._calls - 1, arguments=fragment))


class HermesParser(ToolParser):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>` (Qwen3, 2507, VL).

    A call comes out whole when its closing tag arrives, since only then is it known to be JSON.
    Text between the tags that is not a call stays content; after a first call it is dropped.
    """

    _BEGINS = re.compile(r'\s*\{\s*"')
    _MAY_BEGIN = re.compile(r"\s*(\{\s*)?\Z")

    def _text(self) -> bool:
        text, tag = self._scanner.until(OPEN)
        self._content(text)
        if tag is None:
            return False
        self._held = tag
        self._state = self._opened
        return True

    def _opened(self) -> bool:
        buffer = self._scanner.buffer
        if self._BEGINS.match(buffer):
            self._body: list[str] = []
            self._state = self._json
            return True
        if self._MAY_BEGIN.match(buffer):
            return False
        self._release()
        self._state = self._text
        return True

    def _json(self) -> bool:
        text, tag = self._scanner.until(CLOSE)
        self._body.append(text)
        if tag is None:
            return False
        self._close(tag)
        return True

    def _close(self, tag: str) -> None:
        body = "".join(self._body)
        call = read_hermes_call(body)
        if call is not None:
            self._start_call(call[0])
            self._arguments(call[1])
        else:
            if self._calls:
                _LOG.warning("left out a later tool call that is not valid: %.200r", body)
            self._release(body + tag)
        self._state = self._text

    def _end(self) -> None:
        rest = self._scanner.take(len(self._scanner.buffer))
        if self._state == self._json:
            self._body.append(rest)
            self._close("")
        else:
            self._release(rest)


def read_hermes_call(body: str) -> tuple[str, str] | None:
    """(name, arguments as JSON) of the text between the tags, None where it is not a call."""
    try:
        call: Any = json.loads(body, parse_constant=_no_constant)
        arguments = call["arguments"] if isinstance(call, dict) else None
        if isinstance(arguments, str):  # some models write the arguments as a JSON string
            arguments = json.loads(arguments, parse_constant=_no_constant)
    except (ValueError, KeyError, RecursionError):
        return None
    if not isinstance(arguments, dict) or not isinstance(call["name"], str) or not call["name"]:
        return None
    return call["name"], to_json(arguments)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
