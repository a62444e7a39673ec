"""Bodies that nobody would write, at every route: an answer in OpenAI's form, and never a 500."""

import asyncio
import json
import os

import httpx
import pytest
from fake_llm import FakeLLM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import settings as server_settings

from qwen_jax.openai import chat_protocol, completion_protocol
from qwen_jax.server.app import make_app

EXAMPLES = int(os.environ.get("QWEN_JAX_FUZZ", "60"))
STATUSES = {200, 400, 404, 413, 429, 503}
ODD = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.0, -0.5, 1e308, "", "x", "\ud800", "\0",
    "x" * 10_000, "<|im_end|>", [], {}, [[]], [{}], {"": None}, [None], ["x"] * 100, [-1], [10**9],
)  # fmt: skip
anything = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=10) | st.sampled_from(chat_protocol.KNOWN), inner, max_size=4
        )
    ),
    max_leaves=12,
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
GOOD = {
    "messages": [
        {"role": "system", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "x", "reasoning_content": "y", "tool_calls": [CALL]},
        {"role": "tool", "content": "z", "tool_call_id": "c"},
    ],
    "tools": [TOOL],
    "tool_choice": "required",
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "structured_outputs": {"regex": "a+"},
    "stream_options": {"include_usage": True},
    "stop": ["a"],
    "logit_bias": {"1": 1},
    "temperature": 0.5,
    "logprobs": True,
    "top_logprobs": 1,
    "n": 2,
    "chat_template_kwargs": {"x": 1},
    "stream": True,
}  # fmt: skip


@st.composite
def mutated(draw, good, known, needed):
    """Some fields of a good body, and one thing in it replaced, or a field more."""
    good = json.loads(json.dumps(good))
    kept = draw(st.sets(st.sampled_from(sorted(good)), max_size=5)) | {needed}
    body = {key: good[key] for key in sorted(kept)}
    body["max_tokens"] = draw(st.sampled_from([1, 8]))
    if draw(st.booleans()):
        body[draw(st.sampled_from(known))] = draw(anything)
        return body
    at = body
    while True:
        keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return body
        key = draw(st.sampled_from(keys))
        if not isinstance(at[key], dict | list) or draw(st.integers(0, 3)) == 0:
            at[key] = draw(anything)
            return body
        at = at[key]


@pytest.fixture(scope="module")
def post(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    service, app = make_app(
        FakeLLM(), server_settings(state=folder, media_folder=folder, request_timeout=5.0)
    )

    def send(path, content, kind="application/json"):
        async def go():
            transport = httpx.ASGITransport(app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post(path, content=content, headers={"content-type": kind})

        return asyncio.run(go())

    yield send
    assert send("/v1/completions", b'{"prompt": "a"}').status_code == 200, "it still serves"
    service.shut()


def check(response):
    assert response.status_code in STATUSES, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["message"]
        assert len(error["message"]) < 5000
        assert error["param"] is None or isinstance(error["param"], str)


fuzzing = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@fuzzing
@given(mutated(GOOD, chat_protocol.KNOWN, "messages"))
def test_chat(post, body):
    check(post("/v1/chat/completions", json.dumps(body)))


@fuzzing
@given(
    mutated(
        {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "n": 2, "stop": "x"},
        completion_protocol.KNOWN,
        "prompt",
    )
)
def test_completions(post, body):
    check(post("/v1/completions", json.dumps(body)))


@fuzzing
@given(
    mutated(
        {"input_file_id": "file-x", "endpoint": "/v1/completions", "completion_window": "24h"},
        ["input_file_id", "endpoint", "completion_window", "metadata", "x"],
        "endpoint",
    )
)
def test_batches(post, body):
    check(post("/v1/batches", json.dumps(body)))


@fuzzing
@given(st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/batches"]), st.binary())
def test_bytes(post, path, content):
    check(post(path, content))


@fuzzing
@given(st.binary(max_size=400), st.booleans())
def test_forms(post, content, framed):
    if framed:
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        content = head + content + b"\r\n--b--\r\n"
    check(post("/v1/files", content, "multipart/form-data; boundary=b"))
