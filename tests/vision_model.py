"""A tiny Qwen3-VL for the tests: its cases, and what the model makes of them position by position.

Knows `LLM`, the tower and `step`; knows neither transformers nor golden files.
"""

import contextlib
import functools
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import tiny
import vision_samples as samples

from qwen_jax.engine.pictures import positions_of, visual_rows
from qwen_jax.llm import LLM
from qwen_jax.model.cache import make_cache, pack
from qwen_jax.model.step import jit_step
from qwen_jax.requests import Prompt
from qwen_jax.runtime import Buckets, Runtime

IMAGE, VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
# Prompt, images (height, width), videos (frames, height, width). Sizes are multiples of 32, so that
# nothing is resized, but for "resized".
CASES: dict[str, tuple[str, list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "one image": (f"look {IMAGE} what", [(64, 96)], []),
    "odd grid": (f"{IMAGE}hello", [(96, 160)], []),
    "resized": (f"see {IMAGE} print", [(77, 131)], []),
    "two images": (f"a {IMAGE} and {IMAGE} in the end", [(64, 64), (32, 160)], []),
    "images that touch": (f"{IMAGE}{IMAGE}", [(32, 32), (96, 64)], []),
    "text only": ("hello in the world, return", [], []),
    "video, even": (f"clip {VIDEO} ends", [], [(4, 64, 64)]),
    "video, odd": (f"clip {VIDEO} ends", [], [(5, 32, 96)]),
    "image and video": (f"one {IMAGE} then {VIDEO} what", [(64, 96)], [(4, 64, 32)]),
}
BUCKETS = Buckets(tokens=(64,), rows=(4,), patches=(256,), segments=(8,))
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "page_size": 16,
    "max_num_seqs": 4,
}
_KEPT: list[tempfile.TemporaryDirectory] = []  # until the run ends


@contextlib.contextmanager
def few_shapes() -> Iterator[None]:
    """Whatever makes a `Runtime` meanwhile gets `BUCKETS`."""
    with mock.patch.object(Runtime, "make", functools.partial(Runtime.make, buckets=BUCKETS)):
        yield


@functools.cache
def directory(variant: str) -> pathlib.Path:
    """The checkpoint."""
    kept = tempfile.TemporaryDirectory(prefix="tiny-vision-")
    _KEPT.append(kept)
    return tiny.write_vision_model(kept.name, variant)


def open_llm(variant: str, **options: Any) -> LLM:
    """An LLM of its own, on one device unless told."""
    with few_shapes():
        return LLM(str(directory(variant)), **{"mesh": "tensor=1", **OPTIONS, **options})


@functools.cache
def shared_llm(variant: str = "vl_moe") -> LLM:
    """The LLM for tests that leave it as it is."""
    return open_llm(variant)


def request(case: str) -> dict[str, Any]:
    """What `LLM.generate` takes."""
    text, images, videos = CASES[case]
    data: dict[str, list[Any]] = {
        "image": [samples.noise(*size, 3, seed=i) for i, size in enumerate(images)],
        "video": [
            (
                samples.noise(*size, 3, seed=20 + i),
                {
                    "fps": 4.0,
                    "frames_indices": list(range(size[0])),
                    "total_num_frames": size[0],
                },
            )
            for i, size in enumerate(videos)
        ],
    }
    data = {kind: sources for kind, sources in data.items() if sources}
    return {"prompt": text, "multi_modal_data": data} if data else {"prompt": text}


def prompt(llm: LLM, case: str) -> Prompt:
    """The same, as the engine gets it."""
    return llm.inputs.prompt(request(case))


def logits(llm: LLM, given: Prompt, *, deepstack: bool = True) -> np.ndarray:
    """float32 [T, V] of every position of a prompt."""
    size, vision = 64, given.vision
    features = vision and llm.engine.runner.views.store.of(vision.pictures)
    window = (0, len(given.token_ids))
    visual = visual_rows([vision], [features], [window], size)
    if visual is not None and not deepstack:
        visual = visual.replace(levels=0 * visual.levels)
    pages = np.arange(size // llm.runtime.page_size, dtype=np.int32)[None]
    batch = pack(
        [given.token_ids], [0], pages, num_tokens=size, positions=[positions_of(vision, window)]
    ).replace(visual=visual)
    cache = make_cache(llm.config.text, llm.runtime, pages.size)
    out = jit_step(llm.params, llm.config, llm.runtime, batch, cache, logits="all")
    return jax.device_get(out.logits)[: len(given.token_ids)]
