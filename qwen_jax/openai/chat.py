"""Chat completions: a body to a prompt, and events to messages, whole or in pieces.

Knows OpenAI's chat objects and the library's parsers; knows no HTTP. A whole reply is made of the
same pieces as a stream, so the two cannot differ.
"""

import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from qwen_jax.engine.events import Delta
from qwen_jax.openai.answerer import Answerer
from qwen_jax.openai.calls import Calls
from qwen_jax.openai.chat_choice import Choice
from qwen_jax.openai.chat_protocol import AllowedChoice, ChatRequest, NamedTool
from qwen_jax.openai.errors import ApiError
from qwen_jax.openai.ids import new_id
from qwen_jax.openai.logprobs import prompt_logprobs
from qwen_jax.openai.sampling import check_room, sampling_params
from qwen_jax.prompt import parsing
from qwen_jax.requests import Prompt, SamplingParams
from qwen_jax.structured.spec import StructuredOutputs, ToolCalls, read_schema

# What `chat_parts` takes itself; other names of chat_template_kwargs reach the template.
_RESERVED = {
    "messages",
    "tokenizer",
    "template",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "self",
}


@dataclasses.dataclass(frozen=True)
class ChatJob:
    """A request, ready for the engine.

    Attributes:
        body: the request.
        model: its name in the reply.
        prompt, params: what to generate.
        tools: those that the answer may call, None for none.
        named: whether tool_choice names the function.
        top: how many logprobs to show, None for no logprobs.
        id, created: of the reply.
    """

    body: ChatRequest
    model: str
    prompt: Prompt
    params: SamplingParams
    tools: Sequence[Mapping[str, Any]] | None
    named: bool
    top: int | None
    id: str
    created: int

    def choices(self, answerer: Answerer) -> list[Choice]:
        """An empty choice for each answer."""
        return [self._choice(answerer, index) for index in range(self.params.n)]

    def _choice(self, answerer: Answerer, index: int) -> Choice:
        raw = parsing.OutputParser(reasoning="off")
        return Choice(
            index,
            self.id,
            raw if self.body.raw else answerer.llm.inputs.parser(self.prompt, self.tools),
            answerer.llm.tokenizer,
            named=self.named,
            one_call=self.body.parallel_tool_calls is False,
            with_reasoning=self.body.include_reasoning is not False,
            top=self.top,
            with_ids=bool(self.body.return_token_ids),
        )


async def prepare(answerer: Answerer, body: ChatRequest) -> ChatJob:
    """Checks a request against the model, reads its pictures and renders its prompt.

    Raises:
        ApiError: it cannot be answered.
    """
    model = answerer.check_model(body.model)
    if len(body.messages) > answerer.llm.max_model_len:
        raise ApiError(
            400,
            f"{len(body.messages):,} messages do not fit the context of "
            f"{answerer.llm.max_model_len:,} tokens",
            param="messages",
            code="context_length_exceeded",
        )
    choice, tools = _offered(body)
    messages = [_message(message.model_dump(exclude_none=True)) for message in body.messages]
    make = functools.partial(_prompt, answerer, body, messages, tools)
    prompt = await answerer.on_thread(make)
    most = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    params = sampling_params(
        body,
        answerer.llm.get_default_sampling_params(),
        vocab_size=answerer.llm.config.text.vocab_size,
        max_tokens=most,
        logprobs=top,
    )
    field = "max_completion_tokens" if body.max_tokens is None else "max_tokens"
    check_room(prompt, most, answerer.llm.max_model_len, field)
    wish = _wish(answerer, body, choice, tools) or params.structured_outputs
    if isinstance(wish, StructuredOutputs):
        grammar = await answerer.compile(wish, prompt)
        params = dataclasses.replace(params, structured_outputs=grammar)
    return ChatJob(
        body=body,
        model=model,
        prompt=prompt,
        params=params,
        tools=tools,
        named=isinstance(choice, NamedTool),
        top=top,
        id=f"chatcmpl-{body.request_id}" if body.request_id else new_id("chatcmpl-"),
        created=int(time.time()),
    )


