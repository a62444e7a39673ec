"""What a walk over tiles works on: static sizes, the tiles' scalars, buffers and semaphores.

Knows shapes and memory spaces; knows neither the copies (`tpu_copies`) nor the arithmetic
(`tpu_attend`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.schedule import Tiles

# Lines of the page table, and steps of keys and values, that are in flight or in use.
LINES = 8
STEPS = 3


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a walk.

    Attributes:
        block: key positions of an item, a power of two and a whole number of pages.
        page_size: positions of a page, a power of two.
        line: page-table entries fetched at once, at least those of a block.
        lines: lines of one row of the page table.
        heads, kv_heads: N and K.
        padded_heads: heads of q and out as they lie in memory.
        head_dim: H.
        height: tokens of a tile, a power of two.
        items: (tile, block) items that one step attends side by side; 1 where height is not.
        sm_scale: multiplies the scores.
        plain: read heads by index, for the interpreter.
    """

    block: int
    page_size: int
    line: int
    lines: int
    heads: int
    kv_heads: int
    padded_heads: int
    head_dim: int
    height: int
    items: int
    sm_scale: float
    plain: bool

    @property
    def pages(self) -> int:
        """Pages of a block."""
        return self.block // self.page_size

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads

    @property
    def rings(self) -> int:
        """Buffers for tiles: a power of two, more than can be in flight at once."""
        return pl.next_power_of_2(STEPS * self.items + 1)


@dataclasses.dataclass(frozen=True)
class Refs:
    """Operands in HBM, then scratch.

    Attributes:
        table: int32 [B * lines, line / 128, 128].
        q, out: [T, padded N, H].
        new: [T, 2K, H], the new tokens' keys and values as the cache stores them.
        fresh: float32 [touched pages, 2K, page_size], their scales after this call, or None.
        pages: [num_pages, page_size, 2K, H].
        scales: float32 [num_pages, 2K, page_size] or None.
        lines: SMEM.
        kv, kv_scales: a block of each item in flight.
        q_ring, out_ring: tiles as they lie in HBM; the last of out_ring is for items behind the
            end.
        q_heads: queries of each kv head, [K, group * height, H] or, for one token, [N, H] per item.
        out_heads: [items, N, H] float32, for tiles of one token.
        top, total, acc: the online softmax of each query row.
    """

    table: Any
    q: Any
    new: Any
    fresh: Any
    pages: Any
    scales: Any
    out: Any
    lines: Any
    kv: Any
    kv_scales: Any
    q_ring: Any
    out_ring: Any
    q_heads: Any
    out_heads: Any
    top: Any
    total: Any
    acc: Any
    line_sem: Any
    kv_sem: Any
    scale_sem: Any
    q_sem: Any
    out_sem: Any
    write_sem: Any


