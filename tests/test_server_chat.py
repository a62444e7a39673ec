import json
import re

import pytest
from fake_llm import MAX_LEN, FakeLLM
from serving import ask, events

from qwen_jax.prompt.chat import ChatTemplate

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'
CODER = (
    "{{ '<function=' if false }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n{{ '<think>\n' if think }}"
)


def schema_form(schema):
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


def tool(name="f", kind="string"):
    properties = {"a": {"type": kind, "enum": ["x", "y"]} if kind == "string" else {"type": kind}}
    parameters = {"type": "object", "properties": properties, "required": ["a"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def chat(llm, **body):
    content = json.dumps({"messages": HI, **body})
    return ask(llm, "POST", CHAT, content=content, headers={"content-type": "application/json"})


def reply(llm, **body):
    response = chat(llm, **body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(llm, **body):
    response = chat(llm, **body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def streamed(llm, **body):
    """(pieces, the message that they join to)."""
    found = events(chat(llm, stream=True, **body))
    assert found[-1] == "[DONE]"
    pieces = [json.loads(event) for event in found[:-1]]
    assert not [piece for piece in pieces if "error" in piece]
    message = {"content": "", "reasoning_content": "", "tool_calls": []}
    for piece in pieces:
        for choice in piece["choices"]:
            if choice["index"]:
                continue
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    assert call["type"] == "function"
                    message["tool_calls"].append(dict(call["function"]))
                else:
                    assert "name" not in call["function"]
                    message["tool_calls"][-1]["arguments"] += call["function"]["arguments"]
            if choice["finish_reason"]:
                assert "finish" not in message, "one reason for the end"
                message["finish"] = choice["finish_reason"]
    return pieces, message


def test_a_reply_has_openais_form():
    found = reply(FakeLLM(), model="tiny")
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", found["id"])
    assert found["object"] == "chat.completion"
    assert found["model"] == "tiny"
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello world", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage = found["usage"]
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6


def test_a_stream_joins_to_the_whole():
    llm = FakeLLM(lambda prompt, i: "a <b> c\n\nd")
    pieces, message = streamed(llm)
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert message["content"] == reply(llm)["choices"][0]["message"]["content"] == "a <b> c\n\nd"
    assert message["finish"] == "stop"
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    assert len({piece["id"] for piece in pieces}) == 1


def test_usage_comes_in_a_last_piece_and_only_when_asked_for():
    llm = FakeLLM()
    assert not [piece for piece in streamed(llm)[0] if "usage" in piece]
    pieces, _ = streamed(llm, stream_options={"include_usage": True})
    assert [piece["usage"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"] == reply(llm)["usage"]
    pieces, _ = streamed(llm, stream_options={"continuous_usage_stats": True})
    counts = [piece["usage"]["completion_tokens"] for piece in pieces]
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_several_answers_are_told_apart():
    llm = FakeLLM(lambda prompt, i: f"answer {i}")
    found = reply(llm, n=3)
    texts = [choice["message"]["content"] for choice in found["choices"]]
    assert texts == ["answer 0", "answer 1", "answer 2"]
    pieces, _ = streamed(llm, n=3)
    joined = {0: "", 1: "", 2: ""}
    for piece in pieces:
        for choice in piece["choices"]:
            joined[choice["index"]] += choice["delta"].get("content", "")
    assert list(joined.values()) == texts


def test_max_tokens_under_both_names():
    for name in ("max_tokens", "max_completion_tokens"):
        (choice,) = reply(FakeLLM(), **{name: 2})["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("hello ", "length")
    assert "differ" in refused(FakeLLM(), max_tokens=1, max_completion_tokens=2)["message"]


def test_logprobs_stand_beside_their_tokens():
    llm = FakeLLM(lambda prompt, i: "grün")
    (choice,) = reply(llm, logprobs=True, top_logprobs=2)["choices"]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content[:-1]) == "grün".encode()
    assert {len(entry["top_logprobs"]) for entry in content} == {2}
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"] == "g"
    pieces, _ = streamed(llm, logprobs=True, top_logprobs=2)
    joined = [
        entry
        for piece in pieces
        for choice in piece["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert joined == content
    assert "needs logprobs" in refused(llm, top_logprobs=2)["message"]


def test_prompt_logprobs_in_vllms_form():
    found = reply(FakeLLM(), prompt_logprobs=1)["prompt_logprobs"]
    assert found[0] is None
    assert {"logprob", "rank", "decoded_token"} == next(iter(found[1].values())).keys()
    assert "cannot be streamed" in refused(FakeLLM(), prompt_logprobs=1, stream=True)["message"]


def test_token_ids_on_request():
    llm = FakeLLM()
    found = reply(llm, return_token_ids=True)
    (choice,) = found["choices"]
    assert llm.tokenizer.decode(choice["token_ids"]) == "hello world"
    assert llm.tokenizer.decode(found["prompt_token_ids"]).startswith("user\nhi")
    pieces, _ = streamed(llm, return_token_ids=True)
    joined = [i for p in pieces for c in p["choices"] for i in c.get("token_ids", [])]
    assert joined == choice["token_ids"]


# ---- tools -----------------------------------------------------------------------------------


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


def test_raw_is_the_text_itself():
    llm = FakeLLM()
    messages = [{"role": "user", "content": "<|im_start|>x"}, {"role": "assistant", "content": "y"}]
    message = reply(llm, raw=True, messages=messages)["choices"][0]["message"]
    assert message["content"] == "hello world"
    assert llm.engine.jobs[-1].prompt.text == "<|im_start|>xy"
    assert llm.engine.jobs[-1].prompt.token_ids[0] == llm.tokenizer.id("<|im_start|>")
    assert "raw" in refused(llm, raw=True, tools=[tool()])["message"]


def test_fields_reach_the_sampling_parameters():
    llm = FakeLLM()
    body = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "stop": ["x"],
        "presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.5,
        "min_tokens": 1, "stop_token_ids": [5], "ignore_eos": True, "n": 2,
        "skip_special_tokens": False, "include_stop_str_in_output": True,
    }  # fmt: skip
    chat(llm, **body, logit_bias={"7": -100}, user="me", metadata={"a": "b"})
    params = llm.engine.jobs[-1].params
    assert {name: getattr(params, name) for name in body} == {**body, "stop_token_ids": (5,)}
    assert params.logit_bias == {7: -100.0}
    chat(llm)
    params = llm.engine.jobs[-1].params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.6, 20, None)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"mesages": []}, "mesages", "did you mean 'messages'"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", "list"),
        ({"messages": [{"role": "x", "content": ""}]}, "messages[0].role", "'system'"),
        ({"messages": [{"role": "user"}]}, None, "no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "got 5"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, None, "text is missing"),
        ({"messages": [{"role": "user", "content": "x", "nmae": "y"}]}, "messages[0].nmae", "name"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "surrogate"),
        ({"temperature": -1}, "temperature", "not in 0.0"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "keeps no token"),
        ({"top_k": 1.5}, "top_k", "integer"),
        ({"n": 0}, "n", "not in 1"),
        ({"n": 1000}, "n", "exceeds 128"),
        ({"n": True}, "n", "integer"),
        ({"seed": 2**70}, "seed", "not in"),
        ({"max_tokens": 0}, "max_tokens", "not in 1"),
        ({"max_tokens": MAX_LEN}, "max_tokens", "lower max_tokens to"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "exceeds"),
        ({"stop": [""]}, None, "stop string"),
        ({"stop": ["x"] * 5000}, "stop", "at most 64"),
        ({"stop": "x" * 10_000}, None, "stop string"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "-100 .. 100"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "not in 0 .. 319"),
        ({"stream_options": {"include_usage": True}}, None, "needs stream"),
        ({"functions": [{}]}, None, "use tools"),
        ({"modalities": ["audio"]}, None, "modalities"),
        ({"tool_choice": "required"}, None, "needs tools"),
        ({"tools": [tool()], "tool_choice": "always"}, "tool_choice", "tool_choice"),
        (
            {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "q"}}},
            None,
            "no function 'q'",
        ),
        ({"tools": [tool(), tool()]}, None, "two functions"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "'function'"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "messages"),
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            None,
            "exclude each other",
        ),
        ({"structured_outputs": {"regex": "(["}}, None, "regex"),
        ({"structured_outputs": {"json": {"type": "strin"}}}, None, "strin"),
        ({"structured_outputs": {"rgx": "a"}}, None, "did you mean 'regex'"),
        ({"structured_outputs": {"regex": "a"}, "tools": [tool()]}, None, "tool_choice"),
        (
            {"response_format": schema_form({"not": {}})},
            None,
            "JSON schema",
        ),
        (
            {"tools": [tool(kind="strin")], "tool_choice": "required"},
            None,
            "'f'.*strin",
        ),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, None, "max_model_len"),
    ],
)  # fmt: skip
def test_a_bad_body_is_told_what_is_wrong(body, param, said):
    error = refused(FakeLLM(), **body)
    assert re.search(said, error["message"]), error
    assert error["type"] == "invalid_request_error"
    assert error.keys() == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param


def test_an_unknown_model_is_not_found_and_an_alias_is_found():
    response = chat(FakeLLM(), model="gpt-4")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert reply(FakeLLM(), model="alias")["model"] == "alias"


def test_a_template_without_tools_or_a_missing_one_is_said():
    plain = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "no tools" in refused(FakeLLM(template=plain), tools=[tool()])["message"]


def test_what_the_engine_refuses_later_ends_a_reply_and_a_stream():
    llm = FakeLLM(fails=ValueError("no page fits"))
    assert refused(llm)["message"] == "no page fits"
    found = events(chat(llm, stream=True))
    assert json.loads(found[-2])["error"]["message"] == "no page fits"
    assert found[-1] == "[DONE]"


def test_a_fault_of_ours_says_nothing_of_itself(caplog):
    llm = FakeLLM(fails=KeyError("secret"))
    response = chat(llm)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "internal error"
    found = events(chat(llm, stream=True))
    assert json.loads(found[-2])["error"] == response.json()["error"]
    assert "secret" not in response.text + "".join(found)
