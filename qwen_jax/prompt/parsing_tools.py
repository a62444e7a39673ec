"""Incremental parsers of the two ways in which Qwen3 models write tool calls.

Knows the formats, the rules for broken calls, and deltas. Does not know reasoning or transport.
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

from qwen_jax.prompt.parsing_schema import ToolSchemas, to_json
from qwen_jax.prompt.parsing_tags import TagScanner

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"

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


class _ToolParser:
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


class HermesParser(_ToolParser):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>` (Qwen3, 2507, VL).

    A call comes out whole when its closing tag arrives, since only then is it known to be JSON.
    Text between the tags that is not a call stays content; after a first call it is dropped.
    """

    _BEGINS = re.compile(r'\s*\{\s*"')
    _MAY_BEGIN = re.compile(r"\s*(\{\s*)?\Z")

    def _text(self) -> bool:
        text, tag = self._scanner.until(_OPEN)
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
        text, tag = self._scanner.until(_CLOSE)
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


class CoderParser(_ToolParser):
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>`.

    The name comes out when it is complete, each parameter when its end is known. The opening
    `<tool_call>` may be missing, a function or parameter unclosed. A value ends at the first of
    `</parameter>`, `<parameter=`, `</function>`, the block's `</tool_call>` and the end of the
    text; one newline at either side of it is layout.
    """

    _NAME = re.compile(r"([^\s<>]*)(.)?", re.DOTALL)
    _MAX_NAME = 256

    def __init__(self, schemas: ToolSchemas) -> None:
        super().__init__()
        self._schemas = schemas
        self._in_block = False  # between <tool_call> and </tool_call>
        self._name = ""
        self._empty = True  # no parameter written yet
        self._value: list[str] = []

    def _text(self) -> bool:
        text, tag = self._scanner.until(_OPEN, _FUNCTION)
        self._content(text)
        if tag is None:
            return False
        self._held = tag
        self._in_block = tag == _OPEN
        self._state = self._opened if self._in_block else self._function_name
        return True

    def _opened(self) -> bool:
        """Behind <tool_call>: only white space may come before <function=."""
        buffer = self._scanner.buffer
        found = buffer.lstrip()
        for tag in (_FUNCTION, _OPEN):
            if found.startswith(tag):
                self._held += self._scanner.take(len(buffer) - len(found) + len(tag))
                self._state = self._function_name if tag == _FUNCTION else self._opened
                return True
            if tag.startswith(found):
                return False
        self._release()
        self._in_block = False
        self._state = self._text
        return True

    def _function_name(self) -> bool:
        match = self._NAME.match(self._scanner.buffer)
        assert match is not None
        name, end = match.groups()
        if end is None and len(name) <= self._MAX_NAME:
            return False
        if end != ">" or not name:  # prose about the format, not a call
            self._release()
            self._state = self._between
            return True
        self._scanner.take(match.end())
        self._start_call(name)
        self._name, self._empty = name, True
        self._state = self._function
        return True

    def _between(self) -> bool:
        """Behind a function: another one, or the end of the block."""
        if not self._in_block or self._calls == 0:
            self._in_block = False
            self._state = self._text
            return True
        _, tag = self._scanner.until(_FUNCTION, _CLOSE)
        if tag is None:
            return False
        if tag == _FUNCTION:
            self._state = self._function_name
        else:
            self._in_block = False
            self._state = self._text
        return True

    def _function(self) -> bool:
        """Inside a function, between parameters."""
        _, tag = self._scanner.until(_PARAMETER, _FUNCTION_END, *self._block_end())
        if tag is None:
            return False
        if tag == _PARAMETER:
            self._value = []
            self._state = self._parameter
        else:
            self._end_function(tag)
        return True

    def _parameter(self) -> bool:
        text, tag = self._scanner.until(
            _PARAMETER_END, _PARAMETER, _FUNCTION_END, *self._block_end()
        )
        self._value.append(text)
        if tag is None:
            return False
        self._end_parameter(at_end=tag in (_FUNCTION_END, _CLOSE))
        if tag == _PARAMETER:
            self._value = []
        elif tag == _PARAMETER_END:
            self._state = self._function
        else:
            self._end_function(tag)
        return True

    def _block_end(self) -> tuple[str, ...]:
        return (_CLOSE,) if self._in_block else ()

    def _end_parameter(self, *, at_end: bool) -> None:
        key, found, value = "".join(self._value).partition(">")
        if at_end:  # the published rule ends at "$", which stands before a last newline
            value = value.removesuffix("\n")
        if not found:
            return
        value = value.removeprefix("\n").removesuffix("\n")
        pair = f"{to_json(key)}: {to_json(self._schemas.value(self._name, key, value))}"
        self._arguments(("{" if self._empty else ", ") + pair)
        self._empty = False

    def _end_function(self, tag: str) -> None:
        self._arguments("{}" if self._empty else "}")
        self._in_block = self._in_block and tag != _CLOSE
        self._state = self._between

    def _end(self) -> None:
        rest = self._scanner.take(len(self._scanner.buffer))
        if self._state == self._parameter:
            self._value.append(rest)
            self._end_parameter(at_end=True)
        if self._state in (self._parameter, self._function):
            self._end_function(_CLOSE)
        else:
            self._release(rest)
