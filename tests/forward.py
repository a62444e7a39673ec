"""Runs the model the way the parity tests ask for it: several prompts as rows of one ragged batch.

Knows `step` and the paged cache; knows neither transformers nor golden files. Pages are handed out
in no order, and every page starts as NaN, so that a read of anything not written shows.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.model.cache import KVCache, make_cache, pack
from qwen_jax.model.step import StepOut
from qwen_jax.runtime import Runtime
from qwen_jax.weights.checkpoint import Loaded

PAGE_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Run:
    """Logits of every prompt position, one [T, V] per prompt, and greedy tokens [B, new]."""

    logits: list[np.ndarray]
    tokens: np.ndarray


def one_device() -> Runtime:
    """Float32 on a single device: nothing but the model itself between us and the reference."""
    return Runtime.make(dtype="float32", page_size=PAGE_SIZE, devices=jax.devices()[:1])


def poisoned_cache(loaded: Loaded, runtime: Runtime, num_pages: int) -> KVCache:
    """A cache that holds NaN wherever nothing was written."""
    cache = make_cache(loaded.config.text, runtime, num_pages)
    return jax.tree.map(lambda pages: jnp.full_like(pages, jnp.nan), cache)


def page_table(rows: int, width: int) -> np.ndarray:
    """Pages of each row, all different and in no order: int32 [rows, width]."""
    return np.random.default_rng(0).permutation(rows * width).reshape(rows, width).astype(np.int32)


def table_for(prompts: Sequence[np.ndarray], new_tokens: int) -> np.ndarray:
    """A page table with room for every prompt and what is generated behind it."""
    longest = max(len(prompt) for prompt in prompts) + new_tokens
    return page_table(len(prompts), -(-longest // PAGE_SIZE))


def step_tokens(prompts: Sequence[np.ndarray]) -> int:
    """T of a step with all prompts, and three tokens of padding."""
    return sum(len(prompt) for prompt in prompts) + 3


def run(
    loaded: Loaded,
    runtime: Runtime,
    prompts: Sequence[np.ndarray],
    new_tokens: int,
    *,
    step: Callable[..., StepOut],
    decode_tokens: int,
) -> Run:
    """Prefills all prompts in one step, then decodes all rows greedily, one token a step each.

    Args:
        loaded, runtime: the model.
        prompts: int32 [T] each.
        new_tokens: to generate per row.
        step: `jit_step` for one program per shape, or `step`, which compiles equal layers once.
        decode_tokens: T of the decode steps. The number of prompts gives the narrow form of
            decoding; `step_tokens` of them needs no compilation beside prefill's.
    """
    lengths = [len(prompt) for prompt in prompts]
    table = table_for(prompts, new_tokens)
    cache = poisoned_cache(loaded, runtime, table.size)
    batch = pack(prompts, [0] * len(prompts), table, num_tokens=step_tokens(prompts))
    out = step(loaded.params, loaded.config, runtime, batch, cache, logits="all")
    logits = np.split(np.asarray(out.logits), np.cumsum(lengths))[:-1]
    tokens = [[int(rows[-1].argmax())] for rows in logits]
    for done in range(1, new_tokens):
        cached = [length + done - 1 for length in lengths]
        newest = [row[-1:] for row in tokens]
        batch = pack(newest, cached, table, num_tokens=decode_tokens)
        out = step(loaded.params, loaded.config, runtime, batch, out.cache, logits="all")
        best = np.asarray(out.logits).argmax(-1)[: len(prompts)]
        for row, token in zip(tokens, best, strict=True):
            row.append(int(token))
    return Run(logits, np.array(tokens, np.int32))