def _offered(body: ChatRequest) -> tuple[Any, list[dict[str, Any]] | None]:
    """(the tool choice, the tools that may be called by it)."""
    choice, wanted = body.tool_choice, body.wanted_names()
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    if choice == "none" or not tools:
        return "none", None
    if isinstance(choice, AllowedChoice):
        tools = [tool for tool in tools if tool["function"]["name"] in wanted]
        choice = choice.allowed_tools.mode
    return choice or "auto", tools or None


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as the chat templates know it."""
    if message["role"] == "developer":
        message["role"] = "system"
    reasoning = message.pop("reasoning", None)
    if reasoning is not None:
        message.setdefault("reasoning_content", reasoning)
    for call in message.get("tool_calls", ()):
        call.pop("index", None)
    for name in ("refusal", "annotations"):
        message.pop(name, None)
    return message


def _prompt(
    answerer: Answerer,
    body: ChatRequest,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
) -> Prompt:
    inputs = answerer.llm.inputs
    if body.raw:
        return inputs.prompt("".join(str(message["content"]) for message in messages), "messages")
    template = answerer.llm.template
    if tools and template is not None and parsing.tool_format(template.source) is None:
        raise ApiError(400, "this checkpoint's chat template has no tools", param="tools")
    kwargs = dict(body.chat_template_kwargs or {})
    taken = sorted(_RESERVED & kwargs.keys())
    if taken:
        raise ApiError(
            400,
            f"chat_template_kwargs cannot hold {taken[0]!r}",
            param=f"chat_template_kwargs.{taken[0]}",
        )
    if body.reasoning_effort == "none":
        kwargs.setdefault("enable_thinking", False)
    options = {
        "tools": tools,
        "add_generation_prompt": body.add_generation_prompt is not False,
        "continue_final_message": bool(body.continue_final_message),
        **kwargs,
    }
    return inputs.chat(answerer.media.load(messages), options, body.mm_processor_kwargs)


def _wish(
    answerer: Answerer, body: ChatRequest, choice: Any, tools: list[dict[str, Any]] | None
) -> StructuredOutputs | None:
    """The form that the answer must have, None for a free one."""
    form = _format(body)
    if form is not None and body.structured_outputs is not None:
        raise ApiError(400, "response_format and structured_outputs exclude each other; give one")
    if not tools:
        return form
    kind = parsing.tool_format(answerer.llm.template.source)
    assert kind is not None
    many = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    if body.structured_outputs is not None:
        raise ApiError(
            400, 'structured_outputs leaves no room for tool calls; use tool_choice="none"'
        )
    if choice == "auto":
        if form is None:
            return None
        schema = {"type": "object"} if form.json is None else read_schema(form.json, "JSON schema")
        return StructuredOutputs(tool_calls=ToolCalls(kind, tools, many, answer=schema))
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
    return StructuredOutputs(tool_calls=ToolCalls(kind, tools, many))


def _format(body: ChatRequest) -> StructuredOutputs | None:
    match body.response_format:
        case None:
            return None
        case found if found.type == "json_object":
            return StructuredOutputs(json_object=True)
        case found if found.type == "json_schema":
            schema = found.json_schema.schema_
            return StructuredOutputs(json={} if schema is None else schema)
    return None


async def whole(answerer: Answerer, job: ChatJob, calls: Calls) -> dict[str, Any]:
    """The reply, when everything is there."""
    choices = job.choices(answerer)
    async for _, delta in calls.events():
        choices[delta.index].take(delta)
    result = calls.results[0]
    reply = {
        "id": job.id,
        "object": "chat.completion",
        "created": job.created,
        "model": job.model,
        "choices": [choice.whole() for choice in choices],
        "usage": usage(len(result.prompt_token_ids), sum(c.tokens for c in choices)),
    }
    if job.body.prompt_logprobs is not None:
        reply["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs)
    if job.body.return_token_ids:
        reply["prompt_token_ids"] = result.prompt_token_ids
    return reply


async def pieces(answerer: Answerer, job: ChatJob, calls: Calls) -> AsyncIterator[dict[str, Any]]:
    """The reply as it comes."""
    options = job.body.stream_options
    counted = options is not None and options.include_usage
    always = options is not None and options.continuous_usage_stats
    choices = job.choices(answerer)
    length = len(job.prompt.token_ids)

    def piece(parts: list[dict[str, Any]]) -> dict[str, Any]:
        found = {
            "id": job.id,
            "object": "chat.completion.chunk",
            "created": job.created,
            "model": job.model,
            "choices": parts,
        }
        if always:
            found["usage"] = usage(length, sum(choice.tokens for choice in choices))
        elif counted:
            found["usage"] = None
        return found

    for choice in choices:
        yield piece([choice.opening()])
    async for part in _parts(choices, calls):
        yield piece([part])
    if counted:
        last = piece([])
        last["usage"] = usage(length, sum(choice.tokens for choice in choices))
        yield last


async def _parts(choices: list[Choice], calls: Calls) -> AsyncIterator[dict[str, Any]]:
    async for _, event in calls.events():
        for part in _of(choices, event):
            yield part


def _of(choices: list[Choice], event: Delta) -> list[dict[str, Any]]:
    choice = choices[event.index]
    choice.take(event)
    return choice.pieces()


def usage(prompt: int, completion: int) -> dict[str, int]:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
