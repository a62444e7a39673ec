"""Everything that goes wrong, as OpenAI's clients read it: {"error": {message, type, param, code}}.

Knows HTTP statuses and pydantic's complaints; knows no route.
"""

import contextlib
import difflib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from qwen_jax.engine.events import EngineClosed, QueueFull

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_RETRY_AFTER = 1  # seconds: a place in the queue comes free with any request that ends
_MAX_SHOWN = 500  # characters of a message that quotes what a client sent


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        what = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": what}

    def headers(self) -> dict[str, str]:
        """What goes with the status."""
        if self.status in (429, 503):
            return {"Retry-After": str(_RETRY_AFTER)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def encode(value: Any) -> bytes:
    """JSON as it is sent; half a surrogate pair, which a client may have sent, stays an escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def shutting_down() -> ApiError:
    """For requests that the end of the server cuts off, or that come too late."""
    return ApiError(503, "the server is shutting down", code="shutting_down")


def of_engine(error: Exception) -> ApiError:
    """What the engine says of a request that it does not finish."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(429, f"the queue is full: {error}", code="queue_full")
        case EngineClosed():
            return shutting_down()
        case ValueError():
            return ApiError(400, str(error))
        case RuntimeError(__cause__=ValueError() as cause):  # a grammar that grew too complex
            return ApiError(400, str(cause))
    raise error


@contextlib.contextmanager
def bad_request(param: str | None = None) -> Iterator[None]:
    """What the library refuses inside is the client's mistake, or asks for an extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ApiError(400, f"that cannot be done here: {error}", param=param) from error
    except (ValueError, QueueFull, EngineClosed) as error:
        found = of_engine(error)
        found.param = found.param or param
        raise found from error


def of_validation(
    complaints: Sequence[Mapping[str, Any]], body: Any, known: Collection[str]
) -> ApiError:
    """The first of pydantic's complaints that is worth telling.

    Args:
        complaints: as `ValidationError.errors` gives them.
        body: what was checked.
        known: names of fields, for a did-you-mean.
    """
    # Of the branches of a union the one that got farthest was meant, and of these one whose type
    # was right.
    first = max(
        complaints, key=lambda c: (len(_path(c["loc"], body)), not c["type"].endswith("_type"))
    )
    path = _path(first["loc"], body)
    param = _written(path) or None
    if first["type"] == "extra_forbidden":
        name = str(path[-1]) if path else "?"
        near = difflib.get_close_matches(name, set(known) - {name}, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return ApiError(400, f"unknown field {name[:80]!r}{hint}", param=param)
    if first["type"] == "missing":
        name = ".".join(str(part) for part in (*path, first["loc"][-1]))
        return ApiError(400, f"{name} is missing", param=name)
    message = first["msg"].removeprefix("Value error, ")
    shown = f"{param}: {message}" if param else message
    given = first.get("input")
    if not isinstance(given, dict | list) and first["type"] != "value_error":
        shown += f", got {given!r:.80}"
    return ApiError(400, shown[:_MAX_SHOWN], param=param)


def _path(location: Sequence[str | int], body: Any) -> list[str | int]:
    """The parts of a pydantic location that lead somewhere; the others name branches of unions.

    A branch may be called as a field is ("text"), so the longest way is it, and of two as long the
    one that gets to the end.
    """
    if not location:
        return []
    part, rest = location[0], location[1:]
    without = _path(rest, body)
    items: Any = dict(enumerate(body)) if isinstance(body, list) else body
    if not isinstance(items, Mapping) or part not in items:
        return without
    ways = ([part, *_path(rest, items[part])], without)
    return max(ways, key=lambda way: (len(way), way[-1:] == [location[-1]]))


def _written(path: Sequence[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")[:200]
