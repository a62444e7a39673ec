"""A line of a batch, and the line that answers it. Source: OpenAI's Batch API.

Knows the fields of both lines and that one request must not end a batch; knows neither model nor
disk. An answer is the same whenever it is given again: its ids, its seed and its time come from the
batch and the line, not from the moment.
"""

import dataclasses
import difflib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from qwen_jax.openai.checks import parse_json
from qwen_jax.openai.errors import ApiError
from qwen_jax.openai.ids import derived_id, derived_seed

log = logging.getLogger(__name__)

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
FIELDS = ("custom_id", "method", "url", "body")
_MAX_ID = 512  # characters of a custom_id


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """What a line asks for."""

    custom_id: str
    url: str
    body: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Given:
    """What a request gets where its body leaves it open.

    Attributes:
        request_id: in the reply's id.
        seed: of what is sampled.
        created: the reply's time, in seconds since 1970.
    """

    request_id: str
    seed: int
    created: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """What the answers of one batch share.

    Attributes:
        name: keeps the ids of two batches apart.
        seed: of the requests that bring none.
        created: the time in the replies, in seconds since 1970.
    """

    name: str
    seed: int
    created: int

    def given(self, custom_id: str) -> Given:
        """For a line."""
        name = derived_id("", self.name, custom_id)
        return Given(name, derived_seed(self.seed, custom_id), self.created)


Answer = Callable[[BatchRequest, Given], Awaitable[dict[str, Any]]]
"""A request to the whole reply; raises ApiError."""


# ---- in ------------------------------------------------------------------------------------------


def parse_line(raw: bytes) -> dict[str, Any]:
    """The object of a line; ApiError where it is none."""
    found = parse_json(raw, "the line", "invalid_json_line")
    if not isinstance(found, dict):
        raise ApiError(400, "the line is not a JSON object", code="invalid_json_line")
    return found


def read_request(found: Mapping[str, Any], endpoints: Collection[str] = ENDPOINTS) -> BatchRequest:
    """The request of a line's object.

    Raises:
        ApiError: a field is missing, wrong or unknown. What the body holds is not looked at.
    """
    custom_id, body = found.get("custom_id"), found.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= _MAX_ID:
        raise ApiError(
            400,
            f"custom_id must be a text of 1 to {_MAX_ID} characters",
            param="custom_id",
            code="missing_required_parameter",
        )
    unknown = sorted(found.keys() - set(FIELDS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], FIELDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f": a line has {', '.join(FIELDS)}"
        raise ApiError(
            400,
            f"unknown field {unknown[0][:80]!r}{hint}",
            param=unknown[0][:80],
            code="unknown_field",
        )
    if found.get("method") != "POST":
        raise ApiError(400, 'method must be "POST"', param="method", code="invalid_method")
    if found.get("url") not in endpoints:
        raise ApiError(
            400, f"url must be {' or '.join(endpoints)}", param="url", code="mismatched_url"
        )
    if not isinstance(body, dict):
        raise ApiError(400, "body must be a JSON object", param="body", code="invalid_body")
    return BatchRequest(custom_id, found["url"], body)


def came_before(custom_id: str, file: str = "", line: int | None = None) -> ApiError:
    """For a line whose custom_id another line has."""
    where = "" if line is None else f" in line {line:,} of {file}"
    return ApiError(
        400,
        f"custom_id {custom_id[:80]!r} came before{where}",
        param="custom_id",
        code="duplicate_custom_id",
    )


# ---- out -----------------------------------------------------------------------------------------


async def answer_line(answer: Answer, request: BatchRequest, batch: Batch) -> dict[str, Any]:
    """The line that answers a request, with a reply or with what was wrong with its body.

    Raises:
        ApiError: the queue is full (429) or no request is taken any more (503), which says nothing
            of this one.
    """
    try:
        status, reply = 200, await answer(request, batch.given(request.custom_id))
    except ApiError as error:
        if error.status in (429, 503) and error.code != "timeout":
            raise
        status, reply = error.status, error.body()
    except Exception:
        # A fault of ours in one request must not end the batch.
        log.exception("batch line %r has failed", request.custom_id)
        status, reply = 500, ApiError(500, "internal error").body()
    name = derived_id("", batch.name, request.custom_id)
    response = {"status_code": status, "request_id": f"req_{name}", "body": reply}
    return _line(batch, request.custom_id, response=response)


def refuse_line(batch: Batch, custom_id: str | None, error: ApiError, **place: Any) -> dict:
    """The line for what was never asked of the model; ``place``: where the line is."""
    what = {"code": error.code, "message": error.message, "param": error.param}
    return _line(batch, custom_id, *place.values(), error=what) | place


def has_failed(line: Mapping[str, Any]) -> bool:
    """Whether an answering line belongs into the error file."""
    response = line["response"]
    return response is None or response["status_code"] != 200


def _line(
    batch: Batch, custom_id: str | None, *more: str | int, response: Any = None, error: Any = None
) -> dict[str, Any]:
    id = derived_id("batch_req_", batch.name, custom_id or "", *more)
    return {"id": id, "custom_id": custom_id, "response": response, "error": error}
