"""Works on batches, one after the other, each with several requests at once.

Knows the stores and how a body is answered; knows no HTTP. A request is done when its line is on
the disk, and never before; what a stop or a crash leaves undone is done after the restart.
"""

import asyncio
import functools
import logging
import pathlib
import time
from typing import Any

from qwen_jax.openai.batch_lines import (
    Answer,
    Batch,
    answer_line,
    has_failed,
    parse_line,
    read_request,
    refuse_line,
)
from qwen_jax.openai.batch_results import Results
from qwen_jax.openai.errors import ApiError
from qwen_jax.openai.ids import new_id
from qwen_jax.server import batches
from qwen_jax.server.batches import BatchStore, Line
from qwen_jax.server.files import FileStore

log = logging.getLogger(__name__)

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
        self._store.tidy()
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
                except (OSError, ValueError, ApiError) as error:
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
        async with Results(self._store.results(batch)) as results:

            async def work() -> None:
                for line in waiting:
                    if batch["status"] != "in_progress":
                        return
                    found = await self._answer_line(batch, path, line)
                    await results.add(found)
                    batch["request_counts"]["failed" if has_failed(found) else "completed"] += 1

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._concurrency):
                        group.create_task(work())
            except* OSError as errors:
                raise OSError(f"cannot write results: {errors.exceptions[0]}") from errors

    async def _answer_line(
        self, batch: dict[str, Any], path: pathlib.Path, line: Line
    ) -> dict[str, Any]:
        of = Batch(batch["id"], 0, batch["created_at"])
        if time.time() > batch["expires_at"]:
            expired = ApiError(400, "the batch's time was over before", code="batch_expired")
            return refuse_line(of, line.custom_id, expired)
        raw = await asyncio.to_thread(_read, path, line)
        request = read_request(parse_line(raw))
        while True:
            try:
                return await answer_line(self._answer, request, of)
            except ApiError:
                # Of no concern to the line: it waits, or goes on after the restart.
                await asyncio.sleep(_RETRY)

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
        self._store.tidy()

    def _fail(self, batch: dict[str, Any], problems: list[dict[str, Any]]) -> None:
        batch["errors"] = {"object": "list", "data": problems}
        self._store.move(batch, "failed")


def _read(path: pathlib.Path, line: Line) -> bytes:
    with open(path, "rb") as file:
        file.seek(line.start)
        return file.read(line.size)
