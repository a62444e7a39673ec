"""Tools, forms and reasoning of chat completions."""

import json

import pytest
from chatting import CALL, CODER, chat, reply, schema_form, streamed, tool
from fake_llm import FakeLLM

from qwen_jax.prompt.chat import ChatTemplate


def test_a_call_that_the_model_makes_is_taken_out_of_the_text():
    llm = FakeLLM(lambda prompt, i: f"let me see\n{CALL}\n{CALL}")
    (choice,) = reply(llm, tools=[tool()])["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "let me see\n"
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "f", "arguments": '{"a": "x"}'}
    ] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    _, joined = streamed(llm, tools=[tool()])
    assert joined["tool_calls"] == [call["function"] for call in message["tool_calls"]]
    assert joined["finish"] == "tool_calls"


def test_calls_in_the_coder_format_stream_in_fragments_that_join():
    parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in (("a", "x"), ("b", 1)))
    text = f"<tool_call>\n<function=f>\n{parameters}</function>\n</tool_call>"
    llm = FakeLLM(lambda prompt, i: text, template=ChatTemplate(CODER))
    pieces, joined = streamed(llm, tools=[tool()])
    assert joined["tool_calls"] == [{"name": "f", "arguments": '{"a": "x", "b": "1"}'}]
    with_calls = [p for p in pieces for c in p["choices"] if "tool_calls" in c["delta"]]
    assert len(with_calls) >= 4


def test_without_tools_or_with_none_a_call_is_text():
    llm = FakeLLM(lambda prompt, i: CALL)
    for body in ({}, {"tools": [tool()], "tool_choice": "none"}):
        (choice,) = reply(llm, **body)["choices"]
        assert choice["message"]["content"] == CALL
        assert choice["finish_reason"] == "stop"
    chat(llm, tools=[tool()], tool_choice="none")
    assert "# Tools" not in llm.engine.jobs[-1].prompt.text


@pytest.mark.parametrize("template", [None, CODER])
def test_a_required_call_comes_whatever_the_model_wants(template):
    llm = FakeLLM(template=template and ChatTemplate(template))
    for seed in range(4):
        body = {"tools": [tool("f"), tool("g")], "tool_choice": "required", "seed": seed}
        (choice,) = reply(llm, **body)["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        for call in choice["message"]["tool_calls"]:
            assert call["function"]["name"] in ("f", "g")
            assert json.loads(call["function"]["arguments"])["a"] in ("x", "y")
        _, joined = streamed(llm, **body)
        assert joined["tool_calls"] == [c["function"] for c in choice["message"]["tool_calls"]]


def test_a_named_call_is_that_one_and_ends_with_stop_as_openais():
    named = {"type": "function", "function": {"name": "g"}}
    for seed in range(3):
        (choice,) = reply(FakeLLM(), tools=[tool("f"), tool("g")], tool_choice=named, seed=seed)[
            "choices"
        ]
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "g"
        assert choice["finish_reason"] == "stop"


def test_one_call_at_a_time_where_the_client_wants_that():
    llm = FakeLLM(lambda prompt, i: f"{CALL}\n{CALL}")
    (choice,) = reply(llm, tools=[tool()], parallel_tool_calls=False)["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    body = {"tools": [tool()], "tool_choice": "required", "parallel_tool_calls": False}
    for seed in range(5):
        (choice,) = reply(llm, **body, seed=seed)["choices"]
        assert len(choice["message"]["tool_calls"]) == 1


def test_allowed_tools_are_the_only_ones():
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "g"}}]}
    body = {
        "tools": [tool("f"), tool("g")],
        "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed},
    }
    for seed in range(4):
        (choice,) = reply(FakeLLM(), **body, seed=seed)["choices"]
        assert {c["function"]["name"] for c in choice["message"]["tool_calls"]} == {"g"}


def test_a_conversation_with_calls_and_results_goes_in():
    llm = FakeLLM()
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "call"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    reply(llm, messages=messages, tools=[tool()])
    text = llm.engine.jobs[-1].prompt.text
    assert "<|im_start|>system\nbe brief" in text
    assert '{"name": "f", "arguments": {"a": 1}}' in text


# ---- forms and reasoning ---------------------------------------------------------------------


def test_an_answer_in_json():
    (choice,) = reply(FakeLLM(), response_format={"type": "json_object"})["choices"]
    assert isinstance(json.loads(choice["message"]["content"]), dict)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    (choice,) = reply(FakeLLM(), response_format=form)["choices"]
    assert json.loads(choice["message"]["content"]).keys() == {"n"}
    (choice,) = reply(FakeLLM(), structured_outputs={"choice": ["yes"]})["choices"]
    assert choice["message"]["content"] == "yes"
    assert reply(FakeLLM(), response_format={"type": "text"})["choices"]


def test_tools_beside_a_form_allow_both():
    seen = set()
    for seed in range(12):
        form = schema_form({"const": 1})
        (choice,) = reply(FakeLLM(), tools=[tool()], response_format=form, seed=seed)["choices"]
        seen.add(choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            assert choice["message"]["content"] == "1"
    assert seen == {"stop", "tool_calls"}


def test_reasoning_is_apart_and_can_be_left_out():
    llm = FakeLLM(lambda prompt, i: "hm\n</think>\n\nyes", template=ChatTemplate(CODER))
    body = {"chat_template_kwargs": {"think": True}}
    message = reply(llm, **body)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "yes")
    _, joined = streamed(llm, **body)
    assert (joined["reasoning_content"], joined["content"]) == ("hm", "yes")
    message = reply(llm, **body, include_reasoning=False)["choices"][0]["message"]
    assert "reasoning_content" not in message
    assert message["content"] == "yes"


def test_a_form_begins_after_the_reasoning():
    llm = FakeLLM(template=ChatTemplate(CODER))
    body = {"chat_template_kwargs": {"think": True}, "structured_outputs": {"choice": ["yes"]}}
    message = reply(llm, **body, max_tokens=2000)["choices"][0]["message"]
    assert message["content"] == "yes"
    assert message["reasoning_content"]
