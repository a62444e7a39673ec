"""Batches as they are kept: OpenAI's batch objects, their input, and how far they are.

Knows the disk and the lines of a batch; knows neither model nor HTTP. Everything that must survive
a crash is a file: the object, and one line for each finished request, in an output and an error
file that are only appended to.
"""

import dataclasses
import pathlib
import re
import time
from collections.abc import Collection
from typing import Any

from qwen_jax import durable
from qwen_jax.openai.batch_lines import came_before, parse_line, read_request
from qwen_jax.openai.batch_results import read_results
from qwen_jax.openai.errors import ApiError
from qwen_jax.openai.ids import new_id

OPEN = ("validating", "in_progress", "finalizing", "cancelling")
DELIVERED = ("completed", "expired", "cancelled")
_ID = re.compile(r"batch_[0-9a-f]{32}")
_MAX_ERRORS = 50


@dataclasses.dataclass(frozen=True)
class Line:
    """A request of a batch: its id, and where it is in the input."""

    custom_id: str
    start: int
    size: int


class BatchStore:
    """The batches in a directory, which is made where it is missing."""

    def __init__(self, folder: pathlib.Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._known: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("batch_*.json")):
            self._known[path.stem] = durable.load_json(
                path,
                ("id", "status", "input_file_id", "created_at", "request_counts"),
                f"put it back as it was, or move it away: there is no such batch then, and its "
                f"answers stay in {path.stem}.output and .errors",
            )

    def create(
        self, *, input_file_id: str, endpoint: str, window: str, seconds: int, metadata: Any
    ) -> dict[str, Any]:
        """A new batch, durable at once."""
        now = int(time.time())
        moments = "in_progress finalizing completed failed expired cancelling cancelled"
        batch = {
            "id": new_id("batch_"),
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": input_file_id,
            "completion_window": window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + seconds,
            **{f"{moment}_at": None for moment in moments.split()},
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
        }
        self.save(batch)
        return batch

    def save(self, batch: dict[str, Any]) -> None:
        """Makes the state of a batch durable."""
        durable.save_json(self._folder / f"{batch['id']}.json", batch)
        self._known[batch["id"]] = batch

    def move(self, batch: dict[str, Any], status: str) -> None:
        """Gives a batch a new status, durably."""
        batch["status"] = status
        batch[f"{status}_at"] = int(time.time())
        self.save(batch)

    def get(self, id: str) -> dict[str, Any]:
        """A batch; ApiError 404 where there is none."""
        found = self._known.get(id) if _ID.fullmatch(id) else None
        if found is None:
            raise ApiError(404, f"there is no batch {id[:80]!r}", param="batch_id")
        return found

    def newest_first(self) -> list[dict[str, Any]]:
        """All batches, the newest first."""
        return sorted(self._known.values(), key=lambda b: (-b["created_at"], b["id"]))

    def unfinished(self) -> list[dict[str, Any]]:
        """Those that are still to be worked on, the oldest first."""
        return [batch for batch in reversed(self.newest_first()) if batch["status"] in OPEN]

    def results(self, batch: dict[str, Any]) -> tuple[pathlib.Path, pathlib.Path]:
        """(outputs, errors): the files that its finished lines are appended to."""
        at = self._folder / batch["id"]
        return at.with_suffix(".output"), at.with_suffix(".errors")

    def tidy(self) -> None:
        """Removes results that were handed over as files: a crash just then leaves them."""
        for batch in self._known.values():
            if batch["status"] in DELIVERED:
                for path in self.results(batch):
                    path.unlink(missing_ok=True)


def read_lines(
    path: pathlib.Path, *, endpoint: str, most: int
) -> tuple[list[Line], list[dict[str, Any]]]:
    """(the requests of an input file, what is wrong with it)."""
    lines: list[Line] = []
    problems: list[dict[str, Any]] = []
    seen: set[str] = set()
    start = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                if raw.strip():
                    lines.append(_line(raw, start, endpoint, seen))
                if len(lines) > most:
                    raise ApiError(400, f"more than {most:,} requests", code="too_many_requests")
            except ApiError as error:
                problems.append(_problem(error, number))
            start += len(raw)
            if len(problems) >= _MAX_ERRORS or len(lines) > most:
                break
    if not lines and not problems:
        problems.append(_problem(ApiError(400, "the file holds no request", code="empty_file"), 1))
    return lines, problems


def _line(raw: bytes, start: int, endpoint: str, seen: set[str]) -> Line:
    custom_id = read_request(parse_line(raw), (endpoint,)).custom_id
    if custom_id in seen:
        raise came_before(custom_id)
    seen.add(custom_id)
    return Line(custom_id, start, len(raw))


def _problem(error: ApiError, number: int) -> dict[str, Any]:
    return {
        "code": error.code,
        "line": number,
        "message": error.message,
        "param": error.param,
    }


def finished(paths: Collection[pathlib.Path]) -> list[list[str]]:
    """The custom_ids that each of the files holds; what is torn at their ends is cut off."""
    return [[line["custom_id"] for line in read_results(path)] for path in paths]
