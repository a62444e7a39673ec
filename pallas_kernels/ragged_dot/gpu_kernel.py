"""The body of the Hopper kernel: one block's walk over items, by three warpgroups.

Knows copies and barriers; chooses no tile size, and multiplies nothing itself. An item is one
row tile of one expert times one tile of its columns; block b of B takes the items b, b + B, … and
has no pause between them:

    warpgroup 2   for each item, for each stage of D:   wait until free, copy weights and rows
    0 and 1       for each item, for each stage of D:   wait until ready, multiply, set free
                  then add SwiGLU, transpose, write the rows that are the expert's own

Both share the rows of a stage; each has its own weights: gate and up, or two neighbours of 64
columns. Up goes to warpgroup 0 through shared memory.

Rows are copied as they lie, and a tile may start at any of them: it holds rows of other experts, or
of nobody, or (behind the last one) zeros that the copy puts there. Their results are columns of the
product that nothing else depends on, and are never written. Copies out have fixed sizes, so n rows
are written as the powers of two that n is made of.

Rows before the first held expert's and behind the last one's are filled with zeros at the start.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_dot.gpu_config import COLUMNS, SCALE_BLOCK, WARPGROUPS, Config
from pallas_kernels.ragged_dot.gpu_product import multiply, swiglu
from pallas_kernels.ragged_dot.gpu_refs import Refs

PRODUCER = WARPGROUPS
# Copies that fill a stage: weights of each warpgroup, and rows.
COPIES = WARPGROUPS + 1
# Registers of a thread, of 65,536 for 384 threads.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232


def kernel(refs: Refs, config: Config) -> None:
    """Does what falls to this block and warpgroup."""
    block = _Block(refs, config)
    me = lax.axis_index("warpgroup")

    @pl.when(me == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        block.each_item(block.feed)
        block.drain()

    @pl.when(me < PRODUCER)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        block.clear(me)
        block.each_item(lambda j, item: block.consume(me, j, item))
        if block.pair:
            pl.when((me == 1) & (block.items > 0))(lambda: plgpu.barrier_wait(refs.up_free))
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Item:
    """Expert, rows ``first .. end - 1``, and the first column."""

    expert: Any
    first: Any
    end: Any
    column: Any


@dataclasses.dataclass(frozen=True)
class _Block:
    r: Refs
    config: Config

    @property
    def pair(self) -> bool:
        """Whether the warpgroups have gate and up."""
        return self.r.up is not None

    @property
    def steps(self) -> int:
        """Stages that an item takes."""
        return self.r.x.shape[1] // self.config.inner

    @property
    def across(self) -> int:
        """Column tiles."""
        return self.r.out.shape[1] // self.width

    @property
    def width(self) -> int:
        """Columns of an item."""
        return COLUMNS if self.pair else COLUMNS * WARPGROUPS

    @property
    def items(self):
        """How many items are this block's."""
        r, blocks = self.r, self.config.blocks
        count = r.until[r.until.shape[0] - 1] * self.across
        return lax.div(count - lax.axis_index("block") + blocks - 1, blocks)

    def plane(self, g, column):
        """The matrix of an expert and the first column that are warpgroup ``g``'s."""
        return (g, column) if self.pair else (0, column + g * COLUMNS)

    def each_item(self, visit) -> None:
        """Calls ``visit(j, item)`` for this block's items, j counting them."""
        r = self.r

        def one(j, _):
            i = lax.axis_index("block") + j * self.config.blocks
            t, n = lax.div(i, self.across), lax.rem(i, self.across)
            column = pl.multiple_of(n * self.width, self.width)
            visit(j, _Item(r.expert[t], r.first[t], r.end[t], column))

        lax.fori_loop(0, self.items, one, None)

    # ---- the producer ------------------------------------------------------------------------

    def feed(self, j, item: _Item) -> None:
        """Copies the weights and rows of an item, stage by stage, as stages become free."""
        r, rows, inner, stages = self.r, self.config.rows, self.config.inner, self.config.stages

        def stage(k, _):
            step = j * self.steps + k
            slot = lax.rem(step, stages)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(r.free.at[slot]))
            part = pl.ds(pl.multiple_of(k * inner, inner), inner)
            for g in range(WARPGROUPS):
                p, column = self.plane(g, item.column)
                w = r.w.at[item.expert, p, part, pl.ds(column, COLUMNS)]
                plgpu.copy_gmem_to_smem(w, r.w_ring.at[slot, g], r.ready.at[slot])
            x = r.x.at[pl.ds(item.first, rows), part]
            plgpu.copy_gmem_to_smem(x, r.x_ring.at[slot], r.ready.at[slot])

        lax.fori_loop(0, self.steps, stage, None)

    def drain(self) -> None:
        """Waits until the last stages are free: a barrier ends when all its phases were seen."""
        stages = self.config.stages

        def seen(step, _):
            wait = functools.partial(plgpu.barrier_wait, self.r.free.at[lax.rem(step, stages)])
            pl.when(step >= stages)(wait)

        behind = self.items * self.steps
        lax.fori_loop(behind, behind + stages, seen, None)

    # ---- the consumers -----------------------------------------------------------------------

    def consume(self, me, j, item: _Item) -> None:
        """Multiplies an item and sends its rows out."""
        sum_up = self.scaled if self.r.scale is not None else self.plain
        self.finish(me, j, item, sum_up(me, j, item))

    def plain(self, me, j, item: _Item) -> jax.Array:
        """float32 [64, rows]: all stages of an item; one product is under way while one starts."""
        r, stages = self.r, self.config.stages

        def add(sums):
            def stage(k, _):
                step = j * self.steps + k
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(r.ready.at[slot])
                multiply(sums, r.w_ring.at[slot, me], r.x_ring.at[slot])
                plgpu.wgmma_wait(1)
                done = lax.rem(step + stages - 1, stages)
                pl.when(k > 0)(lambda: plgpu.barrier_arrive(r.free.at[done]))

            lax.fori_loop(0, self.steps, stage, None)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(r.free.at[lax.rem((j + 1) * self.steps - 1, stages)])
            return sums[...]

        return pl.run_scoped(
            add, plgpu.WGMMAAccumulatorRef((COLUMNS, self.config.rows), jnp.float32)
        )

    def scaled(self, me, j, item: _Item) -> jax.Array:
        """float32 [64, rows]: the sum over stages of (products of the values) times their scale."""
        r = self.r
        p, column = self.plane(me, item.column)
        across = lax.div(column, SCALE_BLOCK)

        def stage(k, total):
            slot = lax.rem(j * self.steps + k, self.config.stages)
            scale = r.scale[item.expert, p, k, across].astype(jnp.float32)
            plgpu.barrier_wait(r.ready.at[slot])

            def product(sums):
                multiply(sums, r.w_ring.at[slot, me], r.x_ring.at[slot])
                plgpu.wgmma_wait(0)
                return sums[...]

            y = pl.run_scoped(
                product, plgpu.WGMMAAccumulatorRef((COLUMNS, self.config.rows), jnp.float32)
            )
            # Threads have read what the next copy overwrites: without a fence a copy may overtake.
            plgpu.commit_smem()
            plgpu.barrier_arrive(r.free.at[slot])
            return total + y * scale

        zero = jnp.zeros((COLUMNS, self.config.rows), jnp.float32)
        zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
        return lax.fori_loop(0, self.steps, stage, zero)

    def finish(self, me, j, item: _Item, y: jax.Array) -> None:
        """Sends the results of an item out."""
        r = self.r
        if not self.pair:
            self.send(me, item, y)
            return

        @pl.when(me == 1)
        def _():
            pl.when(j > 0)(lambda: plgpu.barrier_wait(r.up_free))
            r.up[...] = y
            plgpu.barrier_arrive(r.up_ready)

        @pl.when(me == 0)
        def _():
            plgpu.barrier_wait(r.up_ready)
            up = plgpu.layout_cast(r.up[...], plgpu.Layout.WGMMA)
            plgpu.barrier_arrive(r.up_free)
            self.send(me, item, swiglu(y, up))

    def send(self, me, item: _Item, y: jax.Array) -> None:
        """Writes the rows of a tile that are the expert's own; ``y``: float32 [64, rows]."""
        r = self.r
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        y = plgpu.layout_cast(y.astype(r.out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        r.tiles.at[me].transpose((1, 0))[...] = y
        plgpu.commit_smem()
        column = item.column if self.pair else item.column + me * COLUMNS
        self.write(me, item.first, item.end - item.first, column)

    def write(self, me, row, count, column) -> None:
        """Copies the first ``count`` rows of a tile to ``row``, a power of two at a time."""
        r, inside, height = self.r, 0, self.config.rows
        while height:
            part = count & height
            source = r.tiles.at[me, pl.ds(inside, height)]
            place = r.out.at[pl.ds(row, height), pl.ds(column, COLUMNS)]
            pl.when(part > 0)(
                lambda source=source, place=place: plgpu.copy_smem_to_gmem(source, place)
            )
            inside, row, height = inside + part, row + part, height // 2

    def clear(self, me) -> None:
        """Fills this warpgroup's share of the rows that no expert here has with zeros."""
        r, rows = self.r, self.config.rows
        blocks, across = self.config.blocks, r.out.shape[1] // COLUMNS
        own, last = lax.axis_index("block") * WARPGROUPS + me, r.start.shape[0] - 1
        zero = jnp.zeros((rows, COLUMNS), r.out.dtype)
        r.tiles[me] = zero
        plgpu.commit_smem()
        for begin, end in ((0, r.start[0]), (r.behind[last], r.out.shape[0])):
            pieces = pl.cdiv(end - begin, rows) * across

            def piece(i, _, begin=begin, end=end):
                at = own + i * blocks * WARPGROUPS
                row = begin + lax.div(at, across) * rows
                column = pl.multiple_of(lax.rem(at, across) * COLUMNS, COLUMNS)
                self.write(me, row, jnp.minimum(rows, end - row), column)

            share = blocks * WARPGROUPS
            lax.fori_loop(0, lax.div(pieces - own + share - 1, share), piece, None)
