"""Checks a conversation and brings it to the one form that every chat template here understands.

Knows OpenAI's message format and what templates trip over. Does not know templates or tokens.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
_TEXT_PART, _MEDIA_PARTS = "text", ("image", "image_url", "video", "video_url")
_MEDIA_ROLES = ("user", "tool")  # templates leave pictures of other roles out

_LOG = logging.getLogger(__name__)


def normalize_messages(
    messages: Sequence[Mapping[str, Any]], *, accepts_parts: bool
) -> list[dict[str, Any]]:
    """The conversation as new plain dicts; ValueError names the message and what is wrong with it.

    - keys whose value is None are left out; `content` of an assistant turn may be missing ("").
    - content given as parts: passed on where the template reads parts (`accepts_parts`; a
      `video_url` part also gets the `video` key that templates look for); otherwise the texts are
      joined by newlines, and a picture is an error.
    - `tool_calls`: `arguments` as a JSON string becomes a mapping ("" counts as {}).
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            f"messages must be a non-empty list of {{'role', 'content'}}, got {messages!r:.80}"
        )
    return [
        _message(message, f"messages[{i}]", accepts_parts) for i, message in enumerate(messages)
    ]


def normalize_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tools as plain dicts in their own order, None for none; ValueError names the bad one."""
    if not tools:
        return None
    if isinstance(tools, str | Mapping):
        raise ValueError(f"tools must be a list of function definitions, got {tools!r:.80}")
    return [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def _message(message: Any, where: str, accepts_parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be a mapping with role and content, got {message!r:.80}")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}: role {role!r:.80} is unknown; use one of {', '.join(ROLES)}")
    if not isinstance(message.get("reasoning_content", ""), str):
        raise ValueError(f"{where}.reasoning_content must be a string")
    calls = message.pop("tool_calls", None)
    if calls:
        if role != "assistant":
            raise ValueError(f"{where}: only an assistant message can have tool_calls, not {role}")
        message["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    if (
        "content" not in message
        and role == "assistant"
        and (calls or "reasoning_content" in message)
    ):
        message["content"] = ""
    message["content"] = _content(message.get("content"), role, where, accepts_parts)
    return message


def _content(
    content: Any, role: str, where: str, accepts_parts: bool
) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if content is None:
        raise ValueError(f"{where} ({role}) has no content")
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise ValueError(
            f"{where}.content must be a string or a list of parts, got {content!r:.80}"
        )
    parts = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    media = [part["type"] for part in parts if part["type"] != _TEXT_PART]
    if media and not accepts_parts:
        raise ValueError(f"{where} has a part {media[0]!r}, but this chat template takes text only")
    if media and role not in _MEDIA_ROLES:
        raise ValueError(
            f"{where}: a {role} message cannot hold {media[0]!r}; "
            f"put it into a {' or '.join(_MEDIA_ROLES)} message"
        )
    return parts if accepts_parts else "\n".join(part["text"] for part in parts)


def _part(part: Any, where: str) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} must be a mapping with a type, got {part!r:.80}")
    part = dict(part)
    kind = part.get("type")
    if kind is None:  # {"text": …} or {"image": …}, as Qwen's own examples write them
        kind = next((key for key in (_TEXT_PART, *_MEDIA_PARTS) if key in part), None)
        part["type"] = kind
    if kind not in (_TEXT_PART, *_MEDIA_PARTS):
        known = ", ".join((_TEXT_PART, *_MEDIA_PARTS))
        raise ValueError(f"{where}: type {part.get('type')!r:.80} is unknown; use one of {known}")
    if kind == _TEXT_PART and not isinstance(part.get("text"), str):
        raise ValueError(
            f"{where}: a text part needs a string 'text', got {part.get('text')!r:.80}"
        )
    if kind == "video_url":
        part["type"] = "video"
        part.setdefault("video", part.pop("video_url", None))
    return part


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise ValueError(f"{where} must be a list, got {calls!r:.80}")
    return [_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ValueError(f"{where} must be a mapping, got {call!r:.80}")
    nested = "function" in call
    function = call["function"] if nested else call
    if not isinstance(function, Mapping) or not _is_name(function.get("name")):
        raise ValueError(f"{where} needs a function with a name, got {call!r:.80}")
    arguments = _arguments(function.get("arguments"), where)
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if nested else function


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_no_constant)
        except ValueError as error:
            raise ValueError(f"{where}.function.arguments is not JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}.function.arguments must be a JSON object, got {arguments!r:.80}")
    return dict(arguments)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not _is_name(function.get("name")):
        raise ValueError(
            f"{where} must be {{'type': 'function', 'function': {{'name', 'description', "
            f"'parameters'}}}}, got {tool!r:.80}"
        )
    if not isinstance(function.get("parameters", {}), Mapping | None):
        raise ValueError(f"{where} ({function['name']}): parameters must be a JSON schema object")
    return dict(tool)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name != ""


def log_dropped(messages: Sequence[Mapping[str, Any]], rendered: str) -> None:
    """Log the system messages a template left out (Qwen3-VL's keeps only a first one)."""
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] != "system" or not isinstance(content, str):
            continue
        if content.strip() not in rendered:
            _LOG.warning("the chat template leaves out messages[%d] (system)", index)
