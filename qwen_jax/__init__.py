"""Qwen3 and Qwen3-VL, dense and mixture-of-experts, as pure JAX functions.

    import qwen_jax as qj
    llm = qj.LLM("Qwen/Qwen3-0.6B")                      text in, text out (qj.DEMO: no download)
    config, params, tokenizer = qj.load("Qwen/Qwen3-0.6B")   plain pytrees
    state = qj.generate(params, config, tokens, …)       one jitted program
    experts = qj.routing(params, config, tokens)         where each token goes in each layer

Names are imported when they are first used, so that `qwen-jax --help` does not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_jax.batch.run import run_batch
    from qwen_jax.demo import DEMO
    from qwen_jax.functional import generate, load, routing
    from qwen_jax.llm import LLM
    from qwen_jax.requests import SamplingParams
    from qwen_jax.results import (
        CompletionOutput,
        Logprob,
        Metrics,
        RequestOutput,
        StreamEvent,
    )
    from qwen_jax.runtime import Runtime
    from qwen_jax.sharding import Rules

_HOME = {
    "DEMO": "demo",
    "LLM": "llm",
    "StreamEvent": "results",
    "load": "functional",
    "generate": "functional",
    "run_batch": "batch.run",
    "routing": "functional",
    "SamplingParams": "requests",
    "RequestOutput": "results",
    "CompletionOutput": "results",
    "Logprob": "results",
    "Metrics": "results",
    "Runtime": "runtime",
    "Rules": "sharding",
}

__all__ = [
    "DEMO",
    "LLM",
    "CompletionOutput",
    "Logprob",
    "Metrics",
    "RequestOutput",
    "Rules",
    "Runtime",
    "SamplingParams",
    "StreamEvent",
    "generate",
    "load",
    "routing",
    "run_batch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qwen_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qwen_jax.{_HOME[name]}"), name)
