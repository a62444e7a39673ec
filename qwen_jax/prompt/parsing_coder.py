"""Incremental parser of the XML tool calls that Qwen3-Coder models write.

Knows the format and its rules for broken calls; shares the others with `parsing_tools`. Does not
know reasoning or transport. Source: sglang function_call/qwen3_coder_detector.py, vLLM's
qwen3_coder parser.
"""

import re

from qwen_jax.prompt.parsing_schema import ToolSchemas, to_json
from qwen_jax.prompt.parsing_tools import CLOSE, OPEN, ToolParser

_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"


class CoderParser(ToolParser):
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
        text, tag = self._scanner.until(OPEN, _FUNCTION)
        self._content(text)
        if tag is None:
            return False
        self._held = tag
        self._in_block = tag == OPEN
        self._state = self._opened if self._in_block else self._function_name
        return True

    def _opened(self) -> bool:
        """Behind <tool_call>: only white space may come before <function=."""
        buffer = self._scanner.buffer
        found = buffer.lstrip()
        for tag in (_FUNCTION, OPEN):
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
        _, tag = self._scanner.until(_FUNCTION, CLOSE)
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
        self._end_parameter(at_end=tag in (_FUNCTION_END, CLOSE))
        if tag == _PARAMETER:
            self._value = []
        elif tag == _PARAMETER_END:
            self._state = self._function
        else:
            self._end_function(tag)
        return True

    def _block_end(self) -> tuple[str, ...]:
        return (CLOSE,) if self._in_block else ()

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
        self._in_block = self._in_block and tag != CLOSE
        self._state = self._between

    def _end(self) -> None:
        rest = self._scanner.take(len(self._scanner.buffer))
        if self._state == self._parameter:
            self._value.append(rest)
            self._end_parameter(at_end=True)
        if self._state in (self._parameter, self._function):
            self._end_function(CLOSE)
        else:
            self._release(rest)
