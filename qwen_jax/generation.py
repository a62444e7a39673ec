"""The functional generate loop: one jitted program that prefills and then decodes to the end.

Knows token ids, arrays and when a row stops; knows no text and no requests. The loop's whole memory
is a `State`, so a caller may run it to the end (`jit_generate`), or piece by piece:

    prefill  a chunk of the prompts' tokens, flat  ->  the stream at each row's last token
    first    that stream                           ->  a State with each row's first token
    advance  while a row is alive and steps are left: one decode step for the rows alive
"""

import inspect
from dataclasses import fields, replace

import jax
import jax.numpy as jnp

from qwen_jax import sampling
from qwen_jax.generation_state import FAILED, LENGTH, RUNNING, STOP, Options, Rows, State
from qwen_jax.model.cache import KVCache, RaggedBatch
from qwen_jax.model.step import forward, last_of_rows, unembed
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Weights

__all__ = [
    "FAILED",
    "LENGTH",
    "RUNNING",
    "STOP",
    "Options",
    "Rows",
    "State",
    "advance",
    "first",
    "generate",
    "jit_advance",
    "jit_first",
    "jit_generate",
    "jit_prefill",
    "logprob_buffers",
    "prefill",
    "prompt_logprobs",
    "take",
]

_LOGIT_BLOCK = 64  # tokens whose logits exist at once while prompt logprobs are made


