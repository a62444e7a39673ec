"""The arithmetic of a walk: online softmax of query rows over a block of keys and values.

Knows what is in VMEM; knows no copy. Scores, weights and sums are float32; the two products take
the queries' dtype, as the XLA implementation does.
"""

import functools
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


def _update(shape: Shape, refs: Refs, state, q, slot, read, head: int, seen, count):
    """Merges a kv head's block into the softmax of its query rows.

    Args:
        state: top [rows, 1], total [rows, 1] and acc [rows, H], float32.
        q: [rows, H].
        slot: the block's buffer.
        read: `_reader` of that buffer.
        seen: bool [height, block]; there are ``group`` times as many query rows.
        count: positions of the block that hold anything.
    """
    top, total, acc = state
    k_scale, v_scale = _scales(refs, slot, head, count)
    keys = read(2 * head)
    # In powers of two, which is what the hardware computes.
    scores = _dot(q, keys, (1, 1)) * (shape.sm_scale * math.log2(math.e))
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
    values = read(2 * head + 1)
    return new, total, acc * decay + _dot(weights.astype(q.dtype), values, (1, 0))


def _by_halves(shape: Shape, refs: Refs) -> bool:
    return refs.kv.dtype == refs.q_ring.dtype == jnp.bfloat16 and not shape.plain


def _reader(shape: Shape, refs: Refs, slot):
    """A function from a combined head to its rows of a block, in a dtype that multiplies q."""
    kv, dtype = refs.kv.at[slot], refs.q_ring.dtype
    if _by_halves(shape, refs):
        return functools.partial(tpu_packing.read_halves, kv)
    if shape.plain or dtype != jnp.bfloat16 or jnp.dtype(kv.dtype).itemsize > 1:
        return lambda head: tpu_packing.read(kv, head, plain=shape.plain).astype(dtype)
    planes = functools.cache(functools.partial(tpu_packing.read_planes, kv))
    # The matrix unit takes float8 beside bfloat16, exactly; int8 is exact in bfloat16.
    kept = refs.kv.dtype if refs.kv.dtype == jnp.float8_e4m3fn else dtype
    return lambda head: planes(head // 4)[head % 4].astype(kept)


def _positions(shape: Shape, refs: Refs):
    """int32 [1, block], where in its block each row of `_reader`'s lies."""
    if _by_halves(shape, refs):
        return tpu_packing.halves(shape.block)
    return lax.broadcasted_iota(jnp.int32, (1, shape.block), 1)


def _scales(refs: Refs, slot, head: int, count):
    if refs.kv_scales is None:
        return None, None
    pages = range(refs.kv_scales.shape[1])
    k, v = (
        jnp.concatenate([refs.kv_scales[slot, i, pl.ds(2 * head + x, 1), :] for i in pages], axis=1)
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
        seen = _positions(shape, refs) < count
        read = _reader(shape, refs, slot)
        for j in range(shape.kv_heads):
            own = pl.ds(j * G, G)
            q = refs.q_heads[i, own, :].astype(dtype)
            before = _restart(state[j], first)
            state[j] = _update(shape, refs, before, q, slot, read, j, seen, count)
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
    at = _positions(shape, refs)
    token = lax.broadcasted_iota(jnp.int32, (h, 1), 0)
    seen = (at < count) & (base + at <= position + token)
    read = _reader(shape, refs, slot)
    for j in range(shape.kv_heads):
        before = _restart(_load(refs, j), first)
        state = _update(shape, refs, before, refs.q_heads[j], slot, read, j, seen, count)
        _store(refs, j, state)


def spread_queries(shape: Shape, refs: Refs, ring) -> None:
    """A tile's queries [height, N, H], one kv head after the other."""
    tile, h = refs.q_ring.at[ring], shape.height
    for n in range(shape.heads):
        j, g = divmod(n, shape.group)
        head = tpu_packing.read(tile, n, plain=shape.plain)
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
