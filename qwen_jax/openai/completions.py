"""Completions of plain prompts, and of code with a gap: a body to prompts, events to texts.

Knows OpenAI's completion objects; knows no HTTP.
"""

import dataclasses
import functools
import time
from collections.abc import AsyncIterator
from typing import Any

from qwen_jax.engine.events import Delta
from qwen_jax.openai.answerer import Answerer
from qwen_jax.openai.calls import Calls
from qwen_jax.openai.chat import usage
from qwen_jax.openai.completion_protocol import CompletionRequest
from qwen_jax.openai.errors import ApiError
from qwen_jax.openai.ids import new_id
from qwen_jax.openai.logprobs import TextLogprobs, prompt_logprobs
from qwen_jax.openai.sampling import check_room, sampling_params
from qwen_jax.requests import Prompt, SamplingParams
from qwen_jax.results import RequestOutput
from qwen_jax.structured.spec import StructuredOutputs


@dataclasses.dataclass(frozen=True)
class CompletionJob:
    """A request, ready for the engine.

    Attributes:
        body: the request.
        model: its name in the reply.
        jobs: each prompt with its parameters.
        texts: of the prompts, where they are echoed.
        id, created: of the reply.
    """

    body: CompletionRequest
    model: str
    jobs: list[tuple[Prompt, SamplingParams]]
    texts: list[str]
    id: str
    created: int

    @property
    def n(self) -> int:
        return self.jobs[0][1].n


async def prepare(answerer: Answerer, body: CompletionRequest) -> CompletionJob:
    """Checks a request against the model and encodes its prompts.

    Raises:
        ApiError: it cannot be answered.
    """
    model = answerer.check_model(body.model)
    prompts = await answerer.on_thread(functools.partial(_prompts, answerer, body))
    # Of the default the engine generates what fits.
    asked = body.max_tokens if "max_tokens" in body.model_fields_set else None
    for prompt in prompts:
        check_room(prompt, asked, answerer.llm.max_model_len, "max_tokens")
    echoed = body.logprobs if body.echo and body.prompt_logprobs is None else None
    params = sampling_params(
        body,
        answerer.llm.get_default_sampling_params(),
        vocab_size=answerer.llm.config.text.vocab_size,
        max_tokens=1 if body.max_tokens == 0 else body.max_tokens,  # only the prompt is wanted
        logprobs=body.logprobs,
        **({} if echoed is None else {"prompt_logprobs": echoed}),
    )
    wish = params.structured_outputs
    jobs = []
    for prompt in prompts:
        own = params
        if isinstance(wish, StructuredOutputs):
            grammar = await answerer.compile(wish, prompt)
            own = dataclasses.replace(params, structured_outputs=grammar)
        jobs.append((prompt, own))
    return CompletionJob(
        body=body,
        model=model,
        jobs=jobs,
        texts=[_text(answerer, prompt) if body.echo else "" for prompt in prompts],
        id=f"cmpl-{body.request_id}" if body.request_id else new_id("cmpl-"),
        created=int(time.time()),
    )


def _prompts(answerer: Answerer, body: CompletionRequest) -> list[Prompt]:
    inputs = answerer.llm.inputs
    if body.suffix is not None:
        assert isinstance(body.prompt, str)
        return [inputs.fill(body.prompt, body.suffix)]
    if body.mm_processor_kwargs:
        raise ApiError(400, "mm_processor_kwargs is for pictures; use /v1/chat/completions")
    found = []
    for i, prompt in enumerate(body.prompts()):
        given = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        found.append(inputs.prompt(given, f"prompt {i}"))
    return found


def _text(answerer: Answerer, prompt: Prompt) -> str:
    if prompt.text is not None:
        return prompt.text
    return answerer.llm.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)


async def whole(answerer: Answerer, job: CompletionJob, calls: Calls) -> dict[str, Any]:
    """The reply, when everything is there."""
    results = await calls.finish()
    choices = [
        choice for i, result in enumerate(results) for choice in _choices(answerer, job, i, result)
    ]
    generated = sum(len(o.token_ids) for r in results for o in r.outputs)
    return {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": job.model,
        "choices": choices,
        "usage": usage(
            sum(len(result.prompt_token_ids) for result in results),
            0 if job.body.max_tokens == 0 else generated,
        ),
    }


def _choices(
    answerer: Answerer, job: CompletionJob, i: int, result: RequestOutput
) -> list[dict[str, Any]]:
    """The choices of one prompt."""
    body, found = job.body, []
    empty = body.max_tokens == 0
    for output in result.outputs:
        tokens = [] if empty else output.token_ids
        choice = {
            "index": i * job.n + output.index,
            "text": job.texts[i] + ("" if empty else output.text),
            "logprobs": None,
            "finish_reason": "length" if empty else output.finish_reason,
            "stop_reason": None if empty else output.stop_reason,
        }
        if body.logprobs is not None:
            entries = [] if empty else output.logprobs or []
            before = result.prompt_token_ids if body.echo else []
            known = (result.prompt_logprobs or []) if body.echo else []
            shown = TextLogprobs(answerer.llm.tokenizer, body.logprobs)
            choice["logprobs"] = shown.add([*before, *tokens], [*known, *entries])
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs)
        if body.return_token_ids:
            choice |= {"token_ids": tokens, "prompt_token_ids": result.prompt_token_ids}
        found.append(choice)
    return found


async def pieces(
    answerer: Answerer, job: CompletionJob, calls: Calls
) -> AsyncIterator[dict[str, Any]]:
    """The reply as it comes."""
    options = job.body.stream_options
    counted = options is not None and options.include_usage
    always = options is not None and options.continuous_usage_stats
    length = sum(len(prompt.token_ids) for prompt, _ in job.jobs)
    texts = _Streams(answerer, job)
    tokens = 0

    def piece(choices: list[dict[str, Any]]) -> dict[str, Any]:
        found = {
            "id": job.id,
            "object": "text_completion",
            "created": job.created,
            "model": job.model,
            "choices": choices,
        }
        if always or (counted and not choices):
            found["usage"] = usage(length, tokens)
        elif counted:
            found["usage"] = None
        return found

    async for i, delta in calls.events():
        tokens += len(delta.token_ids)
        yield piece([texts.choice(i, delta)])
    if counted:
        yield piece([])


class _Streams:
    """The texts of a streamed request: echoes that are due, and where logprobs stand in them."""

    def __init__(self, answerer: Answerer, job: CompletionJob):
        self._job, self._tokenizer = job, answerer.llm.tokenizer
        self._logprobs: dict[int, TextLogprobs] = {}

    def choice(self, i: int, delta: Delta) -> dict[str, Any]:
        """What is new of one text."""
        body, index = self._job.body, i * self._job.n + delta.index
        text = delta.text
        if index not in self._logprobs:
            self._logprobs[index] = TextLogprobs(self._tokenizer, body.logprobs or 0)
            text = self._job.texts[i] + text
        choice = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if body.logprobs is not None:
            known = delta.logprobs or []
            choice["logprobs"] = self._logprobs[index].add(delta.token_ids, known)
        if body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice
