"""Prometheus metrics, under the names that dashboards for vLLM read, and some of our own.

Knows names, buckets and the engine's counts; knows no request. Source of the names: vLLM's
documentation of its production metrics (V1 engine).
"""

from collections.abc import Callable, Iterator
from typing import Any

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from qwen_jax.requests import SamplingParams
from qwen_jax.results import RequestOutput

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_FIRST = (*_SECONDS, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
_NEXT = (*_NEXT, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_WHOLE = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
_WHOLE = (*_WHOLE, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
_FEW = (1, 2, 5, 10, 20)


class Metrics:
    """What a server counts. ``stats`` gives the engine's numbers when they are asked for."""

    def __init__(self, model: str, stats: Callable[[], Any]):
        self._registry = prometheus.CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self._registry.register(_OfEngine(stats, self._labels))
        histogram = self._histogram
        self._first = histogram("vllm:time_to_first_token_seconds", "until the first token", _FIRST)
        self._next = histogram("vllm:inter_token_latency_seconds", "between two tokens", _NEXT)
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "of a request, on average", _NEXT
        )
        self._whole = histogram("vllm:e2e_request_latency_seconds", "of a request", _WHOLE)
        self._decode = histogram(
            "vllm:request_decode_time_seconds", "from the first token to the last", _WHOLE
        )
        self._prompt = histogram("vllm:request_prompt_tokens", "tokens of a prompt", _TOKENS)
        self._output = histogram("vllm:request_generation_tokens", "tokens of an answer", _TOKENS)
        self._n = histogram("vllm:request_params_n", "the parameter n", _FEW)
        self._max = histogram("vllm:request_params_max_tokens", "the parameter", _TOKENS)
        self._success = prometheus.Counter(
            "vllm:request_success",
            "requests that came to their end",
            [*self._labels, "finished_reason"],
            registry=self._registry,
        )
        self._answers = prometheus.Counter(
            "qwen_jax:http_responses", "answers", ["route", "status"], registry=self._registry
        )

    def first_token(self, seconds: float) -> None:
        """The first token of a prompt came."""
        self._first.observe(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """Later tokens came, each after ``seconds`` on average."""
        for _ in range(count):
            self._next.observe(seconds)

    def finished(
        self, result: RequestOutput, params: SamplingParams, *, seconds: float, decoding: float
    ) -> None:
        """A prompt came to its end."""
        tokens = sum(len(output.token_ids) for output in result.outputs)
        self._whole.observe(seconds)
        self._decode.observe(decoding)
        self._prompt.observe(len(result.prompt_token_ids))
        self._output.observe(tokens)
        self._n.observe(params.n)
        if params.max_tokens is not None:
            self._max.observe(params.max_tokens)
        later = tokens - len(result.outputs)
        if later > 0:
            self._per_token.observe(decoding / (later / len(result.outputs)))
        for output in result.outputs:
            reason = output.finish_reason or "abort"
            self._success.labels(**self._labels, finished_reason=reason).inc()

    def answered(self, route: str, status: int) -> None:
        """A response began."""
        self._answers.labels(route=route, status=str(status)).inc()

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return prometheus.generate_latest(self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Any:
        whole = prometheus.Histogram(
            name, about, list(self._labels), buckets=buckets, registry=self._registry
        )
        return whole.labels(**self._labels)


class _OfEngine(Collector):
    """The engine's own counts, read when they are asked for."""

    def __init__(self, stats: Callable[[], Any], labels: dict[str, str]):
        self._stats, self._labels = stats, labels

    def describe(self) -> list[Any]:
        return []  # do not ask the engine while it is being built

    def collect(self) -> Iterator[Any]:
        now = self._stats()
        used = now.pages_used / max(now.pages_total, 1)
        gauges = {
            "vllm:num_requests_running": (now.running, "requests in the batch"),
            "vllm:num_requests_waiting": (now.waiting, "requests that wait for a place"),
            "vllm:kv_cache_usage_perc": (used, "pages of the cache in use; 1 is all"),
            "qwen_jax:kv_pages": (now.pages_total, "pages of the cache"),
            "qwen_jax:kv_pages_cached": (now.pages_cached, "free pages that a prompt may find"),
        }
        counters = {
            "vllm:prompt_tokens": (now.prompt_tokens, "tokens of prompts"),
            "vllm:generation_tokens": (now.generated_tokens, "tokens of answers"),
            "vllm:prefix_cache_queries": (now.prompt_tokens, "tokens looked for in the cache"),
            "vllm:prefix_cache_hits": (now.prefix_hit_tokens, "tokens found in the cache"),
            "vllm:num_preemptions": (now.preemptions, "times that a request gave its pages up"),
        }
        for kind, found in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (value, about) in found.items():
                family = kind(name, about, labels=list(self._labels))
                family.add_metric(list(self._labels.values()), value)
                yield family
