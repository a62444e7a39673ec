import itertools
import json
import re

import json_schemas
import jsonschema
import numpy as np
import pytest
from structured_samples import VOCAB, allowed, compiler, sample, tokenizer

from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.requests import SamplingParams
from qwen_jax.structured.compile import GrammarCompiler
from qwen_jax.structured.spec import StructuredOutputs, ToolCalls, read_schema

SCHEMAS = [*json_schemas.HARD, *json_schemas.generated(200 - len(json_schemas.HARD))]
MANY = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}


def validates(text, schema):
    kind = jsonschema.Draft202012Validator
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


@pytest.mark.parametrize("first", range(0, len(SCHEMAS), 20))
def test_every_text_sampled_under_a_schema_validates(first):
    for i, schema in enumerate(SCHEMAS[first : first + 20], first):
        grammar = compiler().compile(StructuredOutputs(json=schema))
        for patience in (60, 0):  # the latter ends a text wherever it may end
            text = sample(grammar, seed=i, patience=patience)
            try:
                validates(text, schema)
            except (ValueError, jsonschema.ValidationError) as error:
                pytest.fail(f"schema {i} {json.dumps(schema)}: {text!r}: {error}")


def test_there_are_200_schemas_and_they_differ():
    assert len({json.dumps(schema) for schema in SCHEMAS}) == 200


NUMBERS = (-2, -1.5, -1, -0.5, 0, 0.001, 0.5, 1, 1.5, 2)


@pytest.mark.parametrize("low", ["minimum", "exclusiveMinimum"])
@pytest.mark.parametrize("high", ["maximum", "exclusiveMaximum"])
def test_a_number_is_allowed_if_and_only_if_it_is_within_its_bounds(low, high):
    for least, most in itertools.combinations(NUMBERS, 2):
        schema = {"type": "number", low: least, high: most}
        grammar = compiler().compile(StructuredOutputs(json=schema))
        for number in NUMBERS:
            is_valid = jsonschema.Draft202012Validator(schema).is_valid(number)
            assert can_be(grammar, repr(number)) == is_valid, (schema, number)


def can_be(grammar, text):
    """Whether a text may be all that there is."""
    matcher, end = grammar.matcher(), tokenizer().id("<|im_end|>")
    for token in tokenizer().encode(text):
        if token not in allowed(matcher):
            return False
        matcher.accept([token])
    return matcher.finished or end in allowed(matcher)


def test_bounds_are_moved_in_schemas_and_not_in_values():
    close = {"exclusiveMinimum": 0, "maximum": 0.5}
    moved = {"minimum": 1e-30, "maximum": 0.5}
    schema = {"properties": {"const": close}, "anyOf": [close, {"const": close}], "items": close}
    assert read_schema(schema, "x") == {
        "properties": {"const": moved},
        "anyOf": [moved, {"const": close}],
        "items": moved,
    }
    kept = {"exclusiveMinimum": 0, "maximum": 1, "exclusiveMaximum": 10**400}
    assert read_schema(kept, "x") == kept
    both = {"exclusiveMaximum": -1, "maximum": -1.25, "minimum": -1.5}
    assert read_schema(both, "x") == {"maximum": -1.25, "minimum": -1.5}


def test_a_schema_may_be_text():
    grammar = compiler().compile(
        StructuredOutputs(json='{"type": "integer", "minimum": 7, "maximum": 7}')
    )
    assert sample(grammar, 0) == "7"


def test_any_object_is_one():
    grammar = compiler().compile(StructuredOutputs(json_object=True))
    for seed in range(5):
        assert isinstance(json.loads(sample(grammar, seed)), dict)


def test_a_regex_matches_the_whole_text():
    grammar = compiler().compile(StructuredOutputs(regex=r"(\d{3}-[a-f]{2})+"))
    for seed in range(5):
        assert re.fullmatch(r"(\d{3}-[a-f]{2})+", sample(grammar, seed))


@pytest.mark.parametrize(
    "texts", [["yes", "no"], ["one", "one two"], ['"', "\\n", "a\nb", "grün \x01"]]
)
def test_a_choice_is_one_of_its_texts_and_any_can_come(texts):
    grammar = compiler().compile(StructuredOutputs(choice=texts))
    assert {sample(grammar, seed) for seed in range(40)} == set(texts)


def test_a_grammar_in_lark():
    grammar = compiler().compile(
        StructuredOutputs(grammar='start: "a" (B | "(" start ")")\nB: /b{2,3}/')
    )
    for seed in range(10):
        assert re.fullmatch(r"(a\()*ab{2,3}\)*", sample(grammar, seed))


def test_white_space_in_json_has_a_bound():
    grammar = compiler().compile(
        StructuredOutputs(
            json={"type": "array", "items": {"const": 1}, "minItems": 3, "maxItems": 3}
        )
    )
    matcher, blank = grammar.matcher(), tokenizer().id(" ")
    matcher.accept(matcher.forced())
    count = 0
    while blank in allowed(matcher):
        matcher.accept([blank])
        count += 1
        assert count < 100


def test_white_space_can_be_forbidden_and_chosen():
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}
    tight = compiler().compile(StructuredOutputs(json=schema, disable_any_whitespace=True))
    tabs = compiler().compile(StructuredOutputs(json=schema, whitespace_pattern="\t"))
    for seed in range(10):
        assert re.fullmatch(r"\[[12],[12]\]", sample(tight, seed))
        assert re.fullmatch(r"\[\t*[12]\t*,\t*[12]\t*\]", sample(tabs, seed))


def test_text_never_becomes_an_added_token_and_padding_is_never_allowed():
    matcher = compiler().compile(StructuredOutputs(regex="(?s:.*)x")).matcher()
    found = allowed(matcher)
    assert len(found) > 200
    assert not set(found) & set(tokenizer().added.values())
    assert found.max() < tokenizer().size < VOCAB


