"""The programs of the engine: what runs on the device between two looks from the host.

Knows arrays: slots, rows and shapes. Knows no request. A *slot* is where the device keeps what it
knows of a sequence (`Carry`, `Table`); a *row* is a sequence's place in one program call. What the
host does not know yet, because the step before is still running, is taken from the slot:

    forward   ragged rows: chunks of prompts, and newest tokens   ->  stream [T, D], and at the ends
    choose    the stream where a row's last token is              ->  its next token
    stretch   decode steps for rows whose tokens are all known to the device, as a while loop
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax import generation, sampling
from qwen_jax import sharding as sharding_lib
from qwen_jax.generation_state import LENGTH, RUNNING, Options, Rows, State
from qwen_jax.model.cache import KVCache, RaggedBatch, VisualRows
from qwen_jax.model.step import forward as run_layers
from qwen_jax.model.step import unembed
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Weights


@struct.dataclass
class Carry:
    """What every slot is up to: int32 [S] each, as in `State`.

    Attributes:
        newest: the last token, which is not in the cache yet.
        kv_lens: positions in the cache.
        count: new tokens so far.
        finish: `RUNNING`, or why not.
    """

    newest: jax.Array
    kv_lens: jax.Array
    count: jax.Array
    finish: jax.Array


@struct.dataclass
class Feed:
    """The tokens of a forward pass, as far as the host knows them.

    Attributes:
        tokens, positions, row_starts, kv_lens, page_table: as in `RaggedBatch`; of a row with a
            slot, token, position and length are filled in here.
        slots: int32 [B], of the rows that bring the newest token of a slot; -1 for others.
        rope_delta: int32 [B].
        ends: int32 [S], flat tokens after which somebody chooses; what is behind them is unused.
    """

    tokens: jax.Array
    positions: jax.Array
    row_starts: jax.Array
    kv_lens: jax.Array
    page_table: jax.Array
    slots: jax.Array
    rope_delta: jax.Array
    ends: jax.Array


@struct.dataclass
class Seats:
    """Which rows choose a token, and where they stand. int32 [B] each.

    Attributes:
        slots: S for an unused row.
        kv_lens, count: of rows whose tokens the host knows; -1 takes them from the slot.
        masks: uint32 [B, ceil(V/32)], ids that may be chosen; None where no row asks.
    """

    slots: jax.Array
    kv_lens: jax.Array
    count: jax.Array
    masks: jax.Array | None = None


@struct.dataclass
class Made:
    """What rows got: tokens int32 [B, N], of which row b has ``count[b]``, the last of them
    negative if it ``finish``ed with `FAILED`; logprobs of them, or None.
    """

    tokens: jax.Array
    count: jax.Array
    finish: jax.Array
    logprobs: sampling.Logprobs | None


def empty_carry(slots: int) -> Carry:
    """All slots free."""
    zeros = jnp.zeros(slots, jnp.int32)
    return Carry(zeros, zeros, zeros, jnp.full(slots, LENGTH, jnp.int32))


@partial(jax.jit, static_argnames=("config", "runtime"), donate_argnames=("cache",))
def forward(
    params: Weights,
    config: ModelConfig,
    runtime: Runtime,
    feed: Feed,
    visual: VisualRows | None,
    carry: Carry,
    cache: KVCache,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """Takes tokens into the cache; returns the stream [T, D], that at ``ends`` [S, D], the cache.

    A row of a slot that has finished meanwhile still brings its token, to the place behind its
    context, which is its own: nobody chooses after it.
    """
    size = feed.tokens.shape[0]
    at = jnp.maximum(feed.slots, 0)
    length = carry.kv_lens[at]
    place = jnp.where(feed.slots >= 0, feed.row_starts[:-1], size)
    batch = RaggedBatch(
        tokens=feed.tokens.at[place].set(carry.newest[at], mode="drop"),
        positions=feed.positions.at[:, place].set(length + feed.rope_delta, mode="drop"),
        row_starts=feed.row_starts,
        kv_lens=jnp.where(feed.slots >= 0, length + 1, feed.kv_lens),
        page_table=feed.page_table,
        visual=visual,
    )
    out = run_layers(params, config, runtime, batch, cache)
    x_SD = sharding_lib.constrain(out.x_TD[feed.ends], ". .", runtime.mesh, runtime.rules)
    return out.x_TD, x_SD, out.cache


@partial(jax.jit, static_argnames=("config", "runtime", "options"), donate_argnames=("counts",))
def choose(
    params: Weights,
    config: ModelConfig,
    runtime: Runtime,
    x_SD: jax.Array,
    seats: Seats,
    table: Rows,
    carry: Carry,
    counts: sampling.Counts | None,
    *,
    options: Options,
) -> tuple[Made, Carry, sampling.Counts | None]:
    """The next token of rows whose tokens have just gone through `forward`.

    Args:
        params, config, runtime: the model.
        x_SD: from `forward`; row b's is the b-th.
        seats: who chooses.
        table: settings of the slots.
        carry, counts: of the slots; counts are donated.
        options: ``new_tokens`` is 1.
    """
    state, rows = _seated(seats, table, carry, counts, config, options)
    size = seats.slots.shape[0]
    begun = state.count
    fed = (seats.count < 0) & (state.finish == RUNNING)  # `forward` has put its newest token there
    state = dataclasses.replace(state, kv_lens=state.kv_lens + fed)
    state = generation.take(state, unembed(params, x_SD[:size], config, runtime), rows, options)
    return _stored(state, begun, seats, carry, counts, runtime)


@partial(
    jax.jit,
    static_argnames=("config", "runtime", "options"),
    donate_argnames=("cache", "counts"),
)
def stretch(
    params: Weights,
    config: ModelConfig,
    runtime: Runtime,
    seats: Seats,
    table: Rows,
    carry: Carry,
    counts: sampling.Counts | None,
    cache: KVCache,
    page_table: jax.Array,
    steps: jax.Array,
    *,
    options: Options,
) -> tuple[Made, Carry, sampling.Counts | None, KVCache]:
    """Up to ``steps`` (int32 scalar, at most ``options.new_tokens``) decode steps for the rows.

    Arguments as in `choose`; page_table is int32 [B, W], cache is donated.
    """
    state, rows = _seated(seats, table, carry, counts, config, options)
    state = dataclasses.replace(state, cache=cache, page_table=page_table)
    begun = state.count
    state = generation.advance(params, config, runtime, state, rows, steps, options=options)
    return *_stored(state, begun, seats, carry, counts, runtime), state.cache


@partial(jax.jit, static_argnames=("config", "runtime", "num_logprobs"))
def targets_logprobs(
    params: Weights,
    config: ModelConfig,
    runtime: Runtime,
    x_TD: jax.Array,
    targets: jax.Array,
    *,
    num_logprobs: int,
) -> sampling.Logprobs:
    """Logprobs of the token after each, int32 [T], where prompt logprobs are wanted."""
    found = generation.prompt_logprobs(params, config, runtime, x_TD, targets, num_logprobs)
    return jax.tree.map(lambda x: _everywhere(x, runtime), found)


@partial(jax.jit, donate_argnames=("counts",))
def recount(
    counts: sampling.Counts, slot: jax.Array, prompt: jax.Array, output: jax.Array
) -> sampling.Counts:
    """The counts with those of one slot replaced: bool [V] and int32 [V]."""
    return sampling.Counts(counts.output.at[slot].set(output), counts.prompt.at[slot].set(prompt))


def _seated(
    seats: Seats, table: Rows, carry: Carry, counts, config: ModelConfig, options: Options
) -> tuple[State, Rows]:
    """The rows' settings and their state, taken from their slots; without cache and pages."""
    size, last = seats.slots.shape[0], carry.newest.shape[0] - 1
    at = jnp.minimum(seats.slots, last)
    rows = jax.tree.map(lambda x: x[at], table)
    settings = dataclasses.replace(rows.sampling, allowed=seats.masks)
    of_slot, used = seats.count < 0, seats.slots <= last
    count = jnp.where(of_slot, carry.count[at], seats.count)
    finish = jnp.where(of_slot, carry.finish[at], RUNNING)
    state = State(
        cache=None,  # type: ignore[arg-type]  (`choose` needs neither)
        page_table=None,  # type: ignore[arg-type]
        kv_lens=jnp.where(of_slot, carry.kv_lens[at], seats.kv_lens),
        newest=carry.newest[at],
        tokens=jnp.full((size, options.new_tokens), -1, jnp.int32),
        count=count,
        taken=count,
        finish=jnp.where(used, finish, LENGTH),
        counts=None if counts is None else jax.tree.map(lambda x: x[at], counts),
        logprobs=generation.logprob_buffers(size, config, options),
    )
    return state, dataclasses.replace(rows, sampling=settings)


def _stored(state: State, begun, seats: Seats, carry: Carry, counts, runtime: Runtime):
    """What the rows got, and the slots with the rows' state put back."""

    def put(slots: jax.Array, rows: jax.Array) -> jax.Array:
        return _everywhere(slots.at[seats.slots].set(rows, mode="drop"), runtime)

    carry = Carry(**{f.name: put(getattr(carry, f.name), getattr(state, f.name)) for f in _FIELDS})
    counts = None if counts is None else jax.tree.map(put, counts, state.counts)
    made = Made(state.tokens, state.count - begun, state.finish, state.logprobs)
    return jax.tree.map(lambda x: _everywhere(x, runtime), made), carry, counts


def _everywhere(x: jax.Array, runtime: Runtime) -> jax.Array:
    """Whole on every device, so that every process can bring it to its host."""
    dims = " ".join("." * x.ndim)
    return sharding_lib.constrain(x, dims, runtime.mesh, runtime.rules)


_FIELDS = dataclasses.fields(Carry)
