"""OpenAI's own client, as it is on PyPI, with its strict validation, against a real socket."""

import asyncio
import json

import fake_llm
import openai
import pytest
from serving import running

HI = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "does f",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "string", "enum": ["x", "y"]}},
            "required": ["a"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
OTHER = {**TOOL, "function": {**TOOL["function"], "name": "g"}}


def say(prompt, index):
    for word, text in {"call": f"I call.\n{CALL}\n{CALL}", "count": f"{index} one two"}.items():
        if (prompt or "").endswith(f"{word}<|im_end|>\n<|im_start|>assistant\n"):
            return text
    return "hello world"


@pytest.fixture(scope="module")
def server():
    with running(fake_llm.FakeLLM(say), api_keys=("secret",)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="secret",
        max_retries=0,
        timeout=20,
        _strict_response_validation=True,
    ) as client:
        yield client


def chat(client, text="hi", **options):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("tiny").owned_by == "qwen-jax"


def test_chat(client):
    found = chat(client)
    assert found.choices[0].message.content == "hello world"
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_chat_streams(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "hello world"
    assert chunks[-1].usage.completion_tokens == 6


def test_the_stream_helper_builds_the_same_message(client):
    with client.chat.completions.stream(model="tiny", messages=HI, tools=[TOOL]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done", "chunk"} <= kinds
    assert final.choices[0].message.content == "hello world"


def test_several_answers(client):
    found = chat(client, "count", n=3)
    assert [choice.message.content for choice in found.choices] == [
        f"{i} one two" for i in range(3)
    ]


def test_logprobs(client):
    found = chat(client, logprobs=True, top_logprobs=3)
    content = found.choices[0].logprobs.content
    assert "".join(entry.token for entry in content[:-1]) == "hello world"
    assert len(content[0].top_logprobs) == 3


def test_tools_auto(client):
    message = chat(client, "call", tools=[TOOL]).choices[0]
    assert message.finish_reason == "tool_calls"
    assert [call.function.name for call in message.message.tool_calls] == ["f", "f"]
    assert json.loads(message.message.tool_calls[0].function.arguments) == {"a": "x"}


def test_tools_stream_in_fragments(client):
    messages = [{"role": "user", "content": "call"}]
    with client.chat.completions.stream(model="tiny", messages=messages, tools=[TOOL]) as stream:
        final = stream.get_final_completion().choices[0]
    calls = final.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"a": "x"}] * 2
    assert len({call.id for call in calls}) == 2
    assert final.finish_reason == "tool_calls"


def test_tools_required_named_and_one_at_a_time(client):
    for seed in range(3):
        found = chat(client, tools=[TOOL, OTHER], tool_choice="required", seed=seed).choices[0]
        assert found.finish_reason == "tool_calls"
        assert {call.function.name for call in found.message.tool_calls} <= {"f", "g"}
        named = {"type": "function", "function": {"name": "g"}}
        found = chat(client, tools=[TOOL, OTHER], tool_choice=named, seed=seed).choices[0]
        assert [call.function.name for call in found.message.tool_calls] == ["g"]
        found = chat(
            client, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, seed=seed
        ).choices[0]
        assert len(found.message.tool_calls) == 1


def test_a_turn_after_a_call(client):
    message = chat(client, "call", tools=[TOOL]).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "done"} for call in message.tool_calls
    ]
    history = [{"role": "user", "content": "call"}, message, *results]
    found = client.chat.completions.create(model="tiny", messages=history, tools=[TOOL])
    assert found.choices[0].message.content == "hello world"


def test_a_schema_by_a_pydantic_model(client):
    import pydantic

    class Answer(pydantic.BaseModel):
        number: int
        word: str = pydantic.Field(max_length=5)

    found = client.chat.completions.parse(model="tiny", messages=HI, response_format=Answer)
    parsed = found.choices[0].message.parsed
    assert isinstance(parsed, Answer)
    assert len(parsed.word) <= 5


def test_completions(client):
    found = client.completions.create(model="tiny", prompt=["a", "b"], n=2, logprobs=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[2].text == "hello world"
    assert len(found.choices[0].logprobs.tokens) == 6
    # Its strict validation refuses OpenAI's own pieces too: their finish_reason is null.
    with openai.OpenAI(base_url=client.base_url, api_key="secret") as loose:
        stream = loose.completions.create(model="tiny", prompt="a", stream=True, suffix="z")
        assert "".join(chunk.choices[0].text for chunk in stream) == "hello world"


def test_extras_of_vllm(client):
    extra = {"top_k": 3, "min_p": 0.1, "structured_outputs": {"choice": ["yes", "no"]}}
    assert chat(client, extra_body=extra).choices[0].message.content in ("yes", "no")


def test_errors_are_the_clients_own_classes(server, client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(client, temperature=-1)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HI)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        chat(client.with_options(api_key="wrong"))


def test_many_at_once(server):
    async def go():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="secret", max_retries=0
        ) as client:
            asked = [
                client.chat.completions.create(model="tiny", messages=HI, n=1 + i % 2)
                for i in range(32)
            ]
            return await asyncio.gather(*asked)

    found = asyncio.run(go())
    assert all(reply.choices[0].message.content == "hello world" for reply in found)