def test_a_mask_covers_a_vocabulary_wider_than_the_tokenizer():
    matcher = compiler().compile(StructuredOutputs(choice=["a"])).matcher()
    assert list(allowed(matcher, vocab=VOCAB + 300)) == list(allowed(matcher))


def test_the_end_of_text_is_allowed_where_the_grammar_may_end():
    matcher = compiler().compile(StructuredOutputs(regex="ab*")).matcher()
    end = tokenizer().id("<|im_end|>")
    assert end not in allowed(matcher)
    matcher.accept([tokenizer().id("a")])
    assert end in allowed(matcher)
    assert not matcher.finished
    matcher.accept([end])
    assert matcher.finished


def test_two_texts_of_one_grammar_do_not_share_their_state():
    grammar = compiler().compile(StructuredOutputs(choice=["abc", "xyz"]))
    one, two = grammar.matcher(), grammar.matcher()
    one.accept([tokenizer().id("a")])
    assert set(allowed(two)) == {tokenizer().id("a"), tokenizer().id("x")}
    assert tokenizer().decode(one.forced()) == "bc"


def test_a_token_that_is_not_allowed_is_an_error():
    matcher = compiler().compile(StructuredOutputs(choice=["abc"])).matcher()
    with pytest.raises(ValueError, match="structured output"):
        matcher.accept([tokenizer().id("x")])


def test_a_mask_of_the_wrong_kind_is_refused():
    matcher = compiler().compile(StructuredOutputs(choice=["abc"])).matcher()
    for wrong in (np.zeros(10, np.int32), np.zeros(2, np.uint32), np.zeros(20, np.uint32)[::2]):
        with pytest.raises(ValueError, match="words of uint32"):
            matcher.mask(wrong)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"json": {"type": "strin"}}, "strin"),
        ({"json": {"not": {"type": "string"}}}, "not"),
        ({"json": {"$ref": "#/$defs/nowhere"}}, "nowhere"),
        ({"json": {"type": "string", "pattern": "(["}}, "regex|pattern"),
        ({"json": {"type": "object", "required": "a"}}, "required|array|sequence"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 4}}, "minimum|maximum|unsat"),
        ({"json": "{nope"}, "not JSON"),
        ({"json": "[1]"}, "must be a JSON object"),
        ({"json": False}, "JSON schema"),
        ({"regex": "(["}, "regex"),
        ({"regex": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"}, "regex is too complex"),
        ({"json": MANY}, "JSON schema is too complex"),
        ({"grammar": "start: nowhere"}, "nowhere"),
        ({"grammar": "no grammar at all"}, "grammar"),
    ],
)
def test_what_cannot_be_compiled_is_named(wish, said):
    with pytest.raises(ValueError, match=f"(?i){said}"):
        compiler().compile(StructuredOutputs(**wish))


def test_a_schema_nested_without_end_is_refused():
    schema: dict = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="nested too deep"):
        compiler().compile(StructuredOutputs(json=schema))


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({}, "asks for nothing"),
        ({"json_object": False}, "asks for nothing"),
        ({"json": {}, "regex": "a"}, "json and regex exclude"),
        ({"regex": ""}, "must be a text"),
        ({"choice": []}, "list of texts"),
        ({"choice": "yes"}, "list of texts"),
        ({"choice": ["a", ""]}, "none empty"),
        ({"jsn": {}}, "did you mean 'json'"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "exclude"),
    ],
)
def test_a_wish_that_is_none_is_refused(wish, said):
    with pytest.raises(ValueError, match=said):
        SamplingParams(structured_outputs=wish)


def test_sampling_parameters_take_wishes_and_grammars():
    grammar = compiler().compile(StructuredOutputs(choice=["a"]))
    assert SamplingParams(structured_outputs=grammar).structured_outputs is grammar
    assert SamplingParams(
        structured_outputs={"regex": "a"}
    ).structured_outputs == StructuredOutputs(regex="a")
    with pytest.raises(ValueError, match="exclude each other"):
        SamplingParams(structured_outputs={"regex": "a"}, allowed_token_ids=[1])
    with pytest.raises(ValueError, match="not a mapping"):
        SamplingParams(structured_outputs="json")


def test_a_tokenizer_that_drops_a_space_is_refused(monkeypatch):
    monkeypatch.setattr(type(tokenizer()), "drops_first_space", True)
    with pytest.raises(ValueError, match="sentencepiece"):
        GrammarCompiler(tokenizer(), (1,))


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ModuleNotFoundError, match=r"qwen-jax\[structured\]"):
        GrammarCompiler(tokenizer(), (1,))


def test_the_real_vocabulary(shared_data):
    """151,669 tokens and 267 rows of padding: masks, forced tokens and both formats of calls."""
    real = Tokenizer.from_dir(shared_data / "tokenizer", padded_size=151936)
    compiler = GrammarCompiler(real, (151645, 151643))
    words = np.full((151936 + 31) // 32, 0xFFFFFFFF, np.uint32)
    matcher = compiler.compile(StructuredOutputs(json_object=True)).matcher()
    matcher.mask(words)
    found = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
    assert all(real.token(int(token)).startswith("{") for token in found)
    assert len(found) > 3
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    for kind, text in (
        ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'),
        ("coder", "<tool_call>\n<function=get_weather>\n</function>\n</tool_call>"),
    ):
        calls = ToolCalls(kind, tools, many=False)
        matcher = compiler.compile(StructuredOutputs(tool_calls=calls)).matcher()
        forced = matcher.forced()
        assert forced == real.encode(text), "the tokens that a model was trained on"
        matcher.accept(forced)
        assert matcher.finished
