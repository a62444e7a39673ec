"""The Hopper kernel that makes one result of the parts of a row's context.

Knows parts and their norms; knows no page and no score. Every part is a softmax of its own, and its
norm the base-2 logarithm of the sum that it was divided by, so with n parts of a query head

    out = sum_i 2**(norm_i - top) part_i / sum_i 2**(norm_i - top),    top = max_i norm_i

which is exact. A block of threads makes one query head of one token after another, a number per
thread.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.warpgroup import LEAST

# Parts whose loads are in flight together.
TOGETHER = 8
# Blocks of threads per multiprocessor: of 128 threads and 64 registers each, all of them fit.
BLOCKS = 8


def combine(
    parts, norms, spans, *, tokens: int, group: int, every: bool, processors: int, interpret=None
):
    """Results of rows of one token.

    Args:
        parts: bfloat16 [parts, K, rows, 2H] as `gpu_kernel.attend` gives them.
        norms: float32 [parts, K, ROWS].
        spans: int32 [3, tiles]: the first part of a tile, how many it has, and its token.
        tokens: T.
        group: query heads of a kv head.
        every: whether a tile without parts gets zeros; otherwise its token is left alone.
        processors: multiprocessors of the device.
        interpret: as `plgpu.kernel` takes it.

    Returns:
        bfloat16 [T, K * group, H]; undefined where no tile wrote.
    """
    K, H = parts.shape[1], parts.shape[3] // 2
    return plgpu.kernel(
        functools.partial(_block, group, every),
        out_type=jax.ShapeDtypeStruct((tokens, K * group, H), jnp.bfloat16),
        grid=(min(BLOCKS * processors, spans.shape[1] * K * group),),
        grid_names=("block",),
        kernel_name="paged_attention_combine",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(parts, norms, spans)


def _block(group: int, every: bool, parts, norms, spans, out):
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    tiles, heads = spans.shape[1], out.shape[1]

    @pl.loop(0, lax.div(tiles * heads - block + blocks - 1, blocks))
    def _(i):
        work = block + i * blocks
        tile, head = lax.div(work, heads), lax.rem(work, heads)
        first, count, token = (spans[field, tile] for field in range(3))
        row = lax.div(head, group), lax.rem(head, group)

        @pl.when(every | (count > 0))
        def _():
            out[token, head] = _mean(parts, norms, first, count, row).astype(out.dtype)


def _mean(parts, norms, first, count, row):
    """float32 [H] of the parts ``first:first + count``; 0 of none."""
    H = parts.shape[3] // 2

    def step(i, carry):
        top, total, acc = carry
        found = []
        for each in (i * TOGETHER + j for j in range(TOGETHER)):
            part = first + jnp.minimum(each, count - 1)
            norm = jnp.where(each < count, norms[part, *row], LEAST)
            values = parts.at[part, *row]
            high, low = (values[pl.ds(half * H, H)].astype(jnp.float32) for half in range(2))
            found.append((norm, high + low))
        new = functools.reduce(jnp.maximum, (norm for norm, _ in found), top)
        decay = jnp.exp2(jnp.full((H,), top - new))
        total, acc = total * decay, acc * decay
        for norm, values in found:
            weight = jnp.exp2(jnp.full((H,), norm - new))
            total, acc = total + weight, acc + weight * values
        return new, total, acc

    zero = jnp.zeros((H,), jnp.float32)
    start = jnp.float32(LEAST), zero, zero
    _, total, acc = lax.fori_loop(0, pl.cdiv(count, TOGETHER), step, start)
    return acc / jnp.where(total > 0, total, 1.0)
