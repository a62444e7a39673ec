"""Chat completions: replies, streams, fields, and bodies that are wrong."""

import json
import re

import pytest
from chatting import chat, refused, reply, schema_form, streamed, tool
from fake_llm import MAX_LEN, FakeLLM
from serving import events

from qwen_jax.openai.errors import encode
from qwen_jax.prompt.chat import ChatTemplate


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
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "E": 1}]}]},
            "messages[0].content[0].E",
            "unknown field 'E'",
        ),
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


def test_half_a_surrogate_pair_can_be_sent():
    assert encode({"a": "\ud800é"}) == b'{"a":"\\ud800\xc3\xa9"}'
    assert json.loads(encode({"a": "\ud800"})) == {"a": "\ud800"}
    assert "messages" not in refused(FakeLLM(), **{"\ud800": 1})


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
