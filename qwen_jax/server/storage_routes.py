"""/v1/files and /v1/batches. Knows HTTP and the stores; knows no model."""

import asyncio
import functools
import re
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

import pydantic
from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import FileResponse, Response

from qwen_jax.openai.checks import validate
from qwen_jax.openai.errors import ApiError
from qwen_jax.openai.protocol import Strict, known_fields
from qwen_jax.server.answers import json_response
from qwen_jax.server.batch_worker import BatchWorker
from qwen_jax.server.batches import OPEN, BatchStore
from qwen_jax.server.files import PURPOSES, FileStore, free_space, page_of
from qwen_jax.server.limits import too_large, within
from qwen_jax.server.service import Service

_WINDOW = re.compile(r"([1-9]\d{0,3})([hd])")
_MOST_SHOWN = 10_000
_MARGIN = 64 * 2**20  # bytes of the disk that uploads leave free
_FRAMING = 64 * 1024  # of a form around its file


class BatchRequest(Strict):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Annotated[str, pydantic.Field(max_length=8)]
    metadata: dict[str, str] | None = None
    output_expires_after: Any = None

    @property
    def seconds(self) -> int:
        """The window; OpenAI knows "24h" only."""
        found = _WINDOW.fullmatch(self.completion_window)
        assert found is not None
        return int(found[1]) * {"h": 3600, "d": 86400}[found[2]]

    @pydantic.field_validator("output_expires_after")
    @classmethod
    def _no_end(cls, after: Any) -> None:
        if after is not None:
            raise ValueError("output_expires_after is not supported: files stay until deleted")

    @pydantic.field_validator("completion_window")
    @classmethod
    def _window(cls, text: str) -> str:
        if not _WINDOW.fullmatch(text):
            raise ValueError('completion_window is a number of hours or days: "24h", "7d"')
        return text


def file_routes(service: Service, files: FileStore, batches: BatchStore, folder: Any) -> APIRouter:
    """/v1/files; ``folder`` is where the disk must have room."""
    router = APIRouter()
    limit = service.settings.max_upload

    @router.post("/v1/files")
    async def upload(request: Request) -> Response:
        announced = request.headers.get("content-length", "")
        size = int(announced) if announced.isdigit() else 0
        if size > limit + _FRAMING:
            raise too_large(limit)
        if free_space(folder) < size + _MARGIN:
            raise ApiError(503, "the server's disk is full", code="disk_full")
        with service.place():
            form = await _form(request, limit, service.settings.body_timeout)
            try:
                return json_response(await asyncio.to_thread(_keep, files, form))
            finally:
                await form.close()

    @router.get("/v1/files")
    async def list_files(request: Request) -> Response:
        query = _query(request, "purpose", "after", "limit", "order")
        found = files.newest_first()
        if "purpose" in query:
            found = [file for file in found if file["purpose"] == query["purpose"]]
        if query.get("order", "desc") == "asc":
            found.reverse()
        return json_response(_page(found, query))

    @router.get("/v1/files/{id}")
    async def get_file(id: str) -> Response:
        return json_response(files.get(id))

    @router.get("/v1/files/{id}/content")
    async def get_content(id: str) -> Response:
        return FileResponse(files.path(id), media_type="application/octet-stream")

    @router.delete("/v1/files/{id}")
    async def delete_file(id: str) -> Response:
        using = [b["id"] for b in batches.unfinished() if b["input_file_id"] == id]
        if using:
            raise ApiError(400, f"batch {using[0]} still reads this file: cancel it first")
        await asyncio.to_thread(files.delete, id)
        return json_response({"id": id, "object": "file", "deleted": True})

    return router


def batch_routes(
    service: Service, files: FileStore, batches: BatchStore, worker: BatchWorker
) -> APIRouter:
    """/v1/batches."""
    router = APIRouter()

    @router.post("/v1/batches")
    async def create_batch(request: Request) -> Response:
        body = validate(BatchRequest, await service.read(request), known_fields(BatchRequest))
        if files.get(body.input_file_id)["purpose"] != "batch":
            raise ApiError(
                400, 'the file must have been uploaded with purpose "batch"', param="input_file_id"
            )
        batch = batches.create(
            input_file_id=body.input_file_id,
            endpoint=body.endpoint,
            window=body.completion_window,
            seconds=body.seconds,
            metadata=body.metadata,
        )
        worker.wake()
        return json_response(batch)

    @router.get("/v1/batches")
    async def list_batches(request: Request) -> Response:
        return json_response(_page(batches.newest_first(), _query(request, "after", "limit")))

    @router.get("/v1/batches/{id}")
    async def get_batch(id: str) -> Response:
        return json_response(batches.get(id))

    @router.post("/v1/batches/{id}/cancel")
    async def cancel_batch(id: str) -> Response:
        batch = batches.get(id)
        if batch["status"] in ("validating", "in_progress"):
            batches.move(batch, "cancelling")
            worker.wake()
        elif batch["status"] not in OPEN:
            raise ApiError(400, f"the batch is {batch['status']} already")
        return json_response(batch)

    return router


async def _form(request: Request, limit: int, timeout: float) -> Any:
    """The form of an upload; its file is on the disk, not in memory."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(400, "send the file as multipart/form-data, with its purpose")
    stream = within(request.stream(), most=limit + _FRAMING, timeout=timeout)
    parser = MultiPartParser(request.headers, _cut_off(stream), max_files=1, max_fields=16)
    try:
        return await parser.parse()
    except _CutOff as error:
        raise error.reason from None
    except (MultiPartException, KeyError, ValueError) as error:
        raise ApiError(400, f"the form cannot be read: {error}") from None


class _CutOff(MultiPartException):
    """An `ApiError` on its way through the parser, which closes its files for its own kind only."""

    def __init__(self, reason: ApiError):
        super().__init__(reason.message)
        self.reason = reason


async def _cut_off(stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        async for part in stream:
            yield part
    except ApiError as error:
        raise _CutOff(error) from None


def _keep(files: FileStore, form: Any) -> dict[str, Any]:
    known = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
    unknown = sorted(set(form.keys()) - set(known))
    if unknown:
        raise ApiError(400, f"unknown field {unknown[0][:80]!r}", param=unknown[0][:80])
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise ApiError(400, "the form holds no file", param="file")
    if purpose not in PURPOSES:
        raise ApiError(400, f"purpose must be one of {', '.join(PURPOSES)}", param="purpose")
    name = (file.filename or "file")[:255]
    return files.copy(file.file, filename=name, purpose=purpose)


def _query(request: Request, *known: str) -> dict[str, str]:
    unknown = sorted(set(request.query_params) - set(known))
    if unknown:
        raise ApiError(400, f"unknown parameter {unknown[0][:80]!r}", param=unknown[0][:80])
    return dict(request.query_params)


def _page(items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    text = query.get("limit", str(_MOST_SHOWN))
    if not text.isdecimal() or not 1 <= int(text[:9]) <= _MOST_SHOWN:
        raise ApiError(400, f"limit must be 1 .. {_MOST_SHOWN}, got {text[:40]!r}", param="limit")
    make = functools.partial(page_of, items, after=query.get("after"), limit=int(text))
    return make()
