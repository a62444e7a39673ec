"""The copies of a walk between HBM and the core: page table, keys and values, queries, results.

Knows semaphores and what lies where; knows no arithmetic.

No race: a position is fetched from its page only if it was cached before this call, and is written
there only if it was not. New keys and values are read from the argument in which they arrive. So no
byte of the cache is both read and written, and the writes are waited for once, at the end.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.tpu_walk import (
    LINES,
    STEPS,
    Refs,
    Shape,
    TileScalars,
    pieces,
    split,
)


def copy_line(shape: Shape, tiles: TileScalars, refs: Refs, tile, at, slot):
    """The copy of a tile's line ``at`` of the page table into ``slot``."""
    line = tiles.row(tile) * shape.lines + at
    return pltpu.make_async_copy(refs.table.at[line], refs.lines.at[slot], refs.line_sem.at[slot])


def fetch(shape: Shape, tiles: TileScalars, refs: Refs, tile, at, slot, line, ring) -> None:
    """Starts every copy of an item, and the writes of those of its tile's tokens that lie in it.

    Args:
        tile, at: the item: the block ``at`` of a tile.
        slot: the buffer for its keys and values.
        line: the number of the page table's line that holds its pages.
        ring: the buffer for the tile's queries.
    """
    page_size, base = shape.page_size, at * shape.block
    per_block = shape.block // page_size
    token, position = tiles.token(tile), tiles.position(tile)
    cached, visible = tiles.cached(tile), tiles.visible(tile)
    end = jnp.minimum(visible, base + shape.block)
    sem, T = refs.kv_sem.at[slot], refs.new.shape[0]

    def page(i):
        entry = (at * per_block + i) & (shape.line - 1)
        return refs.lines[line & (LINES - 1), *split(entry, 128)]

    def start(source, target, sem):
        pltpu.make_async_copy(source, target, sem).start()

    def from_page(i, offset, size):
        source = refs.pages.at[page(i), pl.ds(offset, size)]
        start(source, refs.kv.at[slot, pl.ds(i * page_size + offset, size)], sem)

    old = jnp.clip(cached - base, 0, shape.block)

    @pl.when(old == shape.block)
    def _():
        for i in range(per_block):
            from_page(i, 0, page_size)

    @pl.when(old < shape.block)
    def _():
        @pl.loop(0, split(old + page_size - 1, page_size)[0])
        def _(i):
            count = jnp.minimum(old - i * page_size, page_size)
            pieces(count, page_size, lambda offset, size: from_page(i, offset, size))

    def from_new(offset, size):
        source = refs.new.at[pl.ds(token + base + old - position + offset, size)]
        start(source, refs.kv.at[slot, pl.ds(old + offset, size)], sem)

    def to_page(i, offset, size):
        source = refs.new.at[pl.ds(token + base + i * page_size + offset - position, size)]
        start(source, refs.pages.at[page(i), pl.ds(offset, size)], refs.write_sem.at[0])

    def to_scales(i, low):
        # Once per page: from the tile that has the first of its new positions.
        @pl.when(base + i * page_size + low == jnp.maximum(cached, base + i * page_size))
        def _():
            source = refs.fresh.at[tiles.touched(tile) + at * per_block + i]
            start(source, refs.scales.at[page(i)], refs.scale_sem.at[STEPS * shape.items])

    if refs.scales is not None:
        _fetch_scales(shape, tiles, refs, tile, at, slot, page)

    if shape.height == 1:  # its one new token is the last position of its last block

        @pl.when(visible <= base + shape.block)
        def _():
            from_new(0, 1)
            i, low = split(position - base, page_size)
            to_page(i, low, 1)
            if refs.scales is not None:
                to_scales(i, low)

    else:
        pieces(jnp.maximum(end - base - old, 0), min(shape.block, T), from_new)
        own = jnp.maximum(position, base)

        last = jnp.where(own < end, split(end - base + page_size - 1, page_size)[0], 0)

        @pl.loop(split(own - base, page_size)[0], last)
        def _(i):
            low = jnp.maximum(own - base - i * page_size, 0)
            count = jnp.minimum(end - base - i * page_size, page_size) - low
            if refs.scales is not None:
                to_scales(i, low)
            pieces(
                count,
                min(page_size, T),
                lambda offset, size: to_page(i, low + offset, size),
            )

    _clear(refs.kv.at[slot], end - base)

    @pl.when(at == 0)
    def _():
        def q_piece(offset, size):
            source = refs.q.at[pl.ds(token + offset, size)]
            start(source, refs.q_ring.at[ring, pl.ds(offset, size)], refs.q_sem.at[ring])

        pieces(tiles.tokens(tile), min(shape.height, T), q_piece)


