"""The demo checkpoint for tests: opened with few shapes, and small pictures to ask about."""

import contextlib
import functools
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from demo import cells

import qwen_jax as qj
from qwen_jax.runtime import Buckets, Runtime

BUCKETS = Buckets(tokens=(256, 1024), rows=(1, 32), pages=(8,), patches=(64, 1152), segments=(64,))
OPTIONS: dict[str, Any] = {"max_num_seqs": 32, "max_model_len": 512}
GREEDY = qj.SamplingParams(temperature=0.0, max_tokens=48)


@contextlib.contextmanager
def few_shapes() -> Iterator[None]:
    """Whatever makes a `Runtime` meanwhile gets `BUCKETS`."""
    with mock.patch.object(Runtime, "make", functools.partial(Runtime.make, buckets=BUCKETS)):
        yield


def open_llm(directory: Any = qj.DEMO, **options: Any) -> qj.LLM:
    """The demo, or a copy that was changed."""
    with few_shapes():
        return qj.LLM(str(directory), **{**OPTIONS, **options})


@functools.cache
def shared_llm() -> qj.LLM:
    """The LLM for tests that leave it as it is; of one device of the eight."""
    return open_llm(mesh="tensor=1")


def picture() -> np.ndarray:
    """uint8 [96, 96, 3]: a green ring at the top left, a blue cross in the centre."""
    things = {0: ("ring", "green"), 4: ("cross", "blue")}
    return cells.draw(things, random.Random(0), side=3)
