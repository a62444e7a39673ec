r"""Parameters of a call in the Coder format: a schema's properties as Lark rules.

A value stands between ``<parameter=KEY>\n`` and ``\n</parameter>\n``. A string is raw text there,
everything else is JSON; `prompt.parsing_schema` reads it back by the same schema, and what it would
read as another value is not allowed here. Parameters come in the schema's order, optional ones may
be left out. Of a string's keywords ``enum``, ``const``, ``pattern``, ``minLength`` and
``maxLength`` are held, ``format`` is not.
"""

import json
from collections.abc import Mapping
from typing import Any

from qwen_jax.prompt.parsing_schema import alternatives, resolve, to_json

_END = "\n</parameter>\n"
# What ends a value for the parser, wherever it stands.
_TAGS = r"<\/parameter>|<parameter=|<\/function>|<\/?tool_call>"
_ANY = "/(?s:.*)/"
_NO_TAG = f"{_ANY} & ~/(?s:.*)({_TAGS})(?s:.*)/"
_NOT_NULL = "~/(?i:null)/"  # the parser takes it for null, whatever the schema says
_DEFINITIONS = ("$defs", "definitions")
_STRINGS = ("string", "str", "text", "varchar", "char", "enum")
# Names that tools not written for OpenAI use, as the parser understands them.
_JSON_NAMES = {
    "int": "integer",
    "uint": "integer",
    "long": "integer",
    "short": "integer",
    "num": "number",
    "float": "number",
    "bool": "boolean",
    "dict": "object",
    "list": "array",
    "arr": "array",
}


def json_rule(rule: str, schema: Any, options: Mapping[str, Any]) -> str:
    """A rule for JSON of a schema, with llguidance's options for how it is laid out."""
    whole = {"anyOf": [schema]} if isinstance(schema, bool) else schema
    return f"{rule}: %json {json.dumps({**whole, 'x-guidance': dict(options)})}"


def parameter_rules(
    rule: str, function: str, parameters: Mapping[str, Any], layout: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """(what stands between the function's tags, the rules that it uses).

    Raises:
        ValueError: the schema has no properties to go by, or a name that the format cannot hold.
    """
    root = parameters
    if isinstance(parameters.get("$ref"), str):
        parameters = resolve(parameters["$ref"], root) or {}
    properties = parameters.get("properties", {})
    if not isinstance(properties, Mapping) or (not properties and "anyOf" in parameters):
        raise ValueError(f"tool {function!r}: parameters need 'properties', one for each parameter")
    required = parameters.get("required", [])
    missing = [key for key in required if key not in properties]
    if missing:
        raise ValueError(f"tool {function!r}: required {missing[0]!r} is not among properties")
    sequence: list[str] = []
    rules: list[str] = []
    for i, (key, schema) in enumerate(properties.items()):
        if not key or any(char in key for char in "<>\n"):
            raise ValueError(f"tool {function!r}: {key!r:.80} cannot be a parameter's name")
        own = f"{rule}_{i}"
        sequence.append(own if key in required else f"{own}?")
        rules.append(f"{own}: {json.dumps(f'<parameter={key}>{chr(10)}')} {own}_value")
        rules += _Value(f"{own}_value", f"tool {function!r}: {key!r}", schema, root, layout).rules()
    return " ".join(sequence), rules


class _Value:
    """The rules of one value, its end tag included."""

    def __init__(
        self, rule: str, name: str, schema: Any, root: Mapping[str, Any], layout: Mapping[str, Any]
    ):
        self._rule, self._name, self._layout = rule, name, layout
        self._schema, self._root = schema, root
        self._text = f"{rule.upper()}_TEXT"

    def rules(self) -> list[str]:
        found = list(alternatives(self._schema, self._root, set()))
        values = [value for kind, value in found if kind == "value"]
        kinds = [value for kind, value in found if kind == "type"]
        enum = self._enum()
        if enum is not None or (values and not kinds):
            return self._choice(values if enum is None else enum)
        if not kinds or any(kind in _STRINGS for kind in kinds):
            return self._string(kinds)
        return self._json(kinds)

    def _enum(self) -> list[Any] | None:
        """The values allowed by an enum beside a type, which says nothing more then."""
        if not isinstance(self._schema, Mapping):
            return None
        if "const" in self._schema:
            return [self._schema["const"]]
        enum = self._schema.get("enum")
        return enum if isinstance(enum, list) else None

    def _choice(self, values: list[Any]) -> list[str]:
        texts = [value if isinstance(value, str) else to_json(value) for value in values]
        return [
            f"{self._rule}: {' | '.join(json.dumps(t + _END, ensure_ascii=False) for t in texts)}"
        ]

    def _string(self, kinds: list[str]) -> list[str]:
        parts = [_NO_TAG, _NOT_NULL]
        if len(kinds) == 1:
            parts += self._limits()
        # One lexeme with its end: the lexer goes for the longest and would not come back to null.
        null = f" | {json.dumps('null' + _END)}" if "null" in kinds else ""
        return [
            f"{self._rule}: {self._text}{null}",
            f"{self._text}: ({' & '.join(parts)}) {json.dumps(_END)}",
        ]

    def _limits(self) -> list[str]:
        """What a lone string type says of its text, as further regular expressions."""
        schema = self._schema
        if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str):
            schema = resolve(schema["$ref"], self._root)
        if not isinstance(schema, Mapping):
            return []
        limits = []
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        if low or high is not None:
            limits.append(f"/(?s:.{{{int(low)},{'' if high is None else int(high)}}})/")
        if isinstance(schema.get("pattern"), str):
            limits.append(f"/{self._searched(schema['pattern'])}/")
        return limits

    def _searched(self, pattern: str) -> str:
        """A pattern, which may match anywhere in a JSON string, as one of the whole text."""
        from llguidance import regex_to_lark

        before = "" if pattern.startswith("^") else "(?s:.*)"
        after = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
        pattern = pattern[not before :]
        pattern = pattern if after else pattern[:-1]
        return f"{before}({regex_to_lark(pattern, 'dw')}){after}"

    def _json(self, kinds: list[str]) -> list[str]:
        schema = self._schema
        if isinstance(schema, Mapping) and isinstance(schema.get("type"), str):
            schema = {**schema, "type": _json_name(schema["type"])}
        if isinstance(schema, Mapping):
            shared = {key: self._root[key] for key in _DEFINITIONS if key in self._root}
            schema = {**shared, **schema}
        return [
            f"{self._rule}: {self._rule}_json {json.dumps(_END)}",
            json_rule(f"{self._rule}_json", schema, self._layout),
        ]


def _json_name(kind: str) -> str:
    found = [name for start, name in _JSON_NAMES.items() if kind.strip().lower().startswith(start)]
    return found[0] if found else kind
