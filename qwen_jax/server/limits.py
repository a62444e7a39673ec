"""Bodies of bounded size that arrive in bounded time, and a bounded number of requests at once.

Knows bytes and clocks; knows no field of a request.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request

from qwen_jax.openai.checks import parse_json
from qwen_jax.openai.errors import ApiError

_JSON = ("application/json",)


class Gate:
    """Lets a number of requests in; the next one is turned away."""

    def __init__(self, most: int):
        self._most, self.inside = most, 0

    def enter(self) -> None:
        """Raises ApiError 429 when it is full; who has entered calls `leave`, once."""
        if self.inside >= self._most:
            raise ApiError(
                429, f"{self._most} requests are in progress, which is the limit", code="queue_full"
            )
        self.inside += 1

    def leave(self) -> None:
        self.inside -= 1


async def read_json(request: Request, *, most: int, timeout: float) -> Any:
    """The body as JSON.

    Raises:
        ApiError: it is too large (413), too slow, no JSON, or not said to be JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _JSON and not kind.endswith("+json"):
        raise ApiError(400, f"Content-Type is {kind[:80]!r}; send application/json")
    data = await read_body(request, most=most, timeout=timeout)
    # Some time for a body of megabytes, in which others would not get their tokens.
    return await asyncio.to_thread(parse_json, data)


async def read_body(request: Request, *, most: int, timeout: float) -> bytes:
    """All bytes of the body. Raises ApiError: too large (413) or too slow."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > most:
        raise too_large(most)
    parts = []
    async for part in within(request.stream(), most=most, timeout=timeout):
        parts.append(part)
    return b"".join(parts)


async def within(
    stream: AsyncIterator[bytes], *, most: int, timeout: float
) -> AsyncGenerator[bytes, None]:
    """A body's pieces, as long as they are not too many and come in time."""
    size = 0
    deadline = asyncio.get_running_loop().time() + timeout
    iterator = aiter(stream)
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                part = await anext(iterator)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ApiError(
                400, f"the body did not arrive within {timeout:g} seconds", code="timeout"
            ) from None
        except ClientDisconnect:
            raise ApiError(400, "the client left before its body had arrived") from None
        size += len(part)
        if size > most:
            raise too_large(most)
        yield part


def too_large(most: int) -> ApiError:
    """For a body of more than ``most`` bytes."""
    return ApiError(413, f"the body exceeds the limit of {most:,} bytes", code="too_large")
