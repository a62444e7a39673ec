"""Bodies of bounded size that arrive in bounded time, and a bounded number of requests at once.

Knows bytes, JSON and clocks; knows no field of a request.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from typing import Any, TypeVar

import pydantic
from starlette.requests import ClientDisconnect, Request

from qwen_jax.server.errors import ApiError, of_validation

Model = TypeVar("Model", bound=pydantic.BaseModel)

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


def parse_json(data: bytes) -> Any:
    """Strict JSON: no NaN, UTF-8. Raises ApiError."""
    try:
        return json.loads(data.decode(), parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deep", code="invalid_json") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, numbers of 5,000 digits
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None


def validate(kind: type[Model], body: Any, known: Collection[str]) -> Model:
    """A body as a model. Raises ApiError: what is wrong with it first, and where."""
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, got a {type(body).__name__}")
    try:
        return kind.model_validate(body)
    except pydantic.ValidationError as error:
        complaints = error.errors(include_url=False, include_context=False)
        if len(complaints[0]["loc"]) == 1:
            known = kind.model_fields  # a field of the body itself
        raise of_validation(complaints, body, known) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
