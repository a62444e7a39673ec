"""What all routes share: the model, its limits, and the requests in progress.

Knows the answerer, the gate and the end of the server; knows no route.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.requests import Request

from qwen_jax.openai.answerer import Answerer
from qwen_jax.openai.errors import shutting_down
from qwen_jax.openai.fetch import Fetcher
from qwen_jax.openai.media import MediaSource
from qwen_jax.server import limits
from qwen_jax.server.metrics import Metrics
from qwen_jax.server.settings import Settings


class Service:
    """One model and its server.

    Args:
        llm: an `LLM`: its engine, inputs, forms, tokenizer, template, config and runtime are used.
        settings: of the server.

    Attributes:
        answerer: turns bodies into replies.
        began: when, in seconds since 1970.
        draining: whether nothing more is taken.
        ends: what is to be given back in the end.
    """

    def __init__(self, llm: Any, settings: Settings):
        self.llm, self.settings = llm, settings
        self.model_name = settings.model_names[0]
        self.began = int(time.time())
        self.draining = False
        self.ends = contextlib.ExitStack()
        self.metrics = Metrics(self.model_name, llm.engine.stats)
        self.gate = limits.Gate(settings.max_requests)
        fetcher = Fetcher(
            settings.media_hosts, most=settings.max_media, timeout=settings.fetch_timeout
        )
        self.answerer = Answerer(
            llm,
            settings.model_names,
            media=MediaSource(fetcher, settings.media_folder, settings.media_limits),
            meter=self.metrics,
            request_timeout=settings.request_timeout,
            compile_timeout=settings.compile_timeout,
        )

    # ---- requests ----------------------------------------------------------------------------

    async def read(self, request: Request) -> Any:
        """The JSON of a request's body."""
        settings = self.settings
        return await limits.read_json(
            request, most=settings.max_body, timeout=settings.body_timeout
        )

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests in progress; raises ApiError 429 where there is none."""
        self.gate.enter()
        try:
            yield
        finally:
            self.gate.leave()

    # ---- the end -----------------------------------------------------------------------------

    async def drain(self) -> None:
        """Takes nothing more; waits for what runs, and fails what takes too long."""
        self.draining = True
        deadline = time.monotonic() + self.settings.shutdown_timeout
        while self.gate.inside and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.answerer.fail_all(shutting_down())

    def shut(self) -> None:
        """Ends the threads, and gives back what `ends` holds."""
        self.ends.close()
        self.answerer.shut()

    def health(self) -> Mapping[str, Any]:
        """What the server is and how busy."""
        stats = self.llm.engine.stats()
        return {
            "status": "draining" if self.draining else "ok",
            "model": self.model_name,
            "max_model_len": self.llm.max_model_len,
            "kernels": dict(self.llm.runtime.kernels),
            "load": {
                "running": stats.running,
                "waiting": stats.waiting,
                "kv_cache_usage": stats.pages_used / max(stats.pages_total, 1),
                "in_progress": self.gate.inside,
            },
        }