def _fetch_scales(shape: Shape, tiles: TileScalars, refs: Refs, tile, at, slot, page) -> None:
    """Starts the copies of a block's scales: of pages with new tokens from where those arrive."""
    per_block = shape.block // shape.page_size
    cached, visible = tiles.cached(tile), tiles.visible(tile)
    used = jnp.minimum(visible - at * shape.block, shape.block)

    @pl.loop(0, split(used + shape.page_size - 1, shape.page_size)[0])
    def _(i):
        index = at * per_block + i
        new = (index + 1) * shape.page_size > cached
        target, sem = refs.kv_scales.at[slot, i], refs.scale_sem.at[slot]

        @pl.when(new)
        def _():
            source = refs.fresh.at[tiles.touched(tile) + index]
            pltpu.make_async_copy(source, target, sem).start()

        @pl.when(~new)
        def _():
            pltpu.make_async_copy(refs.scales.at[page(i)], target, sem).start()


def _clear(kv, count) -> None:
    """Zeroes a block behind its positions: it may hold NaN, and a weight of 0 times NaN is no 0."""
    size = min(16, kv.shape[0])
    whole, rest = split(kv.shape[0] - count, size)

    def zero(start, size):
        kv[pl.ds(start, size)] = jnp.zeros((size, *kv.shape[1:]), kv.dtype)

    @pl.loop(0, whole)
    def _(i):
        zero(kv.shape[0] - (i + 1) * size, size)

    pieces(rest, size // 2, lambda offset, size: zero(count + offset, size))


def wait_for_item(shape: Shape, tiles: TileScalars, refs: Refs, tile, at, slot, ring) -> None:
    """Waits for an item's keys and values and, at a tile's first item, for its queries."""
    count = jnp.minimum(tiles.visible(tile) - at * shape.block, shape.block)

    def kv(offset, size):
        wait(refs.kv.at[slot, pl.ds(offset, size)], refs.kv_sem.at[slot])

    def q(offset, size):
        wait(refs.q_ring.at[ring, pl.ds(offset, size)], refs.q_sem.at[ring])

    pieces(count, shape.block, kv)
    if refs.scales is not None:

        @pl.loop(0, split(count + shape.page_size - 1, shape.page_size)[0])
        def _(i):
            wait(refs.kv_scales.at[slot, 0], refs.scale_sem.at[slot])

    @pl.when(at == 0)
    def _():
        pieces(tiles.tokens(tile), min(shape.height, refs.q.shape[0]), q)


def wait(ref, sem) -> None:
    """Waits until copies of as many bytes as ``ref`` holds have signalled ``sem``."""
    pltpu.make_async_copy(ref, ref, sem).wait()


def start_output(shape: Shape, tiles: TileScalars, refs: Refs, tile, ring) -> None:
    """Sends a finished tile's rows to HBM."""
    token = tiles.token(tile)

    def piece(offset, size):
        pltpu.make_async_copy(
            refs.out_ring.at[ring, pl.ds(offset, size)],
            refs.out.at[pl.ds(token + offset, size)],
            refs.out_sem.at[ring],
        ).start()

    pieces(tiles.tokens(tile), min(shape.height, refs.out.shape[0]), piece)


def wait_for_output(shape: Shape, tiles: TileScalars, refs: Refs, tile, ring) -> None:
    """Waits until a tile's rows are in HBM, so that its buffer is free."""
    pieces(
        tiles.tokens(tile),
        min(shape.height, refs.out.shape[0]),
        lambda offset, size: wait(
            refs.out_ring.at[ring, pl.ds(offset, size)], refs.out_sem.at[ring]
        ),
    )


def wait_for_writes(shape: Shape, refs: Refs, tokens, touched) -> None:
    """Waits until ``tokens`` positions, and the scales of ``touched`` pages, are in HBM."""
    sem = refs.write_sem.at[0]

    whole, rest = split(tokens, shape.page_size)

    @pl.loop(0, whole)
    def _(i):
        wait(refs.pages.at[0], sem)

    pieces(
        rest,
        shape.page_size // 2,
        lambda offset, size: wait(refs.pages.at[0, pl.ds(0, size)], sem),
    )
    if refs.scales is not None:

        @pl.loop(0, touched)
        def _(i):
            wait(refs.scales.at[0], refs.scale_sem.at[STEPS * shape.items])
