"""The body of the TPU kernel: walks over (tile, block of key positions) items.

Knows the order of things; the copies are in `tpu_copies`, the arithmetic in `tpu_attend`. Three
cursors run over the same items, each as far ahead as its latency needs:

    lines of the page table  ->  SMEM     LINES - 1 lines ahead
    keys, values, queries    ->  VMEM     STEPS - 1 steps ahead
    attention                             now
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.paged_attention import tpu_attend, tpu_copies
from pallas_kernels.paged_attention.tpu_walk import LINES, STEPS, Refs, Shape, TileScalars


def walk(shape: Shape, tiles: TileScalars, refs: Refs, core) -> None:
    """Attends every tile of this core's share and writes its tokens' keys and values."""
    first, end = tiles.bound(core), tiles.bound(core + 1)
    bounds = (shape, tiles, refs, first, end)
    start = jnp.int32(0)
    line = lax.fori_loop(
        0, LINES - 1, lambda _, line: _start_line(*bounds, line), (first, start, start)
    )

    def body(carry):
        turn, step, now, line, ahead = carry
        line, ahead = _fetch_step(*bounds, line, ahead, step)
        # The step that is fetched next is the one that was fetched STEPS - 1 turns ago.
        step = jnp.where(step + 1 < STEPS, step + 1, 0)
        items, following = _items(shape, tiles, now, step, first)
        full = turn >= STEPS - 1
        pl.when(full)(lambda: _attend_step(*bounds, items))
        now = tuple(jnp.where(full, x, y) for x, y in zip(following, now, strict=True))
        return turn + 1, step, now, line, ahead

    carry = (start, start, (first, start), line, (first, start, start - 1))
    lax.while_loop(lambda carry: carry[2][0] < end, body, carry)

    @pl.loop(jnp.maximum(first, end - shape.rings), end)
    def _(tile):
        tpu_copies.wait_for_output(shape, tiles, refs, tile, (tile - first) & (shape.rings - 1))

    tpu_copies.wait_for_writes(shape, refs, *tiles.written(core))


def _start_line(shape, tiles, refs, first, end, line):
    """Starts the next line of the page table; ``line`` is its tile, its place there, its number."""
    tile, at, number = line

    @pl.when(tile < end)
    def _():
        tpu_copies.copy_line(shape, tiles, refs, tile, at, number & (LINES - 1)).start()

    return *tiles.advance(tile, at, shape.line * shape.page_size), number + 1


def _fetch_step(shape, tiles, refs, first, end, line, ahead, step):
    """Starts the copies of a step's items; ``ahead`` is tile, block, and number of the line."""
    for i in range(shape.items):
        tile, at, number = ahead
        new_line = (at & (shape.line * shape.page_size // shape.block - 1) == 0) & (tile < end)
        number = number + new_line.astype(jnp.int32)

        @pl.when(new_line)
        def _(tile=tile, number=number):
            slot = number & (LINES - 1)
            tpu_copies.wait(refs.lines.at[slot], refs.line_sem.at[slot])

        # The line before this one is free from here on.
        line = lax.cond(
            new_line,
            functools.partial(_start_line, shape, tiles, refs, first, end),
            lambda line: line,
            line,
        )

        @pl.when(tile < end)
        def _(tile=tile, at=at, number=number, slot=step * shape.items + i):
            ring = (tile - first) & (shape.rings - 1)
            tpu_copies.Item(shape, tiles, refs, tile, at, slot, number, ring).fetch()

        ahead = (*tiles.advance(tile, at, shape.block), number)
    return line, ahead


def _items(shape, tiles, now, step, first):
    """The items of a step (tile, block, buffer, ring), and where the next step begins."""
    items = []
    for i in range(shape.items):
        ring = (now[0] - first) & (shape.rings - 1)
        items.append((*now, step * shape.items + i, ring))
        now = tiles.advance(*now, shape.block)
    return items, now


def _attend_step(shape, tiles, refs, first, end, items):
    """Attends the items of a step, and sends off the tiles that end with them."""
    for tile, at, slot, ring in items:

        @pl.when(tile < end)
        def _(tile=tile, at=at, slot=slot, ring=ring):
            tpu_copies.Item(shape, tiles, refs, tile, at, slot, None, ring).wait()

            @pl.when((at == 0) & (tile - first >= shape.rings))
            def _():
                tpu_copies.wait_for_output(shape, tiles, refs, tile - shape.rings, ring)

    if shape.height == 1:
        _attend_tokens(shape, tiles, refs, end, items)
    else:
        _attend_tile(shape, tiles, refs, *items[0])
    for tile, at, _, ring in items:
        last = (at + 1) * shape.block >= tiles.visible(tile)

        @pl.when((tile < end) & last)
        def _(tile=tile, ring=ring):
            tpu_copies.start_output(shape, tiles, refs, tile, ring)


def _attend_tokens(shape, tiles, refs, end, items):
    described = []
    for tile, at, slot, ring in items:
        exists = tile < end
        count = jnp.minimum(tiles.visible(tile) - at * shape.block, shape.block)
        out_ring = jnp.where(exists, ring, shape.rings)
        count = jnp.where(exists, count, 0)
        described.append((slot, ring, out_ring, exists & (at == 0), count))
    tpu_attend.attend_tokens(shape, refs, described)


def _attend_tile(shape, tiles, refs, tile, at, slot, ring):
    visible, base = tiles.visible(tile), at * shape.block

    @pl.when(at == 0)
    def _():
        tpu_attend.spread_queries(shape, refs, ring)

    count = jnp.minimum(visible - base, shape.block)
    tpu_attend.attend_tile(shape, refs, slot, at == 0, count, base, tiles.position(tile))

    @pl.when(base + shape.block >= visible)
    def _():
        tpu_attend.gather_output(shape, refs, ring)
