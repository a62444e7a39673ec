import json
import re

import pytest
from fake_llm import MAX_LEN, FakeLLM
from serving import ask, events

URL = "/v1/completions"


@pytest.fixture(scope="module")
def llm():
    return FakeLLM(lambda prompt, i: f"<{prompt}|{i}>")


def complete(llm, **body):
    content = json.dumps({"prompt": "ab", **body})
    return ask(llm, "POST", URL, content=content, headers={"content-type": "application/json"})


def reply(llm, **body):
    response = complete(llm, **body)
    assert response.status_code == 200, response.text
    return response.json()


def texts(llm, **body):
    return [choice["text"] for choice in reply(llm, max_tokens=50, **body)["choices"]]


def streamed(llm, **body):
    found = events(complete(llm, stream=True, max_tokens=50, **body))
    assert found[-1] == "[DONE]"
    pieces = [json.loads(event) for event in found[:-1]]
    joined = {}
    for piece in pieces:
        for choice in piece["choices"]:
            joined[choice["index"]] = joined.get(choice["index"], "") + choice["text"]
    return pieces, [joined[i] for i in sorted(joined)]


def test_a_reply_has_openais_form(llm):
    found = reply(llm, model="tiny")
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", found["id"])
    assert found["object"] == "text_completion"
    assert found["choices"] == [
        {
            "index": 0,
            "text": "<ab|0>",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 7, "total_tokens": 9}


def test_a_prompt_is_text_or_ids_or_a_list_of_either(llm):
    a, b = llm.tokenizer.encode("ab")
    assert texts(llm, prompt="ab") == ["<ab|0>"]
    assert texts(llm, prompt=["ab", "c"]) == ["<ab|0>", "<c|0>"]
    assert texts(llm, prompt=[a, b]) == ["<None|0>"]
    assert llm.engine.jobs[-1].prompt.token_ids == (a, b)
    assert texts(llm, prompt=[[a, b], [b]]) == ["<None|0>"] * 2


def test_choices_are_numbered_by_prompt_and_then_by_n(llm):
    wanted = ["<x|0>", "<x|1>", "<y|0>", "<y|1>"]
    assert texts(llm, prompt=["x", "y"], n=2) == wanted
    assert [c["index"] for c in reply(llm, prompt=["x", "y"], n=2)["choices"]] == [0, 1, 2, 3]
    assert streamed(llm, prompt=["x", "y"], n=2)[1] == wanted


def test_sixteen_tokens_unless_told(llm):
    reply(llm)
    assert llm.engine.jobs[-1].params.max_tokens == 16
    reply(llm, max_tokens=None)
    assert llm.engine.jobs[-1].params.max_tokens is None


def test_a_default_that_does_not_fit_is_no_error_but_a_wish_is(llm):
    ids = llm.tokenizer.encode("ab") * ((MAX_LEN - 2) // 2)
    assert reply(llm, prompt=ids)
    response = complete(llm, prompt=ids, max_tokens=16)
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_echo_puts_the_prompt_before_the_text(llm):
    assert texts(llm, echo=True) == ["ab<ab|0>"]
    assert texts(llm, echo=True, prompt=llm.tokenizer.encode("ab")) == ["ab<None|0>"]
    assert streamed(llm, echo=True, n=2)[1] == ["ab<ab|0>", "ab<ab|1>"]


def test_logprobs_are_lists_side_by_side(llm):
    (choice,) = reply(llm, logprobs=2)["choices"]
    found = choice["logprobs"]
    assert {len(entries) for entries in found.values()} == {7}
    assert "".join(found["tokens"][:-1]) == "<ab|0>"
    assert found["text_offset"] == [0, 1, 2, 3, 4, 5, 6]
    assert all(len(best) in (2, 3) for best in found["top_logprobs"])
    assert found["token_logprobs"] == [-0.25] * 7


def test_echo_with_logprobs_scores_the_prompt(llm):
    (choice,) = reply(llm, logprobs=1, echo=True)["choices"]
    found = choice["logprobs"]
    assert found["tokens"][:2] == ["a", "b"]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["token_logprobs"][1] == -0.25
    assert len(found["tokens"]) == 2 + 7


def test_a_prompt_can_be_scored_alone(llm):
    found = reply(llm, logprobs=1, echo=True, max_tokens=0)
    (choice,) = found["choices"]
    assert choice["text"] == "ab"
    assert choice["logprobs"]["tokens"] == ["a", "b"]
    assert choice["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 0


def test_streamed_logprobs_go_on_where_they_were(llm):
    pieces, _ = streamed(llm, logprobs=1)
    offsets = [o for p in pieces for c in p["choices"] for o in c["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 2, 3, 4, 5, 6]


def test_code_with_a_gap(llm):
    (choice,) = reply(llm, prompt="def f(", suffix="    return", max_tokens=60)["choices"]
    assert choice["finish_reason"] in ("stop", "length")
    prompt = llm.engine.jobs[-1].prompt
    assert "<|fim_prefix|>def f(<|fim_suffix|>    return<|fim_middle|>" in prompt.text
    assert prompt.stop_ids


def test_usage_is_streamed_on_request(llm):
    pieces, _ = streamed(llm, stream_options={"include_usage": True})
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"]["completion_tokens"] == 7
    assert "usage" not in streamed(llm)[0][-1]


def test_a_form_holds_for_each_text(llm):
    found = reply(llm, prompt=["a", "b"], n=2, structured_outputs={"regex": "[xy]{3}"})
    assert all(re.fullmatch("[xy]{3}", choice["text"]) for choice in found["choices"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "a prompt is a text"),
        ({"prompt": [[]]}, "at least one"),
        ({"prompt": ["a", 1]}, "all texts"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "not an integer in 0"),
        ({"prompt": [99999]}, "not an integer in 0"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 3000}, "more than 2,048"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x", "echo": True}, "suffix"),
        ({"suffix": "x", "prompt": ["a"]}, "suffix"),
        ({"logprobs": 21}, "less than or equal to 20"),
        ({"logprobs": -1}, "greater than or equal to 0"),
        ({"max_tokens": 0}, "needs echo"),
        ({"echo": True, "logprobs": 1, "stream": True}, "cannot be streamed"),
        ({"messages": []}, "unknown field 'messages'"),
        ({"structured_outputs": {"grammar": "nonsense"}}, "grammar"),
        ({"max_tokens": MAX_LEN}, "lower max_tokens"),
    ],
)
def test_a_bad_body_is_told_what_is_wrong(llm, body, said):
    response = complete(llm, **body)
    assert response.status_code == 400, response.text
    assert re.search(said, response.json()["error"]["message"]), response.text
