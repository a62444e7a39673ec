"""Gives the text of an XML tool parameter the JSON type that the tool's schema asks for.

Knows JSON schema and the rules of Qwen3-Coder's published parsers. Does not know tags or streams.
Sources: sglang function_call/qwen3_coder_detector.py, vLLM's qwen3_coder parser; types that are not
written as `type` (anyOf, oneOf, allOf, $ref, enum, const) are inferred.
"""

import ast
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_STRINGS = ("string", "str", "text", "varchar", "char", "enum")
_INTEGER_STARTS = ("int", "uint", "long", "short", "unsigned")
_NUMBER_STARTS = ("num", "float")
_BOOLEANS = ("boolean", "bool", "binary")
_JSON_TYPES, _JSON_STARTS = ("object", "array", "arr"), ("dict", "list")

# Python's own limits on what text may ask of its parsers.
_PARSE_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


class ToolSchemas:
    """The parameter schemas of the tools a model was given, by function and parameter name."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None):
        self._roots: dict[str, Mapping[str, Any]] = {}
        for tool in tools or ():
            function = tool.get("function", tool)
            self._roots[function["name"]] = function.get("parameters") or {}

    def value(self, function: str, parameter: str, text: str) -> Any:
        """The JSON value of a parameter's text: a string where nothing else is known or possible.

        "null" in any case is null for every type, also for an unknown parameter.
        """
        if text.lower() == "null":
            return None
        root = self._roots.get(function, {})
        properties = root.get("properties")
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        if not isinstance(schema, Mapping):
            return text
        if isinstance(schema.get("type"), str):
            return _as_type(schema["type"].strip().lower(), text)
        return _as_inferred(list(alternatives(schema, root, set())), text)


def to_json(value: Any) -> str:
    """JSON as tool arguments carry it: non-ASCII text as it is, unless UTF-8 cannot hold it."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, from an escape such as "\\ud800"
        return json.dumps(value)
    return text


def _as_type(kind: str, text: str) -> Any:
    if kind in _STRINGS:
        return text
    if kind.startswith(_INTEGER_STARTS):
        return _parsed(text, int)
    if kind.startswith(_NUMBER_STARTS):
        return _parsed(text, _number)
    if kind in _BOOLEANS:
        return text.lower() == "true"
    if kind in _JSON_TYPES or kind.startswith(_JSON_STARTS):
        return _parsed(text, json.loads, _literal)
    return _parsed(text, _literal)


def _parsed(text: str, *readers: Callable[[str], Any]) -> Any:
    """What the first reader makes of the text that JSON can hold; the text itself if none can."""
    for read in readers:
        try:
            value = read(text)
            json.dumps(value, allow_nan=False)
        except _PARSE_ERRORS:
            continue
        return value
    return text


def _number(text: str) -> int | float:
    if "." in text or "e" in text.lower():
        return float(text)
    try:
        return int(text)
    except ValueError:
        return float(text)  # "inf", "nan": refused by the caller as not JSON


def _literal(text: str) -> Any:
    with warnings.catch_warnings():
        # "\d" in a model's string is no concern (Python 3.11 calls it a DeprecationWarning).
        warnings.simplefilter("ignore")
        return ast.literal_eval(text)


def alternatives(schema: Any, root: Mapping[str, Any], seen: set[str]) -> Iterator[tuple[str, Any]]:
    """("type", name) and ("value", one allowed value) for everything a schema without a single
    `type` allows, in order. Each $ref is followed once (`seen`): it may lead back to itself."""
    if not isinstance(schema, Mapping):
        return
    kinds = schema.get("type")
    if isinstance(kinds, str | list):
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            yield "type", str(kind).strip().lower()
        return
    if "const" in schema:
        yield "value", schema["const"]
    elif isinstance(schema.get("enum"), list):
        for value in schema["enum"]:
            yield "value", value
    elif isinstance(schema.get("$ref"), str):
        if schema["$ref"] not in seen:
            seen.add(schema["$ref"])
            yield from alternatives(resolve(schema["$ref"], root), root, seen)
    elif "properties" in schema or "additionalProperties" in schema:
        yield "type", "object"
    elif "items" in schema or "prefixItems" in schema:
        yield "type", "array"
    for key in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(key)
        for branch in branches if isinstance(branches, list) else ():
            yield from alternatives(branch, root, seen)


def resolve(ref: str, root: Mapping[str, Any]) -> Any:
    """What a local JSON pointer ("#/$defs/Point") points at in the parameters' schema, or None."""
    if not ref.startswith("#"):
        return None
    value: Any = root
    for part in ref[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _as_inferred(alternatives: list[tuple[str, Any]], text: str) -> Any:
    for kind, value in alternatives:
        if kind == "value" and text in (value, to_json(value), str(value)):
            return value
    kinds = [value if kind == "type" else _type_name(value) for kind, value in alternatives]
    kinds = [kind for kind in dict.fromkeys(kinds) if kind != "null"]
    if not kinds:
        return text
    if len(kinds) == 1:
        return _as_type(kinds[0], text)
    # Several types: take the one whose form the text has. Text that reads as a list or an object is
    # one where that is allowed; anything else is a string where a string is allowed.
    for kind in ("object", "array"):
        value = _as_type(kind, text)
        if kind in kinds and _type_name(value) == kind:
            return value
    if any(kind in _STRINGS for kind in kinds):
        return text
    for kind in ("boolean", "integer", "number"):
        value = text.lower() == "true" if text.lower() in ("true", "false") else text
        value = value if kind == "boolean" else _as_type(kind, text)
        if kind in kinds and _type_name(value) in (kind, "integer"):
            return value
    return text


def _type_name(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "integer", float: "number", dict: "object"}
    return names.get(type(value), "array" if isinstance(value, list | tuple) else "null")
