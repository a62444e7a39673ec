"""The routes that read no state of the disk: completions, models, health, metrics, the page."""

import importlib.metadata
import importlib.resources

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from qwen_jax.openai.kinds import KINDS, Kind
from qwen_jax.server.answers import json_response, respond
from qwen_jax.server.metrics import CONTENT_TYPE
from qwen_jax.server.service import Service

# The page loads nothing from elsewhere, and nobody else may frame it.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"
)


def routes(service: Service) -> APIRouter:
    """The routes of a server."""
    router = APIRouter()
    for path, kind in KINDS.items():
        router.add_api_route(path, _generating(service, kind), methods=["POST"])

    @router.get("/v1/models")
    async def models() -> Response:
        found = [_model(service, name) for name in service.settings.model_names]
        return json_response({"object": "list", "data": found})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(_model(service, service.answerer.check_model(name)))

    @router.get("/health")
    async def health() -> Response:
        return json_response(service.health(), 503 if service.draining else 200)

    @router.get("/version")
    async def version() -> Response:
        return json_response({"version": package_version()})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @router.get("/")
    async def page() -> Response:
        text = importlib.resources.files("qwen_jax.server").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})

    return router


def _generating(service: Service, kind: Kind):
    async def generate(request: Request) -> Response:
        return await respond(service, request, kind)

    return generate


def _model(service: Service, name: str) -> dict:
    return {
        "id": name,
        "object": "model",
        "created": service.began,
        "owned_by": "qwen-jax",
        "root": service.model_name,
        "parent": None,
        "max_model_len": service.llm.max_model_len,
    }


def package_version() -> str:
    """Of this package; "unknown" in a source tree that is not installed."""
    try:
        return importlib.metadata.version("qwen-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
