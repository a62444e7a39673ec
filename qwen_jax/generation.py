"""The functional generate loop: one jitted program that prefills and then decodes to the end.

Knows token ids, arrays and when a row stops; knows no text and no requests. The loop's whole memory
is a `State`, so a caller may run it to the end (`generate`), or a few steps at a time (`advance`).

    start    prompt tokens of all rows, flat  ->  State with each row's first token
    advance  while a row is alive and steps are left: one decode step for the rows alive
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax import sampling
from qwen_jax.model.cache import KVCache, RaggedBatch
from qwen_jax.model.step import forward, last_of_rows, unembed
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Weights

RUNNING, STOP, LENGTH, FAILED = range(4)  # State.finish
_LOGIT_BLOCK = 64  # tokens whose logits exist at once while prompt logprobs are made


@dataclasses.dataclass(frozen=True)
class Options:
    """What a generate program computes; static, so that it compiles nothing it does not need.

    Attributes:
        features: the sampling options in use by any row.
        new_tokens: the size of the output buffers, at least every row's ``max_tokens``.
        logprobs: how many best tokens to report with each new token; None for no logprobs at all.
        prompt_logprobs: the same for the prompt's tokens.
    """

    features: sampling.Features
    new_tokens: int
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@struct.dataclass
class Rows:
    """What the loop is told of each row.

    Attributes:
        sampling: the sampling parameters, stop ids and seeds.
        max_tokens: int32 [B], how many tokens a row may generate; 0 for an unused row.
        rope_delta: int32 [B], rotary position minus context position (0 for text).
    """

    sampling: sampling.RowSampling
    max_tokens: jax.Array
    rope_delta: jax.Array


@struct.dataclass
class State:
    """Everything a generate loop remembers.

    Attributes:
        cache: keys and values.
        page_table: int32 [B, W].
        kv_lens: int32 [B], positions in the cache: all but the newest token.
        tokens: int32 [B, new_tokens]; entry i of a row is its i-th new token, or says by a negative
            number (see `sampling.check_tokens`) why there is none.
        count: int32 [B], new tokens so far.
        finish: int32 [B], `RUNNING`, `STOP`, `LENGTH` or `FAILED`.
        counts: token counts for the penalties, or None.
        logprobs: with [B, new_tokens, …] leaves, or None.
        prompt_logprobs: with [T, …] leaves: entry t is about ``targets[t]``; or None.
    """

    cache: KVCache
    page_table: jax.Array
    kv_lens: jax.Array
    tokens: jax.Array
    count: jax.Array
    finish: jax.Array
    counts: sampling.Counts | None
    logprobs: sampling.Logprobs | None
    prompt_logprobs: sampling.Logprobs | None


def prefill(
    params: Weights,
    config: ModelConfig,
    runtime: Runtime,
    batch: RaggedBatch,
    cache: KVCache,
    targets: jax.Array | None,
    *,
    options: Options,
) -> tuple[jax.Array, KVCache, sampling.Logprobs | None]:
    """Takes a chunk of the prompts into the cache.

    Args:
        params, config, runtime: the model; the last two static.
        batch: the chunk's tokens.
        cache: what earlier chunks left, or an empty cache; donate it.
        targets: int32 [T], the token that follows each token of the chunk (-1 for none), where
            prompt logprobs are wanted.
        options: static.

    Returns:
        The stream [T, D], the cache, and the targets' logprobs or None.
    """
    x_TD, cache = forward(params, config, runtime, batch, cache)
    logprobs = None
    if options.prompt_logprobs is not None:
        logprobs = _prompt_logprobs(params, config, runtime, x_TD, targets, options.prompt_logprobs)
    return x_TD, cache, logprobs


def start(
    params: Weights,
    config: ModelConfig,
    runtime: Runtime,
    batch: RaggedBatch,
    cache: KVCache,
    rows: Rows,
    counts: sampling.Counts | None,
    targets: jax.Array | None,
    *,
    options: Options,
) -> State:
    """Prefills the prompts' last chunk and samples each row's first token.

    Args:
        params, config, runtime, batch, cache, targets, options: as for `prefill`.
        rows: per-row settings.
        counts: of prompt tokens, where a penalty is in use.
    """
    x_TD, cache, prompt_logprobs = prefill(
        params, config, runtime, batch, cache, targets, options=options
    )
    size = batch.kv_lens.shape[0]
    state = State(
        cache=cache,
        page_table=batch.page_table,
        kv_lens=batch.kv_lens,
        tokens=jnp.full((size, options.new_tokens), -1, jnp.int32),
        count=jnp.zeros(size, jnp.int32),
        finish=jnp.where(rows.max_tokens > 0, RUNNING, LENGTH).astype(jnp.int32),
        counts=counts,
        logprobs=_logprob_buffers(size, config, options),
        prompt_logprobs=prompt_logprobs,
    )
    logits_BV = unembed(params, last_of_rows(x_TD, batch), config, runtime)
    return _take(state, logits_BV, rows, options)


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
    """Decodes until every row has finished, or ``steps`` (int32 scalar) tokens are added to each.

    Finished rows bring no token: they cost no expert and write nothing to the cache.
    """

    def unfinished(carry: tuple[State, jax.Array]) -> jax.Array:
        state, done = carry
        return (done < steps) & jnp.any(state.finish == RUNNING)

    def decode(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, done = carry
        alive = state.finish == RUNNING
        batch = _decode_batch(state, rows, alive)
        x_TD, cache = forward(params, config, runtime, batch, state.cache)
        logits_BV = unembed(params, last_of_rows(x_TD, batch), config, runtime)
        state = state.replace(cache=cache, kv_lens=batch.kv_lens)
        return _take(state, logits_BV, rows, options), done + 1

    return jax.lax.while_loop(unfinished, decode, (state, jnp.int32(0)))[0]


def _decode_batch(state: State, rows: Rows, alive: jax.Array) -> RaggedBatch:
    """The newest token of every row alive, packed to the front of the flat tokens."""
    size = alive.shape[0]
    row_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(alive, dtype=jnp.int32)])
    newest = jnp.take_along_axis(state.tokens, jnp.maximum(state.count - 1, 0)[:, None], 1)[:, 0]
    place = jnp.where(alive, row_starts[:-1], size)
    flat = jnp.zeros((2, size), jnp.int32)
    flat = flat.at[:, place].set(jnp.stack([newest, state.kv_lens + rows.rope_delta]), mode="drop")
    return RaggedBatch(
        tokens=flat[0],
        positions=jnp.broadcast_to(flat[1], (3, size)),
        row_starts=row_starts,
        kv_lens=state.kv_lens + alive,
        page_table=state.page_table,
    )


def _take(state: State, logits_BV: jax.Array, rows: Rows, options: Options) -> State:
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
    place = (jnp.arange(size), jnp.where(alive, state.count, options.new_tokens))
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
        new = sampling.Logprobs(
            sampled.logprob, sampled.rank, sampled.top_ids, sampled.top_logprobs
        )
        logprobs = jax.tree.map(
            lambda buffer, x: buffer.at[place].set(x, mode="drop"), logprobs, new
        )
    return state.replace(
        tokens=state.tokens.at[place].set(sampled.tokens, mode="drop"),
        count=count,
        finish=jnp.where(alive, finish, state.finish).astype(jnp.int32),
        counts=counts,
        logprobs=logprobs,
    )


def _logprob_buffers(rows: int, config: ModelConfig, options: Options) -> sampling.Logprobs | None:
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


def _prompt_logprobs(params, config, runtime, x_TD, targets_T, k: int) -> sampling.Logprobs:
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
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens], out)


_STATIC = ("config", "runtime", "options")

jit_prefill = partial(jax.jit, static_argnames=_STATIC, donate_argnames=("cache",))(prefill)
jit_start = partial(jax.jit, static_argnames=_STATIC, donate_argnames=("cache",))(start)
jit_advance = partial(jax.jit, static_argnames=_STATIC, donate_argnames=("state",))(advance)


@partial(jax.jit, static_argnames=_STATIC, donate_argnames=("cache",))
def jit_generate(
    params: Weights,
    config: ModelConfig,
    runtime: Runtime,
    batch: RaggedBatch,
    cache: KVCache,
    rows: Rows,
    counts: sampling.Counts | None,
    targets: jax.Array | None,
    *,
    options: Options,
) -> State:
    """`start`, then `advance` to the end, as one program."""
    state = start(params, config, runtime, batch, cache, rows, counts, targets, options=options)
    return advance(params, config, runtime, state, rows, jnp.int32(2**30), options=options)
