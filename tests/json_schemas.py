"""JSON schemas to constrain outputs with: a seeded generator of varied ones, and hard ones by hand.

Knows JSON schema; knows nothing of the code under test.
"""

import random
from typing import Any

Schema = dict[str, Any]

_FORMATS = ("date", "date-time", "time", "email", "uuid", "ipv4", "hostname")
_PATTERNS = (r"^[a-z]{2,5}$", r"^\d{3}-\d{2}$", r"^(ab|cd)+$", r"^[A-Z][a-z]*( [A-Z][a-z]*)?$")
_NAMES = ("id", "name", "tags", "größe", "a b", "x-1", "items", "type", "$ref_like", "")


def generated(count: int, seed: int = 0) -> list[Schema]:
    """``count`` schemas, each an object or an array at the top."""
    rng = random.Random(seed)
    return [_object(rng, 3) if rng.random() < 0.8 else _array(rng, 3) for _ in range(count)]


def _any(rng: random.Random, depth: int) -> Schema:
    leaves = (_string, _integer, _number, _enum, lambda r, d: {"type": "boolean"}, _union)
    nested = (_object, _array) if depth > 0 else ()
    return rng.choice((*leaves, *nested))(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_NAMES[:-1], rng.randint(1, 4))
    schema = {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": rng.choice((False, False, False, {"type": "integer"})),
    }
    if rng.random() < 0.2:
        schema["description"] = "said of the object"
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 2)
    schema = {"type": "array", "items": _any(rng, depth), "minItems": low}
    if rng.random() < 0.3:
        schema["prefixItems"] = [_any(rng, 0) for _ in range(rng.randint(1, 2))]
    schema["maxItems"] = low + rng.randint(1, 3)
    return schema


def _string(rng: random.Random, depth: int) -> Schema:
    kind = rng.random()
    if kind < 0.3:
        return {"type": "string", "format": rng.choice(_FORMATS)}
    if kind < 0.6:
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    low = rng.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 9)}


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(-500, 500)
    key = rng.choice(("minimum", "exclusiveMinimum"))
    schema = {"type": "integer", key: low, "maximum": low + rng.randint(2, 1000)}
    if rng.random() < 0.2:
        schema = {"type": "integer", "minimum": 0, "maximum": 999, "multipleOf": rng.choice((3, 7))}
    return schema


def _number(rng: random.Random, depth: int) -> Schema:
    low = round(rng.uniform(-10, 10), 2)
    return {"type": "number", "minimum": low, "exclusiveMaximum": low + rng.randint(1, 50)}


def _enum(rng: random.Random, depth: int) -> Schema:
    values = ["red", "grün", 'qu"ote', 1, 2.5, True, None, "a\nb"]
    picked = rng.sample(values, rng.randint(1, 4))
    return {"const": picked[0]} if rng.random() < 0.3 else {"enum": picked}


def _union(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.4:
        kinds = rng.sample(("integer", "boolean", "null"), 2)
        return {"type": kinds}
    return {"anyOf": [_any(rng, min(depth, 0)), {"type": "null"}]}


_NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": 0, "maximum": 9},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    },
    "required": ["value", "next"],
    "additionalProperties": False,
}
_POINT = {
    "type": "object",
    "properties": {axis: {"type": "number", "minimum": -1, "maximum": 1} for axis in "xy"},
    "required": ["x", "y"],
    "additionalProperties": False,
}


def _tagged(name: str, **properties: Any) -> Schema:
    return {
        "type": "object",
        "properties": {"kind": {"const": name}, **properties},
        "required": ["kind", *properties],
        "additionalProperties": False,
    }


_TEXT = {"type": "string", "maxLength": 8}

HARD: list[Schema] = [
    {"$defs": {"node": _NODE}, "$ref": "#/$defs/node"},
    {
        "definitions": {"p": _POINT},
        "type": "array",
        "items": {"$ref": "#/definitions/p"},
        "maxItems": 2,
    },
    {"anyOf": [_tagged("circle", r={"type": "integer"}), _tagged("text", body=_TEXT)]},
    {"oneOf": [_tagged("a", n={"type": "integer"}), _tagged("b", n={"type": "boolean"})]},
    {"allOf": [_POINT]},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}},
    {
        "type": "object",
        "patternProperties": {"^x_": {"type": "integer"}},
        "additionalProperties": False,
    },
    {
        "type": "array",
        "items": {
            "type": "array",
            "items": {"type": "array", "items": {"type": "null"}, "maxItems": 2},
            "maxItems": 2,
        },
        "maxItems": 2,
    },
    {
        "type": "array",
        "prefixItems": [{"type": "string", "maxLength": 3}, {"type": "integer"}],
        "items": False,
        "minItems": 2,
    },
    {"type": ["string", "integer", "null"], "maxLength": 4},
    {"enum": [{"deep": [1, {"x": None}]}, [1, 2], "s", 0, False]},
    {"const": {"a": "\u2028\U0001f600", "b": '\\"\t'}},
    {"type": "integer", "minimum": -1, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.001},
    {"type": "string", "minLength": 5, "maxLength": 5},
    {"type": "string", "pattern": "^(?:[01]\\d|2[0-3]):[0-5]\\d$"},
    {"type": "string", "format": "uuid"},
    {
        "type": "object",
        "properties": {'größe "x"': {"type": "integer"}},
        "required": ['größe "x"'],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {f"p{i}": {"type": "boolean"} for i in range(40)},
        "required": [f"p{i}" for i in range(0, 40, 2)],
        "additionalProperties": False,
    },
]
