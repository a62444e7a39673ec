"""The warpgroup of the Hopper kernel that brings pages, and widens those of 8 bits.

Knows pages, slots and barriers; knows no query and no score.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.gpu_shape import Item, Refs, Shape
from pallas_kernels.warpgroup import ROWS


def bring(shape: Shape, refs: Refs, item: Item, before):
    """Copies an item's pages of 16 bits to slots.

    Args:
        before: steps of the items before this one.
    """
    copies = _Copies(shape, refs, item, before)

    def step(i, pages):
        # Looked up one step ahead, so that no copy waits for the table.
        following = copies.pages(i + 1)
        slot = _free(shape, refs, before + i)
        copies.start(i, pages, refs.slots, slot, refs.ready.at[slot])
        return following

    lax.fori_loop(0, item.steps(shape), step, copies.pages(0))


def widen(shape: Shape, refs: Refs, item: Item, before):
    """Copies an item's pages of 8 bits to raw slots, and those, as bfloat16, to slots."""
    copies = _Copies(shape, refs, item, before)
    steps, ahead = item.steps(shape), shape.narrow_stages

    def start(i, pages):
        raw = lax.rem(before + i, ahead)
        pl.when(i < steps)(lambda: copies.start(i, pages, refs.raw, raw, refs.landed.at[raw]))

    for i in range(ahead):
        start(jnp.int32(i), copies.pages(i))

    def step(i, pages):
        following = copies.pages(i + ahead + 1)
        raw = lax.rem(before + i, ahead)
        plgpu.barrier_wait(refs.landed.at[raw])
        slot = _free(shape, refs, before + i)
        left = item.end - item.begin - i * shape.block
        for row in range(0, shape.block, ROWS):
            for half in range(2):
                here = pl.ds(row, ROWS), pl.ds(half * shape.head_dim, shape.head_dim)
                values = _bfloat16(refs.raw.at[raw].at[here][...])
                if half:
                    position = lax.broadcasted_iota(jnp.int32, values.shape, 0) + row
                    values = jnp.where(position < left, values, jnp.zeros_like(values))
                refs.slots.at[slot].at[here][...] = values
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.ready.at[slot])
        start(i + ahead, pages)
        return following

    lax.fori_loop(0, steps, step, copies.pages(ahead))


def drain(shape: Shape, refs: Refs, steps):
    """Waits until every slot that was used is taken, so that no barrier goes before its users."""

    @pl.loop(0, jnp.minimum(steps, shape.stages))
    def _(slot):
        plgpu.barrier_wait(refs.taken.at[slot])


def _free(shape: Shape, refs: Refs, step):
    """The slot of a step, once those who read it before are done."""
    slot = lax.rem(step, shape.stages)
    pl.when(step >= shape.stages)(lambda: plgpu.barrier_wait(refs.taken.at[slot]))
    return slot


class _Copies:
    """Where the steps of an item lie in the cache."""

    def __init__(self, shape: Shape, refs: Refs, item: Item, before):
        self.shape, self.refs, self.item, self.before = shape, refs, item, before

    def pages(self, step):
        """The pages of a step, looked up; behind the item's end, the last one again."""
        shape, item = self.shape, self.item
        start = item.begin + step * shape.block
        return tuple(
            self.refs.table[
                item.row,
                lax.div(jnp.minimum(start + i * shape.piece, item.end - 1), shape.page_size),
            ]
            for i in range(shape.copies)
        )

    def start(self, step, pages, ring, slot, barrier):
        """Starts the copies of a step, and of its scales."""
        shape, refs, item, piece = self.shape, self.refs, self.item, self.shape.piece
        kept = lax.rem(self.before + step, shape.stages + shape.narrow_stages)
        for i, page in enumerate(pages):
            offset = lax.rem(item.begin + step * shape.block + i * piece, shape.page_size)
            there, here = pl.ds(pl.multiple_of(offset, piece), piece), pl.ds(i * piece, piece)
            plgpu.copy_gmem_to_smem(
                refs.pages.at[page, there, item.head], ring.at[slot, here], barrier
            )
            for part in range(2 if shape.scaled else 0):
                plgpu.copy_gmem_to_smem(
                    refs.scales.at[page, 2 * item.head + part, there],
                    refs.factors.at[kept, part, here],
                    barrier,
                )


def _bfloat16(values):
    """Numbers of 8 bits as bfloat16, which holds each of them exactly."""
    if jnp.issubdtype(values.dtype, jnp.integer):
        return values.astype(jnp.bfloat16)
    return values.astype(jnp.float16).astype(jnp.float32).astype(jnp.bfloat16)
