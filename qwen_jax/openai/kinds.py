"""One request from its body to its reply, for every endpoint that generates.

Knows the order of things: a body, a prompt, the engine, a reply; and that whatever happens, the
engine is told.
"""

import dataclasses
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from qwen_jax.openai import chat, chat_protocol, completion_protocol, completions
from qwen_jax.openai.answerer import Answerer
from qwen_jax.openai.batch_lines import BatchRequest, Given
from qwen_jax.openai.chat_protocol import ChatRequest
from qwen_jax.openai.checks import validate
from qwen_jax.openai.completion_protocol import CompletionRequest
from qwen_jax.openai.errors import ApiError


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one endpoint does with a request.

    Attributes:
        model: its body; ``known``: names of the body's fields.
        prepare: a body to a job.
        jobs: the prompts of a job, with their parameters.
        whole, pieces: the reply.
    """

    model: Any
    known: Collection[str]
    prepare: Callable[[Answerer, Any], Awaitable[Any]]
    jobs: Callable[[Any], list]
    whole: Callable[..., Awaitable[dict[str, Any]]]
    pieces: Callable[..., Any]


KINDS = {
    "/v1/chat/completions": Kind(
        ChatRequest,
        chat_protocol.KNOWN,
        chat.prepare,
        lambda job: [(job.prompt, job.params)],
        chat.whole,
        chat.pieces,
    ),
    "/v1/completions": Kind(
        CompletionRequest,
        completion_protocol.KNOWN,
        completions.prepare,
        lambda job: job.jobs,
        completions.whole,
        completions.pieces,
    ),
}


async def answer(answerer: Answerer, request: BatchRequest, given: Given) -> dict[str, Any]:
    """The whole reply to a line of a batch: the same one whenever it is asked for.

    Raises:
        ApiError: there is none.
    """
    kind = KINDS[request.url]
    body = validate(kind.model, request.body, kind.known)
    if body.stream:
        raise ApiError(400, "stream has no meaning in a batch; leave it out", param="stream")
    body.request_id = body.request_id or given.request_id
    body.seed = given.seed if body.seed is None else body.seed
    job = dataclasses.replace(await kind.prepare(answerer, body), created=given.created)
    calls = answerer.new_calls()
    try:
        calls.submit(answerer.llm.engine, kind.jobs(job), request_id=job.id)
        return await kind.whole(answerer, job, calls)
    finally:
        answerer.close(calls)
