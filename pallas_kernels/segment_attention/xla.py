"""Segment attention in XLA: the definition of correct, for any platform.

Queries are taken `TILE` at a time. A tile walks over the key blocks from the first key that any of
its queries may see to the last, `BLOCK` at a time, with an online softmax:

    keys      [ segment 0 ][   segment 1   ][ segment 2 ][ padding
    a tile          q q q q q q q                            of the end of 0 and the start of 1
    its blocks [ block 0 ][ block 1 ][ block 2 ]             nothing of 2 is read

Trip counts depend on the segments, so the cost is the sum over segments of length squared, and
memory is a tile by a block: 16 heads x 256 x 512 float32 scores are 8 MiB.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import registry
from pallas_kernels.buffers import map_rows
from pallas_kernels.device import Device
from pallas_kernels.precision import exact
from pallas_kernels.segment_attention.facts import Facts

TILE = 256
BLOCK = 512


def segment_attention(q_UNH, k_UNH, v_UNH, segment_starts, sm_scale):
    """`pallas_kernels.segment_attention`, on checked arguments."""
    U = q_UNH.shape[0]
    if U == 0:
        return q_UNH
    block = min(BLOCK, U)
    # Slices of `block` keys start anywhere below U: the last one is moved back to end at U.

    def one(q_tNH, low_t, high_t):
        return _tile(q_tNH, low_t, high_t, k_UNH, v_UNH, sm_scale, block)

    return map_rows(one, q_UNH, *seen(segment_starts, U), tile=TILE)


def seen(segment_starts, U):
    """int32 [U] twice: the first element of each element's segment, and the one behind it."""
    element = jnp.arange(U, dtype=jnp.int32)
    segment = jnp.searchsorted(segment_starts[1:], element, side="right").astype(jnp.int32)
    inside = element < segment_starts[-1]
    low = segment_starts[jnp.minimum(segment, segment_starts.shape[0] - 2)]
    high = segment_starts[jnp.minimum(segment + 1, segment_starts.shape[0] - 1)]
    return jnp.where(inside, low, 0), jnp.where(inside, high, 0)


def walks(low, high, tile: int, block: int):
    """Per tile: its first block, its number of blocks, and the keys that all of its queries see."""
    low, high = low.reshape(-1, tile), high.reshape(-1, tile)
    used = high > low
    first = jnp.min(jnp.where(used, low, jnp.iinfo(jnp.int32).max), axis=1) // block
    end = -(-jnp.max(high, axis=1) // block)
    blocks = jnp.maximum(end - first, 0)
    return jnp.where(blocks > 0, first, 0), blocks, jnp.max(low, axis=1), jnp.min(high, axis=1)


def _tile(q_tNH, low_t, high_t, k_UNH, v_UNH, sm_scale, block):
    U, N, H = k_UNH.shape
    tile = q_tNH.shape[0]
    used = high_t > low_t
    first = jnp.min(jnp.where(used, low_t, U)) // block
    blocks = -(-jnp.max(high_t) // block)

    def step(j, carry):
        top, total, acc = carry
        begin = j * block
        start = jnp.minimum(begin, U - block)
        keys, values = (lax.dynamic_slice_in_dim(x, start, block) for x in (k_UNH, v_UNH))
        at = start + jnp.arange(block)
        seen = (at >= jnp.maximum(low_t, begin)[:, None]) & (at < high_t[:, None])
        # What no query of the tile sees may be NaN, and 0 * NaN is no 0.
        values = jnp.where(jnp.any(seen, 0)[:, None, None], values, 0)
        scores = jnp.einsum(
            "tNH,sNH->Nts", q_tNH, keys, precision=exact(q_tNH), preferred_element_type=jnp.float32
        )
        scores = jnp.where(seen, scores * sm_scale, -jnp.inf)
        new = jnp.maximum(top, scores.max(-1))
        # A query that has seen nothing yet keeps a finite maximum, so that no exponent is NaN.
        decay, weights = jnp.exp(top - new), jnp.exp(scores - new[..., None])
        total = total * decay + weights.sum(-1)
        acc = acc * decay[..., None] + jnp.einsum(
            "Nts,sNH->NtH",
            weights.astype(q_tNH.dtype),
            values,
            precision=exact(q_tNH),
            preferred_element_type=jnp.float32,
        )
        return new, total, acc

    empty = (jnp.full((N, tile), -1e30), jnp.zeros((N, tile)), jnp.zeros((N, tile, H)))
    _, total, acc = lax.fori_loop(first, blocks, step, empty)
    out = acc / jnp.where(total > 0, total, 1.0)[..., None]
    return jnp.einsum("NtH->tNH", out).astype(q_tNH.dtype)


def supports(device: Device, facts: Facts) -> str | None:
    """Runs every case on every platform."""
    return None


IMPL = registry.Impl("segment_attention", "xla", None, supports, segment_attention)
