"""Replies in pieces: server-sent events, and clients that read slowly or leave.

Knows framing and connections; knows nothing of what is in the pieces.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwen_jax.openai.errors import ApiError, encode

log = logging.getLogger(__name__)

_DONE = b"data: [DONE]\n\n"


def frame(value: Any) -> bytes:
    """One event."""
    return b"data: " + encode(value) + b"\n\n"


class EventStream(Response):
    """Sends pieces as they come, then ``[DONE]``; an error on the way is a piece of its own.

    Args:
        pieces: JSON values; closed when the client has left, or takes nothing for too long.
        close: is called in the end, whatever happened.
        send_timeout: seconds for the client to take a piece.
    """

    media_type = "text/event-stream"

    def __init__(
        self, pieces: AsyncIterator[Any], *, close: Callable[[], None], send_timeout: float
    ):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._pieces, self._close, self._send_timeout = pieces, close, send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        watching = asyncio.create_task(until_gone(receive))
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
            self._close()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for data in self._framed():
                async with asyncio.timeout(self._send_timeout):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            log.info("a client took no piece for %g seconds: given up", self._send_timeout)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _framed(self) -> AsyncIterator[bytes]:
        async with contextlib.aclosing(self._pieces) as pieces:  # type: ignore[type-var]
            try:
                async for piece in pieces:
                    yield frame(piece)
            except ApiError as error:
                yield frame(error.body())
            except Exception:
                # The status is sent: the client has no other way to hear of a fault of ours.
                log.exception("a reply broke off")
                yield frame(ApiError(500, "internal error").body())
        yield _DONE


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
