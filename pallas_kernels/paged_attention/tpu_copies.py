"""The copies of a walk between HBM and the core: page table, keys and values, queries, results.

Knows semaphores and what lies where; knows no arithmetic.

No race: a position is fetched from its page only if it was cached before this call, and is written
there only if it was not. New keys and values are read from the argument in which they arrive. So no
byte of the cache is both read and written, and the writes are waited for once, at the end.
"""

import dataclasses
import functools
from typing import Any

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

# Pages whose copies start under one condition.
RUN = 4
# Positions that are zeroed at once behind a context's end.
CLEARED = 16


def copy_line(shape: Shape, tiles: TileScalars, refs: Refs, tile, at, slot):
    """The copy of a tile's line ``at`` of the page table into ``slot``."""
    line = tiles.row(tile) * shape.lines + at
    return pltpu.make_async_copy(refs.table.at[line], refs.lines.at[slot], refs.line_sem.at[slot])


@dataclasses.dataclass(frozen=True)
class Item:
    """The block ``at`` of a tile, whose copies go to and from these buffers.

    Attributes:
        slot: the buffer for its keys and values.
        line: the number of the page table's line that holds its pages.
        ring: the buffer for the tile's queries.
    """

    shape: Shape
    tiles: TileScalars
    refs: Refs
    tile: Any
    at: Any
    slot: Any
    line: Any
    ring: Any

    @property
    def base(self):
        """Its first position."""
        return self.at * self.shape.block

    @property
    def end(self):
        """Behind the last position that its tile sees of it."""
        return jnp.minimum(self.tiles.visible(self.tile), self.base + self.shape.block)

    @property
    def cached(self):
        """How many of its positions were cached before this call: the first ones."""
        return jnp.clip(self.tiles.cached(self.tile) - self.base, 0, self.shape.block)

    def page(self, i):
        """The number of its i-th page."""
        # A block's entries lie in one row of 128 lanes: both are powers of two.
        row, lane = split((self.at * self.shape.pages) & (self.shape.line - 1), 128)
        return self.refs.lines[self.line & (LINES - 1), row, lane + i]

    def token(self, place):
        """The flat token at a place in the block, if it is a new one."""
        return self.tiles.token(self.tile) + self.base + place - self.tiles.position(self.tile)

    def fetch(self) -> None:
        """Starts every copy into VMEM, and the writes of the tile's own tokens that lie here."""
        self._fetch_cached()
        self._fetch_new()
        _clear(self.refs.kv.at[self.slot], self.end - self.base)
        if self.refs.scales is not None:
            self._fetch_scales()
        self._write()
        pl.when(self.at == 0)(self._fetch_queries)

    def _to_buffer(self, source, place, size):
        target = self.refs.kv.at[self.slot, pl.ds(place, size)]
        start(source, target, self.refs.kv_sem.at[self.slot])

    def _fetch_cached(self):
        size = self.shape.page_size

        def part(i, offset, count):
            source = self.refs.pages.at[self.page(i), pl.ds(offset, count)]
            self._to_buffer(source, i * size + offset, count)

        def whole_pages(first, count):
            for i in range(count):
                part(first + i, 0, size)

        whole, rest = split(self.cached, size)
        for first in range(0, self.shape.pages - RUN + 1, RUN):
            pl.when(first + RUN <= whole)(functools.partial(whole_pages, first, RUN))
        pieces(whole, min(RUN - 1, self.shape.pages), whole_pages)
        pieces(rest, size // 2, lambda offset, count: part(whole, offset, count))

    def _fetch_new(self):
        T, place = self.refs.new.shape[0], self.cached

        def part(offset, count):
            source = self.refs.new.at[pl.ds(self.token(place + offset), count)]
            self._to_buffer(source, place + offset, count)

        if self.shape.height == 1:  # its one new token is the last position of its last block
            pl.when(self.at + 1 == self.blocks)(lambda: part(0, 1))
        else:
            pieces(self.end - self.base - place, min(self.shape.block, T), part)

    @property
    def blocks(self):
        """How many blocks its tile has."""
        return split(self.tiles.visible(self.tile) - 1, self.shape.block)[0] + 1

    def _write(self):
        size, T = self.shape.page_size, self.refs.new.shape[0]
        own = jnp.maximum(self.tiles.position(self.tile) - self.base, 0)

        def part(i, offset, count):
            source = self.refs.new.at[pl.ds(self.token(i * size + offset), count)]
            target = self.refs.pages.at[self.page(i), pl.ds(offset, count)]
            start(source, target, self.refs.write_sem.at[0])

        if self.shape.height == 1:

            @pl.when(self.at + 1 == self.blocks)
            def _():
                i, offset = split(own, size)
                part(i, offset, 1)
                self._write_scales(i, offset)

        else:
            used = self.end - self.base
            last = jnp.where(own < used, split(used + size - 1, size)[0], 0)

            @pl.loop(split(own, size)[0], last)
            def _(i):
                low = jnp.maximum(own - i * size, 0)
                count = jnp.minimum(used - i * size, size) - low
                self._write_scales(i, low)
                pieces(count, min(size, T), lambda offset, count: part(i, low + offset, count))

    def _write_scales(self, i, low):
        """A page's scales, once: with the first of its new positions."""
        if self.refs.scales is None:
            return
        begin = self.base + i * self.shape.page_size

        @pl.when(begin + low == jnp.maximum(self.tiles.cached(self.tile), begin))
        def _():
            source = self.refs.fresh.at[self._fresh(i)]
            sem = self.refs.scale_sem.at[STEPS * self.shape.items]
            start(source, self.refs.scales.at[self.page(i)], sem)

    def _fresh(self, i):
        """Where the scales of its i-th page arrive, if the page gets tokens."""
        return self.tiles.touched(self.tile) + self.at * self.shape.pages + i

    def _fetch_scales(self):
        @pl.loop(0, self.used_pages)
        def _(i):
            new = (i + 1) * self.shape.page_size > self.tiles.cached(self.tile) - self.base
            target = self.refs.kv_scales.at[self.slot, i]
            sem = self.refs.scale_sem.at[self.slot]
            pl.when(new)(lambda: start(self.refs.fresh.at[self._fresh(i)], target, sem))
            pl.when(~new)(lambda: start(self.refs.scales.at[self.page(i)], target, sem))

    @property
    def used_pages(self):
        """How many of its pages hold anything."""
        used = self.end - self.base
        return split(used + self.shape.page_size - 1, self.shape.page_size)[0]

    def _fetch_queries(self):
        token = self.tiles.token(self.tile)

        def part(offset, count):
            source = self.refs.q.at[pl.ds(token + offset, count)]
            target = self.refs.q_ring.at[self.ring, pl.ds(offset, count)]
            start(source, target, self.refs.q_sem.at[self.ring])

        pieces(self.tiles.tokens(self.tile), min(self.shape.height, self.refs.q.shape[0]), part)

    def wait(self) -> None:
        """Waits for its keys and values and, at its tile's first item, for the queries."""
        refs, slot, ring = self.refs, self.slot, self.ring
        pieces(
            self.end - self.base,
            self.shape.block,
            lambda offset, count: wait(
                refs.kv.at[slot, pl.ds(offset, count)], refs.kv_sem.at[slot]
            ),
        )
        if refs.scales is not None:
            done = functools.partial(wait, refs.kv_scales.at[slot, 0], refs.scale_sem.at[slot])
            pl.loop(0, self.used_pages)(lambda _: done())

        @pl.when(self.at == 0)
        def _():
            pieces(
                self.tiles.tokens(self.tile),
                min(self.shape.height, refs.q.shape[0]),
                lambda offset, count: wait(
                    refs.q_ring.at[ring, pl.ds(offset, count)], refs.q_sem.at[ring]
                ),
            )


def start(source, target, sem) -> None:
    """Starts a copy."""
    pltpu.make_async_copy(source, target, sem).start()


def _clear(kv, count) -> None:
    """Zeroes a block behind its positions: it may hold NaN, and a weight of 0 times NaN is no 0."""
    whole, rest = split(kv.shape[0] - count, CLEARED)

    def zero(start, size):
        kv[pl.ds(start, size)] = jnp.zeros((size, *kv.shape[1:]), kv.dtype)

    @pl.loop(0, whole)
    def _(i):
        zero(kv.shape[0] - (i + 1) * CLEARED, CLEARED)

    pieces(rest, CLEARED // 2, lambda offset, size: zero(count + offset, size))


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
