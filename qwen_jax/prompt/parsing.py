"""What a model wrote, taken apart: reasoning, answer and tool calls, whole or as it streams.

Knows `<think>` and which formats exist. Does not know tokens, transport or the model's name: the
rendered prompt says whether the output starts inside the reasoning.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qwen_jax.prompt.parsing_coder import CoderParser
from qwen_jax.prompt.parsing_schema import ToolSchemas
from qwen_jax.prompt.parsing_tags import TagScanner
from qwen_jax.prompt.parsing_tools import (
    ContentDelta,
    Delta,
    HermesParser,
    PlainParser,
    ReasoningDelta,
    ToolCallDelta,
)

Reasoning = Literal["inside", "auto", "off"]
ToolFormat = Literal["hermes", "coder"]

_THINK, _THINK_END, _CALL = "<think>", "</think>", "<tool_call>"


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call the model wants made; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Message:
    """An assistant turn. A part that is not there is None (or, for calls, empty); `content` is ""
    only where there is nothing else either."""

    reasoning_content: str | None
    content: str | None
    tool_calls: tuple[ToolCall, ...] = ()


def tool_format(template: str) -> ToolFormat | None:
    """How a model writes tool calls, by what its chat template shows it; None for no tools."""
    if "<function=" in template:
        return "coder"
    return "hermes" if _CALL in template else None


def reasoning_state(prompt: str) -> Reasoning:
    """Where an output starts, by the prompt's last turn.

    "inside": the prompt opened `<think>`; "off": it also closed it (thinking switched off); "auto":
    neither, so the output reasons exactly if it begins with `<think>`.
    """
    turn = prompt.rpartition("<|im_start|>")[2]
    opened, closed = turn.rfind(_THINK), turn.rfind(_THINK_END)
    if not turn.startswith("assistant") and prompt != turn:
        return "auto"
    if opened > closed:
        return "inside"
    return "off" if closed >= 0 else "auto"


class OutputParser:
    """Turns an output's text, in any chunks, into deltas, and into a message at the end.

    reasoning: where the output starts (see `reasoning_state`). tool_format: None leaves calls in
    the content; give it only where tools were offered. tools: their schemas type the parameters of
    the "coder" format.
    """

    def __init__(
        self,
        *,
        reasoning: Reasoning = "auto",
        tool_format: ToolFormat | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ):
        if reasoning not in ("inside", "auto", "off"):
            raise ValueError(f"reasoning={reasoning!r} is unknown; use 'inside', 'auto' or 'off'")
        self._tools = _tool_parser(tool_format, tools)
        self._reasoning = _ReasoningCut(reasoning, calls=tool_format)
        self._deltas: list[Delta] = []
        self._finished = False

    def push(self, text: str) -> list[Delta]:
        """Take more text; the deltas that are certain now."""
        if self._finished:
            raise ValueError("push after finish: use a new OutputParser for each output")
        reasoning, content = self._reasoning.push(text)
        return self._collect(reasoning, self._tools.push(content))

    def finish(self) -> list[Delta]:
        """End the output; the last deltas."""
        if self._finished:
            return []
        self._finished = True
        reasoning, content = self._reasoning.finish()
        return self._collect(reasoning, [*self._tools.push(content), *self._tools.finish()])

    @property
    def message(self) -> Message:
        """All that came so far (after `finish`: the message)."""
        reasoning, content = [], []
        names: list[str] = []
        arguments: list[list[str]] = []
        for delta in self._deltas:
            match delta:
                case ReasoningDelta(text):
                    reasoning.append(text)
                case ContentDelta(text):
                    content.append(text)
                case ToolCallDelta(index, name, fragment):
                    if name is not None:
                        names.append(name)
                        arguments.append([])
                    arguments[index].append(fragment)
        calls = tuple(map(ToolCall, names, map("".join, arguments)))
        thought, answer = "".join(reasoning) or None, "".join(content)
        return Message(thought, answer or (None if calls or thought else ""), calls)

    def _collect(self, reasoning: str, rest: list[Delta]) -> list[Delta]:
        deltas: list[Delta] = [ReasoningDelta(reasoning)] if reasoning else []
        deltas += rest
        self._deltas += deltas
        return deltas


def parse(
    text: str,
    *,
    reasoning: Reasoning = "auto",
    tool_format: ToolFormat | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Message:
    """Take a whole output apart: `OutputParser` on one chunk."""
    parser = OutputParser(reasoning=reasoning, tool_format=tool_format, tools=tools)
    parser.push(text)
    parser.finish()
    return parser.message


def _tool_parser(
    tool_format: str | None, tools: Sequence[Mapping[str, Any]] | None
) -> HermesParser | CoderParser | PlainParser:
    match tool_format:
        case None:
            return PlainParser()
        case "hermes":
            return HermesParser()
        case "coder":
            return CoderParser(ToolSchemas(tools))
    raise ValueError(f"tool_format={tool_format!r} is unknown; use 'hermes', 'coder' or None")


class _ReasoningCut:
    """Cuts text into reasoning and the rest.

    Reasoning loses one newline at its start and one before `</think>`; the rest loses the up to two
    that follow it. Where calls are parsed, one inside reasoning that never closes ends it: text
    from there on waits until `</think>` or the end tells.
    """

    def __init__(self, start: Reasoning, *, calls: ToolFormat | None):
        self._scanner = TagScanner()
        self._calls = calls
        self._inside = start == "inside"
        self._state = self._rest if start == "off" else self._start
        self._newline = ""  # one at the end of what came so far: layout if </think> follows
        self._first = True
        self._waiting: list[str] = []  # from a call on, inside reasoning
        self._skip = 0  # newlines still to drop before the rest
        self._thought: list[str] = []
        self._after: list[str] = []

    def push(self, text: str) -> tuple[str, str]:
        """(more reasoning, more of the rest)."""
        self._scanner.buffer += text
        while self._state():
            pass
        return self._taken()

    def finish(self) -> tuple[str, str]:
        rest = self._scanner.take(len(self._scanner.buffer))
        if self._state == self._call:
            # No </think> came: the reasoning ended where the call began.
            self._after += [*self._waiting, rest]
        elif self._inside:
            self._think_text(rest)
            self._thought.append(self._newline)
        else:
            self._after.append(rest)
        return self._taken()

    def _taken(self) -> tuple[str, str]:
        taken = "".join(self._thought), "".join(self._after)
        self._thought, self._after = [], []
        return taken

    def _start(self) -> bool:
        """White space, then perhaps <think>; inside reasoning the tag may come once more."""
        found = self._scanner.buffer.lstrip()
        if found.startswith(_THINK):
            self._scanner.buffer = found[len(_THINK) :]
            self._inside, self._state = True, self._think
        elif _THINK.startswith(found):
            return False
        else:
            self._state = self._think if self._inside else self._rest
        return True

    def _think(self) -> bool:
        tags = (_THINK_END, _CALL) if self._calls else (_THINK_END,)
        text, tag = self._scanner.until(*tags)
        self._think_text(text)
        if tag == _THINK_END:
            self._close()
        elif tag == _CALL:
            self._scanner.buffer = _CALL + self._scanner.buffer
            self._state = self._maybe_call
        return tag is not None

    def _think_text(self, text: str) -> None:
        if text and self._first:
            text, self._first = text.removeprefix("\n"), False
        if text:
            text = self._newline + text
            kept = text.removesuffix("\n")
            self._newline = text[len(kept) :]
            self._thought.append(kept)

    def _maybe_call(self) -> bool:
        """At <tool_call> inside reasoning: is it a call, or prose about calls?"""
        behind = self._scanner.buffer[len(_CALL) :]
        begins, may_begin = _CALL_BEGINS[self._calls or "hermes"]
        if begins.match(behind):
            self._state = self._call
        elif may_begin.match(behind):
            return False
        else:
            self._think_text(self._scanner.take(len(_CALL)))
            self._state = self._think
        return True

    def _call(self) -> bool:
        text, tag = self._scanner.until(_THINK_END)
        self._waiting.append(text)
        if tag is None:
            return False
        self._think_text("".join(self._waiting))
        self._close()
        return True

    def _close(self) -> None:
        self._newline, self._skip, self._inside = "", 2, False
        self._state = self._rest

    def _rest(self) -> bool:
        text = self._scanner.take(len(self._scanner.buffer))
        while self._skip and text.startswith("\n"):
            text, self._skip = text[1:], self._skip - 1
        if text:
            self._skip = 0
            self._after.append(text)
        return False


# What must follow <tool_call> for a call, and what may still become that.
_CALL_BEGINS = {
    "hermes": (re.compile(r'\s*\{\s*"'), re.compile(r"\s*(\{\s*)?\Z")),
    "coder": (
        re.compile(r"\s*<function="),
        re.compile(r"\s*(<(f(u(n(c(t(i(o(n=?)?)?)?)?)?)?)?)?)?\Z"),
    ),
}
