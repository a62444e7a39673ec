"""One small LLM for all tests of the text layer: one layer with experts, and few shapes.

Compiling is nearly all of the time here, so every test shares these shapes: 64 tokens of a prefill
chunk, four rows. Programs are kept by JAX for the whole run, whoever made the LLM.
"""

import contextlib
import functools
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import tiny

from qwen_jax.llm import LLM
from qwen_jax.runtime import Buckets, Runtime

BUCKETS = Buckets(tokens=(64,), rows=(4,))
OPTIONS = {"mesh": "expert=1", "max_model_len": 128, "page_size": 16, "max_num_seqs": 4}
_KEPT: list[tempfile.TemporaryDirectory] = []  # until the run ends


@contextlib.contextmanager
def few_shapes() -> Iterator[None]:
    """Whatever makes a `Runtime` meanwhile gets `BUCKETS`."""
    with mock.patch.object(Runtime, "make", functools.partial(Runtime.make, buckets=BUCKETS)):
        yield


@functools.cache
def directory(*, tokenizer: bool = True, layers: int = 1) -> pathlib.Path:
    """The checkpoint; without its tokenizer the weights are the same."""
    kept = tempfile.TemporaryDirectory(prefix="tiny-llm-")
    _KEPT.append(kept)
    path = pathlib.Path(kept.name)
    changed = {**tiny.VARIANTS["moe"], "num_hidden_layers": layers}
    with mock.patch.dict(tiny.VARIANTS, {"moe": changed}):
        tiny.write_text_model(path, "moe")
    if not tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (path / name).unlink()
    return path


def open_llm(*, tokenizer: bool = True, **options: Any) -> LLM:
    """An LLM of its own, with some options changed."""
    with few_shapes():
        return LLM(str(directory(tokenizer=tokenizer)), **{**OPTIONS, **options})


@functools.cache
def shared_llm() -> LLM:
    """The LLM for tests that leave it as it is."""
    return open_llm()
