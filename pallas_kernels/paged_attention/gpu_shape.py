"""What the Hopper kernels' code depends on, their memory, and the scalars of an item.

Knows sizes; computes nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.warpgroup import ROWS, tiled


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the code depends on.

    Attributes:
        group: query heads of a kv head.
        kv_heads, head_dim, page_size: of the cache.
        cache: dtype of the pages.
        scaled: whether pages have scales.
        sm_scale: multiplies the scores.
        block: key positions of a step.
        stages: slots of keys and values; of split items a multiple of ``multipliers``.
        split: whether items are parts of a row, of one token each.
        multipliers: warpgroups that multiply.
        interpret: as `plgpu.kernel` takes it.
    """

    group: int
    kv_heads: int
    head_dim: int
    page_size: int
    cache: jnp.dtype
    scaled: bool
    sm_scale: float
    block: int
    stages: int
    split: bool
    multipliers: int = 2
    interpret: object = None

    @property
    def tokens(self) -> int:
        """Of one warpgroup's rows."""
        return 1 if self.split else ROWS // self.group

    @property
    def rows(self) -> int:
        """Rows of a warpgroup that are brought and written, in whole lines of eight."""
        return -(-self.group // 8) * 8 if self.split else ROWS

    @property
    def piece(self) -> int:
        """Key positions that one copy brings."""
        return min(self.page_size, self.block)

    @property
    def copies(self) -> int:
        """Copies that fill a slot."""
        return self.block // self.piece

    @property
    def narrow(self) -> bool:
        """Whether pages are widened before they are multiplied."""
        return self.cache.itemsize == 1

    @property
    def narrow_stages(self) -> int:
        """Slots of 8-bit keys and values; 0 for other pages."""
        return 3 if self.narrow else 0


@dataclasses.dataclass(frozen=True)
class Refs:
    """The kernel's references: arguments and results in global memory, scratch in shared.

    Attributes:
        q, pages, scales, table, items, used, out, norms: as `gpu_kernel.attend` has them.
        q_tile: [multipliers, ROWS, H]; takes the results, too.
        slots: [stages, block, 2H]: keys and values, ready to be multiplied.
        raw: 8-bit [narrow_stages, block, 2H], as pages hold them.
        factors: float32 [stages + narrow_stages, 2, block], the scales of keys and of values.
        sums: float32 [multipliers, ROWS], for ``norms``.
        weights: [multipliers, ROWS, block], only for the interpreter, which multiplies nothing from
            registers.
        asked: barriers [multipliers]: a tile of queries has come.
        ready, taken: barriers [stages]: a slot may be read; may be overwritten.
        landed: barriers [narrow_stages]: a raw slot has come.
        cleaned: a barrier [1] of the multipliers that share a slot.
    """

    q: Any
    pages: Any
    table: Any
    items: Any
    used: Any
    out: Any
    q_tile: Any
    slots: Any
    asked: Any
    ready: Any
    taken: Any
    cleaned: Any
    scales: Any = None
    norms: Any = None
    raw: Any = None
    landed: Any = None
    factors: Any = None
    sums: Any = None
    weights: Any = None


def scratch(shape: Shape) -> dict:
    """By the names of `Refs`; None where there is none."""
    H, block, wide = shape.head_dim, shape.block, shape.multipliers
    narrow, pieces = shape.narrow, shape.copies
    kept = shape.stages + shape.narrow_stages
    return {
        "q_tile": tiled(wide, ROWS, H),
        "slots": tiled(shape.stages, block, 2 * H),
        "raw": tiled(shape.narrow_stages, block, 2 * H, dtype=shape.cache) if narrow else None,
        "factors": plgpu.SMEM((kept, 2, block), jnp.float32) if shape.scaled else None,
        "sums": plgpu.SMEM((wide, ROWS), jnp.float32) if shape.split else None,
        "weights": tiled(wide, ROWS, block) if shape.interpret else None,
        "asked": plgpu.Barrier(num_barriers=wide),
        "ready": plgpu.Barrier(num_arrivals=1 if narrow else pieces, num_barriers=shape.stages),
        "taken": plgpu.Barrier(num_arrivals=1 if shape.split else wide, num_barriers=shape.stages),
        "landed": plgpu.Barrier(
            num_arrivals=pieces * (3 if shape.scaled else 1), num_barriers=shape.narrow_stages
        )
        if narrow
        else None,
        "cleaned": plgpu.Barrier(num_arrivals=wide, num_barriers=1),
    }


@dataclasses.dataclass(frozen=True)
class Item:
    """Scalars: an item's number, its kv head, and what ``items`` has of it."""

    number: jax.Array
    head: jax.Array
    tile: jax.Array
    row: jax.Array
    first: jax.Array
    begin: jax.Array
    end: jax.Array

    def steps(self, shape: Shape) -> jax.Array:
        """How many blocks of positions it has."""
        return lax.div(self.end - self.begin + shape.block - 1, shape.block)
