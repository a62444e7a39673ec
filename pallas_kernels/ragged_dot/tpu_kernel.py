"""The body of the TPU kernel: one core's walk over experts, column tiles and row tiles.

Knows refs, copies and semaphores; chooses no tile size, and multiplies nothing itself. For every
active expert, in order:

    for each column tile n        its weights were asked for two tiles ago: wait for them
        for each row tile t       its rows were asked for one tile ago: wait for them
            multiply, mask, write

Rows are read and written in granules of 16, which is what the tiles of bfloat16 and float32 in HBM
allow. Groups start anywhere, so two of them (or more, of few rows each) may share a granule:

    granule 0           granule 1           granule 2
    |a a a a a a a a a a|a a a b b b c c c c|c c c . . .         . behind the last group
                         ^ a keeps it for b, b for c, c writes it

Who has the last rows of a granule writes it, all others hand it on in ``carry``. Thus each granule
is written once, and no two copies to the same place are ever in flight. Granules in which no group
of this device has rows are filled with zeros while the first weights arrive.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_dot.tpu_product import product

GRANULE = 16
WEIGHT_BUFFERS = 3
# Granules of zeros that one copy writes.
ZERO_GRANULES = 16


@dataclasses.dataclass(frozen=True)
class Refs:
    """What the kernel works on. G granules, T granules per row tile, n column tiles per core.

    Attributes:
        count, expert, start, end: prefetched to SMEM, see `tpu_groups.Groups`.
        x: HBM [G, 16, D].
        w: HBM [E, P, D, F].
        scale: HBM [E, P, row blocks, column blocks], or None.
        out: HBM [G, 16, F].
        x_buf: VMEM [2, T, 16, D].
        w_buf: VMEM [3, P, D, columns].
        scale_buf: VMEM [2, P, row blocks, column blocks], or None.
        out_buf: VMEM [2, T, 16, columns].
        carry: VMEM [n, 16, columns], the granule that the last group shares with the next.
        zeros: VMEM [`ZERO_GRANULES`, 16, columns].
        x_sem, w_sem, scale_sem, out_sem: one per buffer.
        zero_sem: of all copies of zeros.
        written: SMEM [2], granules that the copy out of each ``out_buf`` has in flight.
    """

    count: Any
    expert: Any
    start: Any
    end: Any
    x: Any
    w: Any
    scale: Any
    out: Any
    x_buf: Any
    w_buf: Any
    scale_buf: Any
    out_buf: Any
    carry: Any
    zeros: Any
    x_sem: Any
    w_sem: Any
    scale_sem: Any
    out_sem: Any
    zero_sem: Any
    written: Any


def kernel(*refs, blocks: tuple[int, int] | None, round_rows: bool) -> None:
    """Does the share of columns that belongs to this core.

    Args:
        refs: in the order of `Refs`.
        blocks: rows and columns of a matrix that share a scale.
        round_rows: as `tpu_product.product` takes it.
    """
    _Core(Refs(*refs), blocks, round_rows).run()


@dataclasses.dataclass(frozen=True)
class _Core:
    r: Refs
    blocks: tuple[int, int] | None
    round_rows: bool

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return self.r.w_buf.shape[-1]

    @property
    def tiles(self) -> int:
        """Column tiles of this core."""
        return self.r.carry.shape[0]

    @property
    def height(self) -> int:
        """Granules of a row tile."""
        return self.r.x_buf.shape[1]

    # ---- where things are --------------------------------------------------------------------

    def first(self, a):
        """The first granule in which active expert ``a`` has rows."""
        return lax.div(self.r.start[a], GRANULE)

    def behind(self, a):
        """The granule behind the last one in which active expert ``a`` has rows."""
        return lax.div(self.r.end[a] + (GRANULE - 1), GRANULE)

    def column(self, n):
        """The first column of this core's tile ``n``."""
        return pl.multiple_of((pl.program_id(0) * self.tiles + n) * self.columns, self.columns)

    def rows(self, a, t):
        """First granule and number of granules of row tile ``t`` of active expert ``a``."""
        first = self.first(a) + t * self.height
        return first, jnp.minimum(self.height, self.behind(a) - first)

    # ---- copies ------------------------------------------------------------------------------

    def weights(self, chunk):
        """Chunk number ``chunk`` of this core: column tile by column tile of each active expert."""
        r, a = self.r, lax.div(chunk, self.tiles)
        slot = lax.rem(chunk, WEIGHT_BUFFERS)
        columns = pl.ds(self.column(lax.rem(chunk, self.tiles)), self.columns)
        tile = r.w.at[r.expert[a], :, :, columns]
        return pltpu.make_async_copy(tile, r.w_buf.at[slot], r.w_sem.at[slot])

    def scales(self, a):
        r, slot = self.r, lax.rem(a, 2)
        return pltpu.make_async_copy(
            r.scale.at[r.expert[a]], r.scale_buf.at[slot], r.scale_sem.at[slot]
        )

    def inputs(self, a, t, slot):
        r, (first, count) = self.r, self.rows(a, t)
        tile, room = r.x.at[pl.ds(first, count)], r.x_buf.at[slot, pl.ds(0, count)]
        return pltpu.make_async_copy(tile, room, r.x_sem.at[slot])

    def outputs(self, first, count, n, slot):
        r = self.r
        place = r.out.at[pl.ds(first, count), :, pl.ds(self.column(n), self.columns)]
        return pltpu.make_async_copy(r.out_buf.at[slot, pl.ds(0, count)], place, r.out_sem.at[slot])

    def wait_for_output(self, slot):
        """Makes ``out_buf[slot]`` free: a wait needs only the size of what it waits for."""
        count = self.r.written[slot]
        pl.when(count > 0)(lambda: self.outputs(0, count, 0, slot).wait())

    def each_zero(self, visit) -> None:
        """Calls ``visit`` with every copy that fills what no group here touches."""
        r, total = self.r, self.r.out.shape[0]
        active = r.count[0]
        none = active == 0
        low = jnp.where(none, total, self.first(0))
        high = jnp.where(none, total, self.behind(jnp.maximum(active - 1, 0)))

        def fill(begin, end):
            def piece(i, _):
                first = begin + i * ZERO_GRANULES
                count = jnp.minimum(ZERO_GRANULES, end - first)
                for n in range(self.tiles):
                    columns = pl.ds(self.column(n), self.columns)
                    place = r.out.at[pl.ds(first, count), :, columns]
                    source = r.zeros.at[pl.ds(0, count)]
                    visit(pltpu.make_async_copy(source, place, r.zero_sem))
                return 0

            lax.fori_loop(0, pl.cdiv(end - begin, ZERO_GRANULES), piece, 0)

        fill(0, low)
        fill(high, total)

    # ---- the walk ----------------------------------------------------------------------------

    def run(self) -> None:
        r = self.r
        active = r.count[0]
        chunks = active * self.tiles

        @pl.when(active > 0)
        def _():
            self.inputs(0, 0, 0).start()
            if r.scale is not None:
                self.scales(0).start()

        for early in range(WEIGHT_BUFFERS - 1):
            pl.when(early < chunks)(self.weights(early).start)
        r.written[0] = 0
        r.written[1] = 0
        r.zeros[...] = jnp.zeros_like(r.zeros)
        self.each_zero(lambda copy: copy.start())
        lax.fori_loop(0, active, self.expert, (jnp.int32(0), jnp.int32(0)))
        for slot in range(2):
            self.wait_for_output(slot)
        self.each_zero(lambda copy: copy.wait())

    def expert(self, a, counts):
        """All tiles of active expert ``a``; ``counts``: row tiles read, and written, so far."""
        r, active = self.r, self.r.count[0]
        if r.scale is not None:
            self.scales(a).wait()
            pl.when(a + 1 < active)(lambda: self.scales(a + 1).start())
        row_tiles = pl.cdiv(self.behind(a) - self.first(a), self.height)
        before, after = jnp.maximum(a - 1, 0), jnp.minimum(a + 1, active - 1)
        takes = (a > 0) & (self.behind(before) > self.first(a))
        gives = (a + 1 < active) & (self.first(after) < self.behind(a))

        def column_tile(n, counts):
            chunk = a * self.tiles + n
            ahead = chunk + WEIGHT_BUFFERS - 1
            pl.when(ahead < active * self.tiles)(lambda: self.weights(ahead).start())
            self.weights(chunk).wait()

            def row_tile(t, counts):
                read, written = counts
                # A group of one row tile keeps it for all column tiles.
                fresh = (n == 0) | (row_tiles > 1)
                read = read + fresh.astype(jnp.int32)
                slot = lax.rem(read + 1, 2)
                pl.when(fresh)(lambda: self.turn_inputs(a, n, t, row_tiles, slot))
                y = product(
                    r.x_buf[slot].reshape(self.height * GRANULE, -1),
                    r.w_buf.at[lax.rem(chunk, WEIGHT_BUFFERS)],
                    None if self.blocks is None else r.scale_buf.at[lax.rem(a, 2)],
                    blocks=self.blocks,
                    column=self.column(n),
                    round_rows=self.round_rows,
                )
                last = t + 1 == row_tiles
                self.write(y, a, n, t, lax.rem(written, 2), takes & (t == 0), gives & last)
                return read, written + 1

            return lax.fori_loop(0, row_tiles, row_tile, counts)

        return lax.fori_loop(0, self.tiles, column_tile, counts)

    def turn_inputs(self, a, n, t, row_tiles, slot) -> None:
        """Waits for the rows of tile ``t`` and asks for those that the walk needs next."""
        self.inputs(a, t, slot).wait()
        last = t + 1 == row_tiles
        done = last & ((n + 1 == self.tiles) | (row_tiles == 1))
        next_a, next_t = jnp.where(done, a + 1, a), jnp.where(last, 0, t + 1)
        pl.when(next_a < self.r.count[0])(lambda: self.inputs(next_a, next_t, 1 - slot).start())

    def write(self, y, a, n, t, slot, takes, gives) -> None:
        """Sends a tile of results out, but for a last granule that the next group completes.

        Args:
            y: float32 [rows, columns]; rows of other groups hold anything.
            a, n, t: active expert, column tile, row tile.
            slot: of ``out_buf``.
            takes: whether the first granule is shared with the group before.
            gives: whether the last one is shared with the group behind.
        """
        r, (first, count) = self.r, self.rows(a, t)
        row = first * GRANULE + lax.broadcasted_iota(jnp.int32, y.shape, 0)
        y = jnp.where((row >= r.start[a]) & (row < r.end[a]), y, 0)
        self.wait_for_output(slot)
        r.out_buf[slot] = y.astype(r.out_buf.dtype).reshape(r.out_buf.shape[1:])

        @pl.when(takes)
        def _():
            # Rows of other groups are 0 on both sides. (v5e adds no bfloat16.)
            both = r.out_buf[slot, 0].astype(jnp.float32) + r.carry[n].astype(jnp.float32)
            r.out_buf[slot, 0] = both.astype(r.out_buf.dtype)

        @pl.when(gives)
        def _():
            r.carry[n] = r.out_buf[slot, count - 1]

        count = count - gives.astype(jnp.int32)
        r.written[slot] = count
        pl.when(count > 0)(lambda: self.outputs(first, count, n, slot).start())
