"""Who may ask, and when: keys and the end of the server. Knows headers and paths, no bodies."""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from qwen_jax.openai.errors import ApiError, encode, shutting_down

_GUARDED = "/v1/"


class Guard:
    """In front of the application: no key or no time left, no route.

    Args:
        app: what it guards.
        api_keys: any of them opens; none: no key is asked for.
        draining: whether the server takes nothing more.
        answered: is told the route and the status of every answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: tuple[str, ...],
        draining: Callable[[], bool],
        answered: Callable[[str, int], None],
    ):
        self._app, self._draining, self._answered = app, draining, answered
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                # A path that is no route is the client's invention, and no name for a metric.
                route = getattr(scope.get("route"), "path", "other")
                self._answered(route, message["status"])
            await send(message)

        await self._let_in(scope, receive, counted)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(_GUARDED):
            await self._app(scope, receive, send)
        elif self._keys and not self._knows(_token(scope["headers"])):
            error = ApiError(
                401, "no or a wrong API key: send Authorization: Bearer KEY", code="invalid_api_key"
            )
            await respond(error, send)
        elif self._draining():
            await respond(shutting_down(), send)
        else:
            await self._app(scope, receive, send)

    def _knows(self, token: bytes) -> bool:
        # Every key is compared, each in a time that does not tell how much of it is right.
        return sum(hmac.compare_digest(token, key) for key in self._keys) > 0


def _token(headers: list[tuple[bytes, bytes]]) -> bytes:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
    return b""


async def respond(error: ApiError, send: Callable[[Any], Awaitable[None]]) -> None:
    """Sends an error as the whole answer."""
    headers = {"content-type": "application/json", "connection": "close", **error.headers()}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": encode(error.body())})
