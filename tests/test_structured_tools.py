import json

import json_schemas
import jsonschema
import numpy as np
import pytest
from structured_samples import allowed, compiler, sample, tokenizer

from qwen_jax.prompt.parsing import parse
from qwen_jax.structured.spec import StructuredOutputs, ToolCalls

NO_PARAMETERS = {"type": "object", "additionalProperties": False}
END = "\n</parameter>\n"
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "units": {"type": "string", "enum": ["metric", "imperial"]},
    },
    "required": ["city", "units"],
}
FILE = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "pattern": "^[a-z]{1,8}\\.py$"},
        "text": {"type": "string"},
        "mode": {"enum": ["w", "a", None, 7]},
        "lines": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        "force": {"type": "boolean"},
        "ratio": {"type": "number", "minimum": 0, "maximum": 1},
        "owner": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "where": {"$ref": "#/$defs/point"},
    },
    "required": ["path", "text", "mode", "lines", "force", "ratio", "owner", "where"],
    "$defs": {"point": json_schemas._POINT},
}


def tool(name, parameters=None):
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool("weather", WEATHER), tool("write-file", FILE), tool("now")]
BY_NAME = {"weather": WEATHER, "write-file": FILE, "now": NO_PARAMETERS}


def calls(kind, seed, tools=TOOLS, **options):
    wish = StructuredOutputs(tool_calls=ToolCalls(kind, tools, **options))
    text = sample(compiler().compile(wish), seed, close=END, patience=300)
    return text, parse(text, reasoning="off", tool_format=kind, tools=tools)


@pytest.mark.parametrize("kind", ["hermes", "coder"])
def test_forced_calls_parse_and_their_arguments_validate(kind):
    seen = set()
    for seed in range(25):
        text, message = calls(kind, seed)
        assert message.content is None, text
        assert message.tool_calls, text
        assert len(message.tool_calls) == text.count("<tool_call>")
        for call in message.tool_calls:
            seen.add(call.name)
            jsonschema.validate(json.loads(call.arguments), BY_NAME[call.name])
    assert seen == set(BY_NAME)


@pytest.mark.parametrize("kind", ["hermes", "coder"])
def test_one_call_where_one_is_wanted_and_several_where_many_may_be(kind):
    counts = {len(calls(kind, seed, many=False)[1].tool_calls) for seed in range(15)}
    assert counts == {1}
    counts = {len(calls(kind, seed, [tool("now")], many=True)[1].tool_calls) for seed in range(30)}
    assert len(counts) > 1


@pytest.mark.parametrize("kind", ["hermes", "coder"])
def test_calls_are_laid_out_as_the_templates_show_them(kind):
    text, _ = calls(
        kind,
        0,
        [
            tool(
                "f",
                {"properties": {"a": {"const": 1}, "b": {"enum": ["x"]}}, "required": ["a", "b"]},
            )
        ],
        many=False,
    )
    written = {
        "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x"}}\n</tool_call>',
        "coder": "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx"
        "\n</parameter>\n</function>\n</tool_call>",
    }
    assert text == written[kind]


def test_tags_are_the_real_tokens():
    grammar = compiler().compile(
        StructuredOutputs(tool_calls=ToolCalls("hermes", [tool("now")], many=False))
    )
    matcher = grammar.matcher()
    assert list(allowed(matcher)) == [tokenizer().id("<tool_call>")]
    ids = matcher.forced()
    assert ids[0] == tokenizer().id("<tool_call>")
    assert ids[-1] == tokenizer().id("</tool_call>")


def test_an_answer_may_come_instead_of_calls():
    seen = set()
    for seed in range(20):
        text, message = calls(
            "hermes", seed, [tool("now")], answer={"type": "integer", "maximum": 9, "minimum": 1}
        )
        seen.add(bool(message.tool_calls))
        if not message.tool_calls:
            assert 1 <= json.loads(text) <= 9
    assert seen == {True, False}


