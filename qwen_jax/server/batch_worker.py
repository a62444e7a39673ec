"""Works on batches, one after the other, each with several requests at once.

Knows the stores and how a body is answered; knows no HTTP. A request is done when its line is on
the disk, and never before; what a stop or a crash leaves undone is done after the restart.
"""

import asyncio
import functools
import logging
import pathlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

from qwen_jax import durable
from qwen_jax.openai.errors import ApiError, encode
from qwen_jax.openai.ids import new_id
from qwen_jax.server import batches
from qwen_jax.server.batches import BatchStore, Line
from qwen_jax.server.files import FileStore

log = logging.getLogger(__name__)

Answer = Callable[[str, Any], Awaitable[dict[str, Any]]]
"""(endpoint, body) -> the reply; raises ApiError."""

_RETRY = 0.2  # seconds until a request that found the queue full is tried again


class BatchWorker:
    """Runs the batches of a store.

    Args:
        store, files: where batches and files are.
        answer: answers one request.
        concurrency: requests at once.
        max_lines: requests of a batch.
    """

    def __init__(
        self,
        store: BatchStore,
        files: FileStore,
        answer: Answer,
        *,
        concurrency: int,
        max_lines: int,
    ):
        self._store, self._files, self._answer = store, files, answer
        self._concurrency, self._max_lines = concurrency, max_lines
        self._wake = asyncio.Event()
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        """Goes on with what an earlier run left."""
        self._task = asyncio.create_task(self._run())

    def wake(self) -> None:
        """There is a new batch, or one to be cancelled."""
        self._wake.set()

    async def stop(self) -> None:
        """Leaves what is undone for the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            for batch in self._store.unfinished():
                try:
                    await self._work_on(batch)
                except (OSError, ApiError) as error:
                    log.exception("batch %s failed", batch["id"])
                    self._fail(batch, [{"code": "failed", "message": str(error)}])
            await self._wake.wait()

    async def _work_on(self, batch: dict[str, Any]) -> None:
        path = self._files.path(batch["input_file_id"])
        read = functools.partial(
            batches.read_lines, path, endpoint=batch["endpoint"], most=self._max_lines
        )
        lines, problems = await asyncio.to_thread(read)
        if problems:
            self._fail(batch, problems)
            return
        paths = self._store.results(batch)
        good, bad = await asyncio.to_thread(batches.finished, paths)
        counts = {"total": len(lines), "completed": len(good), "failed": len(bad)}
        batch["request_counts"] = counts
        if batch["status"] == "validating":
            self._store.move(batch, "in_progress")
        if batch["status"] == "in_progress":
            done = {*good, *bad}
            await self._work_off(
                batch, path, [line for line in lines if line.custom_id not in done]
            )
        self._finalize(batch)

    async def _work_off(self, batch: dict[str, Any], path: pathlib.Path, left: list[Line]) -> None:
        """Answers all lines that are left, until the batch is cancelled or expires."""
        waiting = iter(left)
        async with _Results(self._store.results(batch)) as results:

            async def work() -> None:
                for line in waiting:
                    if batch["status"] != "in_progress":
                        return
                    found = await self._answer_line(batch, path, line)
                    await results.add(found)
                    batch["request_counts"]["failed" if _failed(found) else "completed"] += 1

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._concurrency):
                        group.create_task(work())
            except* OSError as errors:
                raise OSError(f"cannot write results: {errors.exceptions[0]}") from errors

    async def _answer_line(
        self, batch: dict[str, Any], path: pathlib.Path, line: Line
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"id": new_id("batch_req_"), "custom_id": line.custom_id}
        if time.time() > batch["expires_at"]:
            error = {"code": "batch_expired", "message": "the batch's time was over before"}
            return {**found, "response": None, "error": error}
        raw = await asyncio.to_thread(_read, path, line)
        body = batches.parse_line(raw)["body"]
        while True:
            try:
                status, reply = 200, await self._answer(batch["endpoint"], body)
            except ApiError as error:
                if error.status in (429, 503) and error.code != "timeout":
                    # Of no concern to the batch: it waits, or goes on after the restart.
                    await asyncio.sleep(_RETRY)
                    continue
                status, reply = error.status, error.body()
            response = {"status_code": status, "request_id": new_id("req_"), "body": reply}
            return {**found, "response": response, "error": None}

    def _finalize(self, batch: dict[str, Any]) -> None:
        """Hands the results over as files; may be repeated after a crash in the middle."""
        ending = {"cancelling": "cancelled"}.get(batch["status"], "completed")
        expired = time.time() > batch["expires_at"]
        outputs = self._store.results(batch)
        for path, name in zip(outputs, ("output_file_id", "error_file_id"), strict=True):
            if path.exists() and path.stat().st_size and batch[name] is None:
                batch[name] = new_id("file-")
        if batch["status"] == "in_progress":
            self._store.move(batch, "finalizing")
        else:
            self._store.save(batch)
        for path, name in zip(outputs, ("output", "error"), strict=True):
            if batch[f"{name}_file_id"] is not None:
                self._files.adopt(
                    path,
                    filename=f"{batch['id']}_{name}.jsonl",
                    purpose="batch_output",
                    id=batch[f"{name}_file_id"],
                )
        counts = batch["request_counts"]
        if expired and counts["failed"] and ending == "completed":
            ending = "expired"
        self._store.move(batch, ending)
        for path in outputs:
            path.unlink(missing_ok=True)

    def _fail(self, batch: dict[str, Any], problems: list[dict[str, Any]]) -> None:
        batch["errors"] = {"object": "list", "data": problems}
        self._store.move(batch, "failed")


class _Results:
    """Appends finished lines to the output and the error file; lines that come together are made
    durable together."""

    def __init__(self, paths: tuple[pathlib.Path, pathlib.Path]):
        self._paths = paths
        self._lock = asyncio.Lock()
        self._new: list[dict[str, Any]] = []
        self._writing: asyncio.Future[None] | None = None

    async def __aenter__(self) -> "_Results":
        self._files = [open(path, "ab") for path in self._paths]  # noqa: SIM115
        durable.sync_folder(self._paths[0].parent)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._writing is not None:
            await asyncio.wait((self._writing,))
        for file in self._files:
            file.close()

    async def add(self, found: dict[str, Any]) -> None:
        """Returns when the line is on the disk."""
        self._new.append(found)
        async with self._lock:
            if self._new:
                new, self._new = self._new, []
                self._writing = asyncio.ensure_future(asyncio.to_thread(self._write, new))
                # A stop does not cut it off in the middle.
                await asyncio.shield(self._writing)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        for index, file in enumerate(self._files):
            own = [line for line in lines if _failed(line) == bool(index)]
            if own:
                file.write(b"".join(encode(line) + b"\n" for line in own))
                durable.sync(file)


def _failed(line: dict[str, Any]) -> bool:
    response = line["response"]
    return response is None or response["status_code"] != 200


def _read(path: pathlib.Path, line: Line) -> bytes:
    with open(path, "rb") as file:
        file.seek(line.start)
        return file.read(line.size)