def prefill(
    params: Weights, config: ModelConfig, runtime: Runtime, batch: RaggedBatch, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Takes a chunk of the prompts into the cache.

    Args:
        params, config, runtime: the model; the last two static.
        batch: the chunk's tokens.
        cache: what earlier chunks left, or an empty cache; donate it.

    Returns:
        The stream [B, D] at the last token of each row, and the cache.
    """
    out = forward(params, config, runtime, batch, cache)
    return last_of_rows(out.x_TD, batch), out.cache


def first(
    params: Weights,
    config: ModelConfig,
    runtime: Runtime,
    x_BD: jax.Array,
    cache: KVCache,
    page_table: jax.Array,
    kv_lens: jax.Array,
    rows: Rows,
    counts: sampling.Counts | None,
    *,
    options: Options,
) -> State:
    """Samples each row's first token, once its whole prompt is in the cache.

    Args:
        params, config, runtime: the model.
        x_BD: from the `prefill` that took each row's last token.
        cache, page_table, kv_lens: where the prompts are; donate the cache.
        rows: per-row settings.
        counts: of prompt tokens, where a penalty is in use.
        options: static.
    """
    size = kv_lens.shape[0]
    zeros = jnp.zeros(size, jnp.int32)
    state = State(
        cache=cache,
        page_table=page_table,
        kv_lens=kv_lens,
        newest=zeros,
        tokens=jnp.full((size, options.new_tokens), -1, jnp.int32),
        count=zeros,
        taken=zeros,
        finish=jnp.where(rows.max_tokens > 0, RUNNING, LENGTH).astype(jnp.int32),
        counts=counts,
        logprobs=logprob_buffers(size, config, options),
    )
    return take(state, unembed(params, x_BD, config, runtime), rows, options)


def advance(
    params: Weights,
    config: ModelConfig,
    runtime: Runtime,
    state: State,
    rows: Rows,
    steps: jax.Array,
    *,
    options: Options,
) -> State:
    """Decodes until every row has finished, or ``steps`` (int32 scalar) tokens are added to each,
    or the buffer of a running row is full.

    Finished rows bring no token: they cost no expert and write nothing to the cache.
    """

    def unfinished(carry: tuple[State, jax.Array]) -> jax.Array:
        state, done = carry
        alive = state.finish == RUNNING
        full = alive & (state.count - state.taken == options.new_tokens)
        return (done < steps) & jnp.any(alive) & ~jnp.any(full)

    def decode(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, done = carry
        alive = state.finish == RUNNING
        batch = _decode_batch(state, rows, alive)
        out = forward(params, config, runtime, batch, state.cache)
        logits_BV = unembed(params, last_of_rows(out.x_TD, batch), config, runtime)
        state = replace(state, cache=out.cache, kv_lens=batch.kv_lens)
        return take(state, logits_BV, rows, options), done + 1

    return jax.lax.while_loop(unfinished, decode, (state, jnp.int32(0)))[0]


def _decode_batch(state: State, rows: Rows, alive: jax.Array) -> RaggedBatch:
    """The newest token of every row alive, packed to the front of the flat tokens."""
    size = alive.shape[0]
    row_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(alive, dtype=jnp.int32)])
    place = jnp.where(alive, row_starts[:-1], size)
    newest = jnp.stack([state.newest, state.kv_lens + rows.rope_delta])
    flat = jnp.zeros((2, size), jnp.int32).at[:, place].set(newest, mode="drop")
    return RaggedBatch(
        tokens=flat[0],
        positions=jnp.broadcast_to(flat[1], (3, size)),
        row_starts=row_starts,
        kv_lens=state.kv_lens + alive,
        page_table=state.page_table,
    )


def take(state: State, logits_BV: jax.Array, rows: Rows, options: Options) -> State:
    """Samples a token for every row alive, and decides which rows have finished."""
    alive = state.finish == RUNNING
    sampled = sampling.sample(
        logits_BV,
        rows.sampling,
        counts=state.counts,
        position=state.count,
        num_logprobs=options.logprobs,
        features=options.features,
    )
    size = alive.shape[0]
    place = (jnp.arange(size), jnp.where(alive, state.count - state.taken, options.new_tokens))
    count = state.count + alive
    stops = jnp.any(rows.sampling.stop_ids == sampled.tokens[:, None], axis=1)
    stops &= count > rows.sampling.min_tokens
    finish = jnp.where(count >= rows.max_tokens, LENGTH, RUNNING)
    finish = jnp.where(stops, STOP, finish)
    finish = jnp.where(sampled.tokens < 0, FAILED, finish)
    counts = state.counts
    if counts is not None:
        counts = sampling.update_counts(counts, jnp.where(alive, sampled.tokens, -1))
    logprobs = state.logprobs
    if logprobs is not None:
        buffers = {field.name: getattr(logprobs, field.name) for field in fields(logprobs)}
        logprobs = sampling.Logprobs(
            **{k: x.at[place].set(getattr(sampled, k), mode="drop") for k, x in buffers.items()}
        )
    return replace(
        state,
        newest=jnp.where(alive, sampled.tokens, state.newest),
        tokens=state.tokens.at[place].set(sampled.tokens, mode="drop"),
        count=count,
        finish=jnp.where(alive, finish, state.finish).astype(jnp.int32),
        counts=counts,
        logprobs=logprobs,
    )


def logprob_buffers(rows: int, config: ModelConfig, options: Options) -> sampling.Logprobs | None:
    """Room for the logprobs of `State.tokens`, if ``options`` ask for any."""
    k = options.logprobs
    if k is None:
        return None
    k = config.text.vocab_size if k == -1 else k
    shape = (rows, options.new_tokens)
    return sampling.Logprobs(
        logprob=jnp.zeros(shape, jnp.float32),
        rank=jnp.zeros(shape, jnp.int32),
        top_ids=jnp.zeros((*shape, k), jnp.int32),
        top_logprobs=jnp.zeros((*shape, k), jnp.float32),
    )


def prompt_logprobs(params, config, runtime, x_TD, targets_T, k: int) -> sampling.Logprobs:
    """Logprobs of ``targets``, a block of tokens at a time: [T, V] logits never exist."""
    tokens, width = x_TD.shape
    block = min(_LOGIT_BLOCK, tokens)
    pad = -tokens % block

    def one(args):
        x, targets = args
        return sampling.prompt_logprobs(unembed(params, x, config, runtime), targets, k)

    blocks = (
        jnp.pad(x_TD, ((0, pad), (0, 0))).reshape(-1, block, width),
        jnp.pad(targets_T, (0, pad)).reshape(-1, block),
    )
    out = jax.lax.map(one, blocks)
    return jax.tree.map(lambda x: x.reshape(tokens + pad, *x.shape[2:])[:tokens], out)


_STATIC = ("config", "runtime", "options")


def _jit(fn, *donated: str):
    names = [name for name in _STATIC if name in inspect.signature(fn).parameters]
    return jax.jit(fn, static_argnames=names, donate_argnames=donated)


jit_prefill = _jit(prefill, "cache")
jit_first = _jit(first, "cache")
jit_advance = _jit(advance, "state")


def generate(
    params: Weights,
    config: ModelConfig,
    runtime: Runtime,
    batch: RaggedBatch,
    cache: KVCache,
    rows: Rows,
    counts: sampling.Counts | None,
    *,
    options: Options,
) -> State:
    """`prefill`, `first`, then `advance` to the end; jitted, one program."""
    x_BD, cache = prefill(params, config, runtime, batch, cache)
    where = (batch.page_table, batch.kv_lens)
    state = first(params, config, runtime, x_BD, cache, *where, rows, counts, options=options)
    return advance(params, config, runtime, state, rows, jnp.int32(2**30), options=options)


jit_generate = _jit(generate, "cache")
