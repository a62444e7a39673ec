"""One request over HTTP, for every route that generates.

Knows the order of things: a place, a body, an answer, whole or in pieces; and that whatever
happens, the place is given back and the engine is told.
"""

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from qwen_jax.openai.checks import validate
from qwen_jax.openai.errors import encode
from qwen_jax.openai.kinds import Kind
from qwen_jax.server.service import Service
from qwen_jax.server.sse import EventStream, until_gone

_GONE = 499  # for the log: nobody reads it


async def respond(service: Service, request: Request, kind: Kind) -> Response:
    """The answer to a request over HTTP."""
    with contextlib.ExitStack() as held:
        held.enter_context(service.place())
        given = await service.read(request)
        body = await asyncio.to_thread(validate, kind.model, given, kind.known)
        answerer = service.answerer
        job = await kind.prepare(answerer, body)
        calls = answerer.new_calls()
        held.callback(answerer.close, calls)
        calls.submit(service.llm.engine, kind.jobs(job), request_id=job.id)
        if body.stream:
            # What was taken is given back when the last piece has been sent.
            later = held.pop_all()
            pieces = kind.pieces(answerer, job, calls)
            timeout = service.settings.send_timeout
            return EventStream(pieces, close=later.close, send_timeout=timeout)
        reply = await _unless_gone(request, kind.whole(answerer, job, calls))
        return Response(status_code=_GONE) if reply is None else json_response(reply)


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