def scratch(shape: Shape, q_dtype, kv_dtype, scaled: bool) -> dict[str, Any]:
    """Scratch of a walk, by the name in `Refs`."""
    K, N, H, items = shape.kv_heads, shape.padded_heads, shape.head_dim, shape.items
    buffers, rows = STEPS * items, shape.group * shape.height
    one = shape.height == 1
    per_page = (buffers, shape.pages, 2 * K, shape.page_size)
    return {
        "lines": pltpu.SMEM((LINES, shape.line // 128, 128), jnp.int32),
        "kv": pltpu.VMEM((buffers, shape.block, 2 * K, H), kv_dtype),
        "kv_scales": pltpu.VMEM(per_page, jnp.float32) if scaled else None,
        "q_ring": pltpu.VMEM((shape.rings, shape.height, N, H), q_dtype),
        "out_ring": pltpu.VMEM((shape.rings + 1, shape.height, N, H), q_dtype),
        "q_heads": pltpu.VMEM((items, N, H), jnp.float32)
        if one
        else pltpu.VMEM((K, rows, H), q_dtype),
        "out_heads": pltpu.VMEM((items, N, H), jnp.float32) if one else None,
        "top": pltpu.VMEM((K, rows, 128), jnp.float32),
        "total": pltpu.VMEM((K, rows, 128), jnp.float32),
        "acc": pltpu.VMEM((K, rows, H), jnp.float32),
        "line_sem": pltpu.SemaphoreType.DMA((LINES,)),
        "kv_sem": pltpu.SemaphoreType.DMA((buffers,)),
        "scale_sem": pltpu.SemaphoreType.DMA((buffers + 1,)) if scaled else None,
        "q_sem": pltpu.SemaphoreType.DMA((shape.rings,)),
        "out_sem": pltpu.SemaphoreType.DMA((shape.rings,)),
        "write_sem": pltpu.SemaphoreType.DMA((1,)),
    }


def pack_tiles(count, tiles: Tiles, cached_B, base_B, cores: int, shape: Shape) -> jax.Array:
    """The scalars of `TileScalars` as one int32 array; cores get like numbers of blocks.

    Args:
        count: how many of the tiles there are.
        tiles: of a static size.
        cached_B: positions of each row that were cached before this call.
        base_B: ``schedule.Touched.base``.
    """
    n = tiles.row.shape[0]
    exists = jnp.arange(n) < count
    visible = tiles.position + tiles.tokens
    blocks = jnp.cumsum(jnp.where(exists, -(-visible // shape.block), 0))
    goal = blocks[-1] // cores * jnp.arange(1, cores, dtype=jnp.int32)
    inner = jnp.searchsorted(blocks, goal).astype(jnp.int32)
    bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), inner, count.astype(jnp.int32)[None]])
    # A page is a tile's if the first of its new positions is.
    cached, size = cached_B[tiles.row], shape.page_size
    own = jnp.where(tiles.position == cached, cached // size, -(-tiles.position // size))
    sums = [
        jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(jnp.where(exists, x, 0))])[bounds]
        for x in (tiles.tokens, -(-visible // size) - own)
    ]
    fields = (tiles.row, tiles.token, tiles.tokens, tiles.position, cached, base_B[tiles.row])
    return jnp.concatenate([*fields, bounds, *sums]).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class TileScalars:
    """The tiles of a walk, read out of SMEM as `pack_tiles` put them there."""

    ref: Any
    cores: int

    @property
    def most(self) -> int:
        """The static number of tiles."""
        return (self.ref.shape[0] - 3 * (self.cores + 1)) // 6

    def _field(self, i: int, tile):
        return self.ref[i * self.most + jnp.minimum(tile, self.most - 1)]

    def row(self, tile):
        """The row that a tile is of."""
        return self._field(0, tile)

    def token(self, tile):
        """Its first flat token."""
        return self._field(1, tile)

    def tokens(self, tile):
        """How many it has, at least 1."""
        return self._field(2, tile)

    def position(self, tile):
        """The position of its first token."""
        return self._field(3, tile)

    def cached(self, tile):
        """Positions of its row that were in the cache before this call."""
        return self._field(4, tile)

    def touched(self, tile):
        """What to add to the index of one of its row's new pages for its number among all."""
        return self._field(5, tile)

    def visible(self, tile):
        """Positions that its last token sees, which is where its last block ends."""
        return self.position(tile) + self.tokens(tile)

    def bound(self, core):
        """The first tile of a core: the end of the core before it."""
        return self.ref[6 * self.most + core]

    def written(self, core):
        """How many tokens it writes, and to how many pages it is the first to write."""
        starts = (6 * self.most + (self.cores + 1) * i + core for i in (1, 2))
        return tuple(self.ref[i + 1] - self.ref[i] for i in starts)

    def advance(self, tile, at, span: int):
        """The next piece of ``span`` positions: of the same tile, or the first of the next one."""
        more = (at + 1) * span < self.visible(tile)
        return jnp.where(more, tile, tile + 1), jnp.where(more, at + 1, 0)


def split(n, size: int):
    """``n // size`` and ``n % size`` for n >= 0 and a power of two, in one operation each."""
    return lax.shift_right_logical(n, jnp.int32(size.bit_length() - 1)), n & (size - 1)


def pieces(count, most: int, body) -> None:
    """Calls ``body(offset, size)`` for the static sizes, powers of two, that make up ``count``.

    A copy's size is static on TPU, and at most what it copies from. ``count`` is at most ``most``.
    """
    size = 1 << most.bit_length() >> 1
    while size:

        @pl.when((count & size) != 0)
        def _(size=size):
            body(count & -(2 * size), size)

        size //= 2
