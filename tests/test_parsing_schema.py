"""Types of XML tool parameters, by the tool's schema."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.prompt.parsing_schema import ToolSchemas, to_json


def typed(schema, text, **root):
    parameters = {"type": "object", "properties": {"p": schema}, **root}
    schemas = ToolSchemas(
        [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    )
    return schemas.value("f", "p", text)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        *[(kind, "12", "12") for kind in ("string", "str", "text", "varchar", "char", "enum")],
        *[(kind, "12", 12) for kind in ("integer", "int", "int64", "uint8", "long", "short")],
        ("unsigned int", "12", 12),
        ("Integer ", "12", 12),
        ("integer", "-3", -3),
        ("integer", "1.5", "1.5"),
        ("integer", "twelve", "twelve"),
        ("integer", "9" * 5000, "9" * 5000),
        ("number", "1.5", 1.5),
        ("number", "2", 2),
        ("number", "2.0", 2.0),
        ("number", "1e3", 1000.0),
        ("num", "12345678901234567890", 12345678901234567890),
        ("float32", "0.5", 0.5),
        ("number", "nan", "nan"),
        ("number", "inf", "inf"),
        ("number", "1e999", "1e999"),
        ("number", "x", "x"),
        ("boolean", "true", True),
        ("bool", "True", True),
        ("binary", "false", False),
        ("boolean", "yes", False),
        ("object", '{"a": [1, null]}', {"a": [1, None]}),
        ("object", "{'a': True, 'b': None}", {"a": True, "b": None}),
        ("dict[str, int]", '{"a": 1}', {"a": 1}),
        ("array", "[1, 2]", [1, 2]),
        ("arr", "(1, 2)", (1, 2)),
        ("list[str]", "['a']", ["a"]),
        ("array", "[1, 2", "[1, 2"),
        ("array", "{1, 2}", "{1, 2}"),
        ("object", '{"a": NaN}', '{"a": NaN}'),
        ("array", "[" * 100_000, "[" * 100_000),
        ("array", "'\\d'", "\\d"),
        ("any", "3", 3),
        ("any", "'x'", "x"),
        ("any", "plain words", "plain words"),
        *[(kind, "null", None) for kind in ("string", "integer", "object", "any")],
        ("string", "NULL", None),
        ("string", " null", " null"),
    ],
)
def test_a_written_type_decides(kind, text, value):
    result = typed({"type": kind}, text)
    assert (result, type(result)) == (value, type(value))


def test_the_unknown_is_a_string():
    schemas = ToolSchemas([{"name": "f", "parameters": {"properties": {"p": {"type": "integer"}}}}])
    assert schemas.value("f", "p", "1") == 1
    assert schemas.value("f", "q", "1") == "1"
    assert schemas.value("g", "p", "1") == "1"
    assert schemas.value("g", "p", "Null") is None
    assert (
        ToolSchemas([{"name": "f"}, {"name": "g", "parameters": None}]).value("f", "p", "1") == "1"
    )
    assert ToolSchemas([{"name": "f", "parameters": {"properties": 5}}]).value("f", "p", "1") == "1"


DEFS = {
    "$defs": {
        "Point": {"properties": {"x": {"type": "number"}}},
        "a/b~c": {"type": "integer"},
        "loop": {
            "anyOf": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}, {"type": "integer"}]
        },
    }
}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "5", 5),
        ({"oneOf": [{"type": "array"}, {"type": "null"}]}, "[1]", [1]),
        ({"allOf": [{"description": "x"}, {"type": "boolean"}]}, "true", True),
        ({"type": ["integer", "null"]}, "5", 5),
        ({"type": ["string", "integer"]}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, '["a"]', ["a"]),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "a", "a"),
        ({"anyOf": [{"type": "string"}, {"type": "object"}]}, "[1]", "[1]"),
        ({"anyOf": [{"type": "integer"}, {"type": "boolean"}]}, "true", True),
        ({"anyOf": [{"type": "boolean"}, {"type": "integer"}]}, "7", 7),
        ({"anyOf": [{"type": "integer"}, {"type": "number"}]}, "1.5", 1.5),
        ({"anyOf": [{"type": "boolean"}, {"type": "number"}]}, "2", 2),
        ({"anyOf": [{"type": "boolean"}, {"type": "integer"}]}, "maybe", "maybe"),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["1", 2]}, "1", "1"),
        ({"enum": [True, "x"]}, "True", True),
        ({"enum": ["a", "b"]}, "c", "c"),
        ({"enum": [1, 2]}, "3", 3),
        ({"const": 7}, "7", 7),
        ({"properties": {"a": {}}}, '{"a": 1}', {"a": 1}),
        ({"items": {"type": "integer"}}, "[1]", [1]),
        ({"$ref": "#/$defs/Point"}, '{"x": 1}', {"x": 1}),
        ({"$ref": "#/$defs/a~1b~0c"}, "5", 5),
        ({"$ref": "#/$defs/loop"}, "5", 5),
        ({"$ref": "#/$defs/missing"}, "5", "5"),
        ({"$ref": "http://example.com/x"}, "5", "5"),
        ({"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]}, '{"x": 1}', {"x": 1}),
        ({}, "5", "5"),
        ({"description": "no type"}, "true", "true"),
        ({"anyOf": "nonsense"}, "5", "5"),
        ({"anyOf": [{"type": "integer"}]}, "Null", None),
    ],
)
def test_a_type_that_is_not_written_is_inferred(schema, text, value):
    result = typed(schema, text, **DEFS)
    assert (result, type(result)) == (value, type(value))


KINDS = st.sampled_from(["string", "integer", "number", "boolean", "array", "object", "any", "x y"])
LITERALS = st.text("[]{}()'\"\\,:-+.0123456789eEjnulNoTrFasx \n\0", max_size=20)


@given(KINDS, LITERALS | st.text(max_size=10))
def test_any_text_becomes_json(kind, text):
    value = typed({"type": kind}, text)
    json.loads(to_json(value), parse_constant=lambda name: pytest.fail(name))
    to_json(value).encode()


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=6))
def test_a_value_as_the_template_prints_it_comes_back(value):
    # Coder's template prints lists as JSON or, in one revision, as Python does.
    if isinstance(value, list):
        assert typed({"type": "array"}, json.dumps(value, ensure_ascii=False)) == value
        assert typed({"type": "array"}, str(value)) == value
