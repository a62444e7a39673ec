"""Segment attention for TPU: head by head, scores transposed, other segments' blocks skipped.

Keys run down the sublanes and queries along the lanes, so that the softmax's maximum and sum are
element-wise over registers, heads of 64 or 72 need no padding of queries and values, and where a
query's segment starts and ends is a row of lanes:

                  queries of a tile (lanes)
    keys of    [  q . k  masked outside of  ]
    a block    [  low[query] .. high[query] ]

A tile walks over the key blocks from the first key that any of its queries may see to the last; the
grid is as long as the longest of these walks, which is known only at run time. Blocks that every
query of a tile sees whole need no mask.

VMEM: two buffers each of a tile of q and out and a block of k and v, at most 128 x 512 numbers, and
the scores, 512 x 512 float32: less than 4 MiB.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import registry
from pallas_kernels.device import Device
from pallas_kernels.segment_attention import xla
from pallas_kernels.segment_attention.facts import Facts

# Queries of a tile and keys of a block: 256 registers of scores, so that products fill the matrix
# unit while a whole head's softmax state stays in VMEM.
TILE = 512
BLOCK = 512
LEAST = -1e30  # below any score, and finite, so that no exponent is infinity minus infinity


def segment_attention(q_UNH, k_UNH, v_UNH, segment_starts, sm_scale, interpret=False):
    """`pallas_kernels.segment_attention`, on checked arguments.

    Args:
        interpret: as `pallas_call` takes it.
    """
    U = q_UNH.shape[0]
    if U == 0:
        return q_UNH
    tile = min(TILE, 128 * pl.cdiv(U, 128))
    size = tile * pl.cdiv(U, tile)
    block = min(BLOCK, size)
    used = jnp.arange(U, dtype=jnp.int32) < segment_starts[-1]
    # What no query sees may be NaN, and a weight of 0 times NaN is no 0.
    v_UNH = jnp.where(used[:, None, None], v_UNH, 0)
    pad = ((0, size - U), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, pad) for x in (q_UNH, k_UNH, v_UNH))
    low, high = (jnp.pad(x, (0, size - U)) for x in xla.seen(segment_starts, U))
    out = _call(
        jnp.einsum("UNH->NHU", q),
        jnp.einsum("UNH->NUH", k),
        jnp.einsum("UNH->NHU", v),
        low,
        high,
        tile,
        block,
        sm_scale,
        interpret,
    )
    out = jnp.einsum("NHU->UNH", out)[:U]
    return jnp.where(used[:, None, None], out, 0)


def _call(q_NHU, k_NUH, v_NHU, low, high, tile, block, sm_scale, interpret):
    N, H, U = q_NHU.shape
    walks = xla.walks(low, high, tile, block)

    def at(n, i, j, first, blocks, *_):
        # Behind the end of a walk the block stays, and nothing is copied.
        return first[i] + jnp.minimum(j, jnp.maximum(blocks[i] - 1, 0))

    def queries(rows):
        return pl.BlockSpec((None, rows, tile), lambda n, i, j, *_: (n, 0, i))

    bounds = pl.BlockSpec((1, tile), lambda n, i, j, *_: (0, i))
    keys = pl.BlockSpec((None, block, H), lambda *args: (args[0], at(*args), 0))
    values = pl.BlockSpec((None, H, block), lambda *args: (args[0], 0, at(*args)))
    return pl.pallas_call(
        functools.partial(_kernel, sm_scale=sm_scale),
        out_shape=jax.ShapeDtypeStruct(q_NHU.shape, q_NHU.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(N, U // tile, jnp.maximum(jnp.max(walks[1]), 1)),
            in_specs=[bounds, bounds, queries(H), keys, values],
            out_specs=queries(H),
            scratch_shapes=[
                pltpu.VMEM((1, tile), jnp.float32),
                pltpu.VMEM((1, tile), jnp.float32),
                pltpu.VMEM((H, tile), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        # Of one segment; how many there are is not known when this is compiled.
        cost_estimate=pl.CostEstimate(
            flops=4 * N * U * U * H,
            transcendentals=N * U * U,
            bytes_accessed=2 * N * U * H * q_NHU.dtype.itemsize * (1 + U // tile),
        ),
        interpret=interpret,
        name="segment_attention",
    )(*walks, low[None], high[None], q_NHU, k_NUH, v_NHU)


def _kernel(
    first, blocks, inner_low, inner_high,  # int32 [tiles], in SMEM
    low, high, q, k, v,  # [1, tile] twice, [H, tile], [block, H], [H, block]
    out,  # [H, tile]
    top, total, acc,  # float32 [1, tile] twice, [H, tile]
    *, sm_scale,
):  # fmt: skip
    i, j = pl.program_id(1), pl.program_id(2)
    block = k.shape[0]
    start = (first[i] + j) * block
    whole = (inner_low[i] <= start) & (start + block <= inner_high[i])

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full(top.shape, LEAST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def attend(masked: bool):
        scores = _dot(k[...], q[...]) * (sm_scale * math.log2(math.e))
        if masked:
            key = start + lax.broadcasted_iota(jnp.int32, (block, 1), 0)
            seen = (key >= low[...]) & (key < high[...])
            scores = jnp.where(seen, scores, -jnp.inf)
        new = jnp.maximum(top[...], jnp.max(scores, axis=0, keepdims=True))
        decay, weights = jnp.exp2(top[...] - new), jnp.exp2(scores - new)
        top[...] = new
        total[...] = total[...] * decay + jnp.sum(weights, axis=0, keepdims=True)
        acc[...] = acc[...] * decay + _dot(v[...], weights.astype(v.dtype))

    pl.when((j < blocks[i]) & whole)(lambda: attend(masked=False))
    pl.when((j < blocks[i]) & ~whole)(lambda: attend(masked=True))

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        sums = total[...]
        out[...] = (acc[...] / jnp.where(sums > 0, sums, 1.0)).astype(out.dtype)


def _dot(a, b):
    return lax.dot_general(
        a,
        b,
        (((1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def supports(device: Device, facts: Facts) -> str | None:
    """Why these heads cannot run on a TPU, or None."""
    if facts.dtype not in ("bfloat16", "float32"):
        return f"q, k, v are {facts.dtype}; use bfloat16 or float32"
    if facts.head_dim % 8 or facts.head_dim > 256:
        return f"head_dim={facts.head_dim}; use a multiple of 8 up to 256"
    return None


IMPL = registry.Impl("segment_attention", "tpu", "tpu", supports, segment_attention)
