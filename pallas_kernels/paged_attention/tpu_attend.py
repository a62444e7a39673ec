"""The arithmetic of a walk: online softmax of query rows over a block of keys and values.

Knows what is in VMEM; knows no copy. Scores, weights and sums are float32; the two products take
the queries' dtype, as the XLA implementation does.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.paged_attention import tpu_packing
from pallas_kernels.paged_attention.tpu_walk import Refs, Shape

LEAST = -1e30  # below any score, and finite, so that no exponent is infinity minus infinity


def _dot(a, b, contract: tuple[int, int]):
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def update(state, q, k, v, seen, sm_scale: float, k_scale, v_scale):
    """Merges a block into the softmax of some query rows.

    Args:
        state: top [rows, 1], total [rows, 1] and acc [rows, H], float32.
        q: [rows, H]; k, v: [block, H], zero where nothing may be read from v.
        seen: bool, broadcasts against [.., block] scores; rows are its leading axes, flattened.
        k_scale, v_scale: None, or float32 [1, block].
    """
    top, total, acc = state
    # In powers of two, which is what the hardware computes.
    scores = _dot(q, k, (1, 1)) * (sm_scale * math.log2(math.e))
    if k_scale is not None:
        scores = scores * k_scale
    rows, block = scores.shape
    by_token = scores.reshape(-1, seen.shape[0], block)
    scores = jnp.where(seen[None], by_token, -jnp.inf).reshape(rows, block)
    new = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
    decay, weights = jnp.exp2(top - new), jnp.exp2(scores - new)
    total = total * decay + jnp.sum(weights, axis=1, keepdims=True)
    if v_scale is not None:
        weights = weights * v_scale
    return new, total, acc * decay + _dot(weights.astype(q.dtype), v, (1, 0))


def keys_and_values(shape: Shape, refs: Refs, slot, count, dtype):
    """Per kv head of a buffer: keys, values (0 from ``count`` on), and their scales or None."""
    pack = tpu_packing.pack_of(refs.kv.dtype)
    here = lax.broadcasted_iota(jnp.int32, (shape.block, 1), 0) < count
    heads = []
    for group in range(2 * shape.kv_heads // pack):
        heads += tpu_packing.read(refs.kv.at[slot], group, plain=shape.plain)
    for j in range(shape.kv_heads):
        # What lies behind the context may be NaN, and 0 * NaN is no 0.
        values = jnp.where(here, heads[2 * j + 1], 0.0)
        yield heads[2 * j].astype(dtype), values.astype(dtype), *_scales(refs, slot, j, count)


def _scales(refs: Refs, slot, head: int, count):
    if refs.kv_scales is None:
        return None, None
    pages = range(refs.kv_scales.shape[1])
    k, v = (
        jnp.concatenate(
            [refs.kv_scales[slot, i, pl.ds(2 * head + x, 1), :] for i in pages], axis=1
        )
        for x in (0, 1)
    )
    here = lax.broadcasted_iota(jnp.int32, v.shape, 1) < count
    return k, jnp.where(here, v, 0.0)


def _load(refs: Refs, head: int):
    return refs.top[head, :, :1], refs.total[head, :, :1], refs.acc[head]


def _store(refs: Refs, head: int, state) -> None:
    top, total, acc = state
    refs.top[head] = jnp.broadcast_to(top, refs.top.shape[1:])
    refs.total[head] = jnp.broadcast_to(total, refs.total.shape[1:])
    refs.acc[head] = acc


def _restart(state, first):
    top, total, acc = state
    return jnp.where(first, LEAST, top), jnp.where(first, 0.0, total), jnp.where(first, 0.0, acc)


def attend_tokens(shape: Shape, refs: Refs, items) -> None:
    """A step over items whose tiles are one token each; their rows end up in the output ring.

    One straight run of code, so that the compiler overlaps all heads of all items: an item that is
    not the last of its tile stores a row that the next one overwrites.

    Args:
        items: per item a tuple of buffer, query ring, output ring, whether it is its tile's first,
            and how many positions of its block there are (0 behind the end).
    """
    dtype, G = refs.q_ring.dtype, shape.group
    state = {j: _load(refs, j) for j in range(shape.kv_heads)}
    for i, (slot, ring, out_ring, first, count) in enumerate(items):
        refs.q_heads[i] = refs.q_ring[ring, 0].astype(jnp.float32)
        seen = lax.broadcasted_iota(jnp.int32, (1, shape.block), 1) < count
        kv = keys_and_values(shape, refs, slot, count, dtype)
        for j, (k, v, k_scale, v_scale) in enumerate(kv):
            own = pl.ds(j * G, G)
            q = refs.q_heads[i, own, :].astype(dtype)
            state[j] = update(
                _restart(state[j], first), q, k, v, seen, shape.sm_scale, k_scale, v_scale
            )
            _, total, acc = state[j]
            refs.out_heads[i, own, :] = acc / jnp.where(total > 0, total, 1.0)
        refs.out_ring[out_ring, 0] = refs.out_heads[i].astype(dtype)
    for j in range(shape.kv_heads):
        _store(refs, j, state[j])


def attend_tile(shape: Shape, refs: Refs, slot, first, count, base, position) -> None:
    """One item of a tile of several tokens: its rows are ordered by query head, then by token.

    Args:
        slot: the buffer.
        first: whether it is its tile's first item.
        count: positions of the block that the tile's last token sees.
        base: the block's first position.
        position: of the tile's first token.
    """
    h = shape.height
    at = lax.broadcasted_iota(jnp.int32, (h, shape.block), 1)
    token = lax.broadcasted_iota(jnp.int32, (h, shape.block), 0)
    seen = (at < count) & (base + at <= position + token)
    kv = keys_and_values(shape, refs, slot, count, refs.q_ring.dtype)
    for j, (k, v, k_scale, v_scale) in enumerate(kv):
        state = _restart(_load(refs, j), first)
        q = refs.q_heads[j]
        _store(refs, j, update(state, q, k, v, seen, shape.sm_scale, k_scale, v_scale))


def spread_queries(shape: Shape, refs: Refs, ring) -> None:
    """A tile's queries [height, N, H], one kv head after the other."""
    tile, h = refs.q_ring.at[ring], shape.height
    pack = tpu_packing.pack_of(tile.dtype)
    for group in range(shape.padded_heads // pack):
        for i, head in enumerate(tpu_packing.read(tile, group, plain=shape.plain)):
            j, g = divmod(group * pack + i, shape.group)
            if j < shape.kv_heads:
                refs.q_heads[j, pl.ds(g * h, h), :] = head.astype(tile.dtype)


def gather_output(shape: Shape, refs: Refs, ring) -> None:
    """The inverse of `spread_queries`, for the finished rows of a tile."""
    tile, h = refs.out_ring.at[ring], shape.height
    pack = tpu_packing.pack_of(tile.dtype)
    for group in range(shape.padded_heads // pack):
        heads = []
        for n in range(group * pack, (group + 1) * pack):
            j, g = divmod(min(n, shape.heads - 1), shape.group)
            own = pl.ds(g * h, h)
            total = refs.total[j, own, :1]
            heads.append(refs.acc[j, own, :] / jnp.where(total > 0, total, 1.0))
        tpu_packing.write(tile, group, heads, plain=shape.plain)
