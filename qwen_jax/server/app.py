"""The application, put together: routes, errors, keys, and what happens at the start and the end.

service, app = make_app(llm, Settings(model_names=("m",)))
Server(uvicorn.Config(app, …), service).run()
"""

import contextlib
import functools
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from qwen_jax.openai.errors import ApiError
from qwen_jax.openai.kinds import answer
from qwen_jax.server.answers import json_response
from qwen_jax.server.batch_worker import BatchWorker
from qwen_jax.server.guard import Guard
from qwen_jax.server.routes import package_version, routes
from qwen_jax.server.service import Service
from qwen_jax.server.settings import Settings
from qwen_jax.server.storage import Storage
from qwen_jax.server.storage_routes import batch_routes, file_routes


def make_app(
    llm: Any, settings: Settings, storage: Storage | None = None
) -> tuple[Service, ASGIApp]:
    """A server for a model, whose engine runs already.

    storage: of ``settings.state``, if that was opened before the model was loaded: whoever opened
        it closes it. One that is opened here is closed when the service is shut.

    Raises:
        ValueError: the directory for files and batches is in use, or a file in it is damaged.
    """
    service = Service(llm, settings)
    with contextlib.ExitStack() as unless_made:
        unless_made.callback(service.shut)
        if storage is None and settings.state is not None:
            storage = Storage.open(settings.state)
            service.ends.callback(storage.close)
        app = _make_app(service, storage)
        unless_made.pop_all()
    return service, app


def _make_app(service: Service, storage: Storage | None) -> ASGIApp:
    settings, worker = service.settings, None
    app = FastAPI(
        title="qwen-jax",
        version=package_version(),
        lifespan=lambda _: _lifespan(service, worker),
        openapi_url=None,  # OpenAI's own description of its API is the one that holds
    )
    app.include_router(routes(service))
    if storage is not None:
        files, batches = storage.files, storage.batches
        worker = _worker(service, storage)
        app.include_router(file_routes(service, files, batches, storage.folder))
        app.include_router(batch_routes(service, files, batches, worker))
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _fault)
    return Guard(
        app,
        api_keys=settings.api_keys,
        draining=lambda: service.draining,
        answered=service.metrics.answered,
    )


def _worker(service: Service, storage: Storage) -> BatchWorker:
    return BatchWorker(
        storage.batches,
        storage.files,
        functools.partial(answer, service.answerer),
        concurrency=service.settings.batch_concurrency,
        max_lines=service.settings.max_batch_lines,
    )


@contextlib.asynccontextmanager
async def _lifespan(service: Service, worker: BatchWorker | None) -> AsyncIterator[None]:
    if worker is not None:
        worker.start()
    try:
        yield
    finally:
        if worker is not None:
            await worker.stop()
        service.shut()


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return json_response(error.body(), error.status, error.headers())


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router says: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    about = f"{request.method} {request.url.path[:200]}"
    message = {404: f"there is no route {about}", 405: f"not allowed: {about}"}
    found = ApiError(error.status_code, message.get(error.status_code, str(error.detail)))
    return json_response(found.body(), found.status, dict(error.headers or {}))


async def _fault(request: Request, error: Exception) -> Response:
    """A fault of ours; the log has its traceback, the client nothing of it."""
    return json_response(ApiError(500, "internal error").body(), 500)


class Server(uvicorn.Server):
    """Finishes or fails every request before it stops taking connections."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: Any = None) -> None:
        if not self.force_exit:
            await self._service.drain()
        await super().shutdown(sockets)
