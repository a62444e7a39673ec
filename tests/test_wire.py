"""What process 0 tells of requests arrives as it was: parameters, forms, pictures."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
import vision_model

from qwen_jax.engine.wire import Add, Cancel, Over, decode, encode
from qwen_jax.requests import Prompt, SamplingParams
from qwen_jax.structured.spec import Grammar, StructuredOutputs, ToolCalls

GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}


def told_again(params=GREEDY, prompt=None):
    """A request as the others have it."""
    return decode(encode(Add(7, prompt or Prompt((1, 2)), params, "mine")))


def test_every_parameter_is_told():
    given = SamplingParams(
        n=2, temperature=0.7, top_p=0.9, top_k=4, min_p=0.01, seed=2**60 + 1, max_tokens=5,
        min_tokens=1, stop=["a\n", "\ud800"], stop_token_ids=[3], ignore_eos=True,
        presence_penalty=0.1, frequency_penalty=-0.1, repetition_penalty=1.1, logprobs=3,
        prompt_logprobs=-1, logit_bias={5: np.float32(0.1), 6: -2.0}, allowed_token_ids=[1, 2],
        skip_special_tokens=False, include_stop_str_in_output=True,
    )  # fmt: skip
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    default = SamplingParams()
    same = {name for name in fields if getattr(given, name) == getattr(default, name)}
    assert same == {"structured_outputs"}
    assert told_again(given) == Add(7, Prompt((1, 2)), given, "mine")
    prompt = Prompt((1, 2, 3), "text\n\ud800", (9,))
    assert told_again(prompt=prompt).prompt == prompt


@pytest.mark.parametrize(
    "wish",
    [
        StructuredOutputs(json=SCHEMA, whitespace_pattern="[ ]"),
        StructuredOutputs(choice=["a", "b"]),
        StructuredOutputs(tool_calls=ToolCalls("hermes", [{"function": {"name": "f"}}], False)),
    ],
)
def test_a_form_is_told_as_a_wish(wish):
    given = SamplingParams(structured_outputs=Grammar(mock.Mock(), wish))
    assert told_again(given).params.structured_outputs == wish


def test_a_form_without_a_wish_cannot_be_told():
    given = SamplingParams(structured_outputs=Grammar(mock.Mock()))
    with pytest.raises(ValueError, match="mine: a grammar that was compiled by hand cannot be"):
        told_again(given)


def test_pictures_are_told_as_they_are():
    llm = vision_model.shared_llm()
    images = [np.full((64, 96, 3), value, np.uint8) for value in (10, 200)]
    images[1] = images[1][:32]
    prompt = llm.inputs.prompt(
        {"prompt": "<|image_pad|> or <|image_pad|>?", "multi_modal_data": {"image": images}}
    )
    found, given = told_again(prompt=prompt).prompt.vision, prompt.vision
    assert (found.token_ids, found.spans, found.delta) == (
        given.token_ids,
        given.spans,
        given.delta,
    )
    np.testing.assert_array_equal(found.positions, given.positions)
    assert len(found.pictures) == 2
    for mine, theirs in zip(found.pictures, given.pictures, strict=True):
        np.testing.assert_array_equal(mine.patches, theirs.patches)
        assert mine.patches.dtype == np.uint8
        pixels = {"patches": None}
        assert dataclasses.replace(mine, **pixels) == dataclasses.replace(theirs, **pixels)


def test_ends_are_told():
    for told in (Cancel(3), Over(9, ""), Over(9, "ValueError('é')")):
        assert decode(encode(told)) == told