@pytest.mark.parametrize(
    "text", ["null", "NULL", "a</parameter>b", "<parameter=x", "</function>", "</tool_call>"]
)
def test_a_string_parameter_cannot_hold_what_would_be_read_as_something_else(text):
    tools = [tool("f", {"properties": {"s": {"type": "string"}}, "required": ["s"]})]
    grammar = compiler().compile(StructuredOutputs(tool_calls=ToolCalls("coder", tools)))

    def write(text):
        whole = f"\n<function=f>\n<parameter=s>\n{text}{END}</function>\n"
        ids = tokenizer().encode(whole, special=False)
        grammar.matcher().accept([tokenizer().id("<tool_call>"), *ids])

    write("nullx <a></function")
    with pytest.raises(ValueError, match="structured output"):
        write(text)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "integer"]}, "12", "12"),
        ({"type": "string"}, "\n\n x </a> \n", "\n\n x </a> \n"),
        ({"type": "string"}, "", ""),
        ({}, "anything", "anything"),
        ({"type": "int"}, "12", 12),
        ({"type": "boolean"}, "true", True),
        ({"type": "object"}, '{"a": [1, null]}', {"a": [1, None]}),
        ({"const": "</a>"}, "</a>", "</a>"),
        ({"$ref": "#/$defs/e"}, "true", True),
        ({"type": "string", "pattern": "b+"}, "abbc", "abbc"),
        ({"type": "string", "pattern": "^b+$"}, "bb", "bb"),
    ],
)
def test_a_value_is_allowed_and_read_back(schema, text, value):
    parameters = {
        "properties": {"v": schema},
        "required": ["v"],
        "$defs": {"e": {"enum": ["x", True]}},
    }
    tools = [tool("f", parameters)]
    matcher = (
        compiler()
        .compile(StructuredOutputs(tool_calls=ToolCalls("coder", tools, many=False)))
        .matcher()
    )
    whole = f"\n<function=f>\n<parameter=v>\n{text}{END}</function>\n"
    ids = [
        tokenizer().id("<tool_call>"),
        *tokenizer().encode(whole, special=False),
        tokenizer().id("</tool_call>"),
    ]
    matcher.accept(ids)
    assert matcher.finished
    (call,) = parse(
        tokenizer().decode(ids), reasoning="off", tool_format="coder", tools=tools
    ).tool_calls
    assert json.loads(call.arguments) == {"v": value}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string", "pattern": "^b+$"}, "abb"),
        ({"type": "string", "maxLength": 2}, "abc"),
        ({"type": "integer"}, "1.5"),
        ({"enum": ["x", "y"]}, "z"),
        ({"type": "array", "items": {"type": "integer"}}, '["a"]'),
    ],
)
def test_a_value_that_the_schema_forbids_is_not_allowed(schema, text):
    tools = [tool("f", {"properties": {"v": schema}, "required": ["v"]})]
    matcher = compiler().compile(StructuredOutputs(tool_calls=ToolCalls("coder", tools))).matcher()
    matcher.accept([tokenizer().id("<tool_call>")])
    with pytest.raises(ValueError, match="structured output"):
        matcher.accept(
            tokenizer().encode(f"\n<function=f>\n<parameter=v>\n{text}{END}", special=False)
        )


@pytest.mark.parametrize("kind", ["hermes", "coder"])
@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ([], "there are no tools"),
        ([tool("a b")], "'a b': a name is"),
        ([tool("ok"), tool("bad", {"properties": {"x": {"type": "strnig"}}})], "'bad'.*strnig"),
        (
            [tool("bad", {"properties": {"x": {"type": "array", "items": {"not": {}}}}})],
            "'bad'.*not",
        ),
    ],
)
def test_a_tool_that_cannot_be_called_is_named(kind, tools, said):
    with pytest.raises(ValueError, match=said):
        compiler().compile(StructuredOutputs(tool_calls=ToolCalls(kind, tools)))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"properties": {"a>b": {}}}, "cannot be a parameter's name"),
        ({"properties": {}, "required": ["x"]}, "'x' is not among properties"),
        ({"anyOf": [{"properties": {"a": {}}}]}, "need 'properties'"),
    ],
)
def test_parameters_that_the_coder_format_cannot_hold_are_refused(parameters, said):
    with pytest.raises(ValueError, match=said):
        compiler().compile(
            StructuredOutputs(tool_calls=ToolCalls("coder", [tool("f", parameters)]))
        )


# ---- reasoning before a form -----------------------------------------------------------------


def thinking(state, *, may_open=True):
    grammar = compiler().compile(StructuredOutputs(choice=["yes"]))
    return compiler().after_reasoning(grammar, state, may_open=may_open).matcher()


def ids(text):
    return tokenizer().encode(text)


def test_reasoning_that_the_prompt_opened_is_free_until_it_closes():
    matcher = thinking("inside")
    found = allowed(matcher)
    ends = {tokenizer().id("<|im_end|>"), tokenizer().id("<|endoftext|>")}
    assert set(found) == set(range(tokenizer().size)) - ends
    assert matcher.forced() == []
    matcher.accept(ids("well, yes{no}</think>"))
    assert matcher.forced() == ids("\n\n")
    assert list(allowed(matcher)) == ids("\n\n")[:1]
    matcher.accept(ids("\n\n"))
    assert tokenizer().decode(matcher.forced()) == "yes"
    assert not matcher.finished
    matcher.accept(ids("yes"))
    assert matcher.finished


def test_reasoning_and_answer_may_come_in_one_go():
    matcher = thinking("inside")
    matcher.accept(ids("hm</think>\n\nyes"))
    assert matcher.finished


def test_a_model_may_open_its_reasoning_or_answer_at_once():
    matcher = thinking("auto")
    assert set(allowed(matcher)) == {tokenizer().id("<think>"), tokenizer().id("y")}
    assert matcher.forced() == []
    matcher.accept(ids("<think>"))
    assert len(allowed(matcher)) > 200
    matcher = thinking("auto")
    matcher.accept(ids("y"))
    assert tokenizer().decode(matcher.forced()) == "es"


@pytest.mark.parametrize(("state", "may_open"), [("off", True), ("auto", False)])
def test_without_reasoning_the_form_holds_from_the_start(state, may_open):
    assert list(allowed(thinking(state, may_open=may_open))) == ids("y")


def test_a_mask_is_written_over_whatever_was_in_it():
    matcher = thinking("inside")
    for text in ("hm", "</think>", "\n\n"):
        out = np.full(20, 0xFFFFFFFF, np.uint32)
        matcher.mask(out)
        assert not out[(tokenizer().size + 31) // 32 :].any()
        matcher.accept(ids(text))
