"""One request from its body to its reply, for every route that generates.

Knows the order of things: a place, a body, a prompt, the engine, a reply; and that whatever
happens, the place is given back and the engine is told.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from qwen_jax.server import chat, chat_protocol, completion_protocol, completions
from qwen_jax.server.chat_protocol import ChatRequest
from qwen_jax.server.completion_protocol import CompletionRequest
from qwen_jax.server.errors import ApiError, encode
from qwen_jax.server.limits import validate
from qwen_jax.server.service import Service
from qwen_jax.server.sse import EventStream, until_gone

_GONE = 499  # for the log: nobody reads it


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one route does with a request.

    Attributes:
        model: its body; ``known``: names of the body's fields.
        prepare: a body to a job.
        jobs: the prompts of a job, with their parameters.
        whole, pieces: the reply.
    """

    model: Any
    known: Collection[str]
    prepare: Callable[[Service, Any], Awaitable[Any]]
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


async def respond(service: Service, request: Request, kind: Kind) -> Response:
    """The answer to a request over HTTP."""
    with contextlib.ExitStack() as held:
        held.enter_context(service.place())
        given = await service.read(request)
        body = await asyncio.to_thread(validate, kind.model, given, kind.known)
        job = await kind.prepare(service, body)
        calls = service.new_calls()
        held.callback(service.close, calls)
        calls.submit(service.llm.engine, kind.jobs(job), request_id=job.id)
        if body.stream:
            # What was taken is given back when the last piece has been sent.
            later = held.pop_all()
            pieces = kind.pieces(service, job, calls)
            timeout = service.settings.send_timeout
            return EventStream(pieces, close=later.close, send_timeout=timeout)
        reply = await _unless_gone(request, kind.whole(service, job, calls))
        return Response(status_code=_GONE) if reply is None else json_response(reply)


async def answer(service: Service, kind: Kind, body: Any) -> dict[str, Any]:
    """The whole reply to a body that did not come over HTTP.

    Raises:
        ApiError: there is none.
    """
    checked = validate(kind.model, body, kind.known)
    if checked.stream:
        raise ApiError(400, "stream has no meaning in a batch; leave it out", param="stream")
    job = await kind.prepare(service, checked)
    calls = service.new_calls()
    try:
        calls.submit(service.llm.engine, kind.jobs(job), request_id=job.id)
        return await kind.whole(service, job, calls)
    finally:
        service.close(calls)


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """What ``work`` gives; None where the client leaves before, and the work is ended."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(until_gone(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON, however odd the texts in it."""
    return Response(encode(value), status, headers, media_type="application/json")
