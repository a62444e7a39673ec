"""A server for tests: in this process by ASGI, or on a socket of 127.0.0.1."""

import asyncio
import contextlib
import threading

import httpx
import uvicorn

from qwen_jax.server.app import Server, make_app
from qwen_jax.server.settings import Settings


def settings(**changes) -> Settings:
    return Settings(**{"model_names": ("tiny", "alias"), "request_timeout": 20.0, **changes})


@contextlib.contextmanager
def running(llm, **changes):
    """Serves on a free port; gives the server, whose ``url`` says where."""
    service, app = make_app(llm, settings(**changes))
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="on")
    server = Server(config, service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}"
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server does not stop"


def ask(llm, method, path, *, headers=None, **content):
    """One request, without a socket; ``settings`` may be among the arguments."""
    changes = content.pop("settings", {})
    service, app = make_app(llm, settings(**changes))

    async def go():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers, **content)

    try:
        return asyncio.run(go())
    finally:
        service.shut()


def events(response) -> list[str]:
    """The data of a stream's events, after checking how they are framed."""
    assert response.headers["content-type"].startswith("text/event-stream")
    whole = response.text
    assert whole.endswith("\n\n")
    found = whole[:-2].split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in found)
    return [event.removeprefix("data: ") for event in found]
