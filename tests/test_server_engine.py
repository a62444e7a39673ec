"""The server on the real engine, with tiny checkpoints: what it says is what `LLM` says."""

import asyncio
import base64
import io
import json
import re

import httpx
import jsonschema
import numpy as np
import openai
import pytest
import tiny_llm
import vision_model
from serving import running

from qwen_jax.requests import SamplingParams

HI = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def llm():
    return tiny_llm.open_llm(max_model_len=512)


@pytest.fixture(scope="module")
def server(llm):
    with running(llm, request_timeout=600.0) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="x",
        max_retries=0,
        timeout=600,
        _strict_response_validation=True,
    ) as client:
        yield client


def chat(client, messages=HI, **options):
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def test_a_chat_says_what_llm_says(llm, client):
    (wanted,) = llm.chat(HI, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    found = chat(client, **GREEDY)
    assert found.choices[0].message.content == wanted.outputs[0].text
    assert found.usage.prompt_tokens == len(wanted.prompt_token_ids)
    chunks = chat(client, **GREEDY, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted.outputs[0].text


def test_a_completion_scores_as_llm_does(llm, client):
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=2, prompt_logprobs=2)
    (wanted,) = llm.generate("def f(", params, use_tqdm=False)
    body = {"prompt": "def f(", "temperature": 0, "max_tokens": 8, "logprobs": 2, "echo": True}
    found = httpx.post(f"{client.base_url}completions", json=body, timeout=600).json()["choices"][0]
    assert found["text"] == "def f(" + wanted.outputs[0].text
    own = [
        entry[t].logprob
        for t, entry in zip(wanted.outputs[0].token_ids, wanted.outputs[0].logprobs, strict=True)
    ]
    before = [
        e[t].logprob
        for t, e in list(zip(wanted.prompt_token_ids, wanted.prompt_logprobs, strict=True))[1:]
    ]
    np.testing.assert_allclose(found["logprobs"]["token_logprobs"][1:], before + own, atol=1e-4)


def test_seeded_answers_do_not_depend_on_their_neighbours(server):
    body = {"messages": HI, "seed": 7, "n": 2, "max_tokens": 16}
    alone = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=600).json()[
        "choices"
    ]

    async def go():
        async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
            posts = [
                client.post("/v1/chat/completions", json={**body, "seed": seed})
                for seed in (1, 7, 2, 7, 3)
            ]
            return [reply.json()["choices"] for reply in await asyncio.gather(*posts)]

    found = asyncio.run(go())
    text = lambda choices: [choice["message"]["content"] for choice in choices]
    assert text(found[1]) == text(found[3]) == text(alone)
    assert text(found[0]) != text(alone)


def test_forms_hold_on_random_weights(client):
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 0, "maximum": 99},
            "b": {"enum": ["x", "y"]},
        },
        "required": ["n", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    for seed in range(4):
        for extra in ({}, {"logprobs": True}):
            found = chat(client, response_format=form, seed=seed, max_tokens=150, **extra).choices[
                0
            ]
            assert found.finish_reason == "stop", found
            jsonschema.validate(json.loads(found.message.content), schema)
    found = chat(client, extra_body={"structured_outputs": {"regex": "[ab]{5}"}})
    assert re.fullmatch("[ab]{5}", found.choices[0].message.content)


def test_forms_hold_in_llm(llm):
    params = SamplingParams(structured_outputs={"choice": ["left", "right"]}, seed=1)
    for found in llm.generate(["a", "b"], params, use_tqdm=False):
        assert found.outputs[0].text in ("left", "right")
    (found,) = llm.chat(HI, params, use_tqdm=False)
    assert found.outputs[0].text in ("left", "right")
    with pytest.raises(ValueError, match="regex cannot be compiled"):
        llm.generate("a", SamplingParams(structured_outputs={"regex": "(["}), use_tqdm=False)


def test_forced_calls_on_random_weights(client):
    parameters = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters}} for name in "fg"
    ]
    named = {"type": "function", "function": {"name": "g"}}
    for choice in ("required", named):
        found = chat(
            client, tools=tools, tool_choice=choice, parallel_tool_calls=False, max_tokens=120
        ).choices[0]
        (call,) = found.message.tool_calls
        assert call.function.name in ("g" if choice is named else "fg")
        assert json.loads(call.function.arguments)["a"] in ("x", "y")


def test_a_client_that_leaves_gives_its_pages_back(server, llm):
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions",
        json={"messages": HI, "stream": True, "ignore_eos": True}, timeout=600,
    ) as response:  # fmt: skip
        next(response.iter_lines())
    health = {"load": {"running": 1}}
    for _ in range(200):
        health = httpx.get(f"{server.url}/health").json()
        if health["load"]["running"] == 0 and health["load"]["kv_cache_usage"] == 0:
            break
    assert health["load"]["running"] == 0
    assert health["load"]["kv_cache_usage"] == 0


def test_metrics_count_the_engines_tokens(server, client):
    before = httpx.get(f"{server.url}/metrics").text
    chat(client, **GREEDY)
    after = httpx.get(f"{server.url}/metrics").text
    pattern = re.compile(r"^vllm:generation_tokens_total\{.*\} ([\d.]+)$", re.MULTILINE)
    assert float(pattern.findall(after)[0]) > float(pattern.findall(before)[0])


def picture(color):
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (64, 96), color).save(data, "PNG")
    return data.getvalue()


def test_pictures_are_seen(tmp_path):
    llm = vision_model.shared_llm()
    (tmp_path / "red.png").write_bytes(picture("red"))
    red = "data:image/png;base64," + base64.b64encode(picture("red")).decode()
    blue = "data:image/png;base64," + base64.b64encode(picture("blue")).decode()
    with (
        running(llm, media_folder=tmp_path, request_timeout=600.0) as server,
        openai.OpenAI(
            base_url=f"{server.url}/v1",
            api_key="x",
            max_retries=0,
            timeout=600,
            _strict_response_validation=True,
        ) as client,
    ):

        def see(url):
            part = {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}
            messages = [{"role": "user", "content": [part, {"type": "text", "text": "what"}]}]
            found = chat(client, messages, temperature=0, max_tokens=12, logprobs=True)
            return [entry.logprob for entry in found.choices[0].logprobs.content]

        assert see(red) == see(f"file://{tmp_path}/red.png")
        assert see(red) != see(blue)
        with pytest.raises(openai.BadRequestError, match=r"broken|no picture"):
            see("data:image/png;base64,aGVsbG8=")
