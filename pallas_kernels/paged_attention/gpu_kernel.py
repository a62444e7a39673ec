"""The Hopper kernel that attends: one warpgroup brings pages, two multiply.

Knows tiles, items and pages; knows no batch. An item is a tile of query rows of one kv head and a
range of its row's key positions, `block` of which are a step. Every multiprocessor takes one item
after another, and the bringer is ahead of the multipliers by as many steps as there are slots:

    bringer      |copy 0 |copy 1 |copy 2 |copy 3 |copy 0 of the next item …     pages -> slots
    multiplier 0         |q k0 |softmax |p v0 |              |q k2 |softmax |p v2 |
    multiplier 1                 |q k1 |softmax |p v1 |              |q k3 …

- A slot holds keys and values side by side, [block, 2H], because a page does: one copy brings both
  of a page, and where a page is shorter than a block several copies fill a slot.
- Split items, of one token each, deal their steps out to the multipliers in turn, and each makes a
  part of its own. Otherwise each multiplier has rows of its own, and sees every step.
- Key positions behind the item's end are in no product: of a slot that reaches over it those
  values are overwritten with zeros (a weight of 0 times NaN is no 0). Pages behind the end are
  never looked up; the last one is brought again instead.
- Pages of 8 bits land in slots of their own, and the bringer widens them. Their scales, one per
  position, multiply the scores and the weights, in float32.
- Query rows are ordered by token, then by head of the group, so that row r sees the key positions
  up to ``first + r // group``: r >= (position - first) * group.

Rows of a tile that are no queries hold anything, and are never read back.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.gpu_bring import bring, drain, widen
from pallas_kernels.paged_attention.gpu_shape import Item, Refs, Shape, scratch
from pallas_kernels.warpgroup import LEAST, ROWS, along, empty, normed, places, product, weigh

# Registers of a thread of the bringer, with and without widening; the multipliers get the others.
BRINGER = {False: 56, True: 96}
REGISTERS = 64 * 1024 // 128


def attend(shape: Shape, q, pages, scales, table, items, used, *, processors: int):
    """Every item's result.

    Args:
        q: bfloat16 [tiles, K, rows, H], by token and then by head of the group: all rows of a short
            tile, ROWS for every multiplier of a tall one.
        pages: [pages, page_size, K, 2H], a head's key and value side by side.
        scales: None, or float32 [pages, 2K, page_size].
        table: int32 [B, W].
        items: int32 [5, items]: the tile, its row, the position of the tile's first token, and
            the first key position and the one behind the last.
        used: int32 [1]: how many items there are. The last come first: they are the longest.
        processors: multiprocessors of the device.

    Returns:
        Split: bfloat16 [items, multipliers, K, rows, 2H], the sum of two being the part, and
        float32 [items, multipliers, K, ROWS], log2 of its sum of weights (LEAST for no weights).
        Otherwise bfloat16 [items, 1, K, multipliers * ROWS, H]. Undefined behind the last item.
    """
    count, K, H = items.shape[1], shape.kv_heads, shape.head_dim
    parts, rows, width = (
        (shape.multipliers, shape.rows, 2 * H) if shape.split else (1, shape.multipliers * ROWS, H)
    )
    out = [jax.ShapeDtypeStruct((count, parts, K, rows, width), jnp.bfloat16)]
    if shape.split:
        out.append(jax.ShapeDtypeStruct((count, parts, K, ROWS), jnp.float32))
    given = {"q": q, "pages": pages, "scales": scales, "table": table, "items": items, "used": used}
    given = {name: x for name, x in given.items() if x is not None}
    own = {name: x for name, x in scratch(shape).items() if x is not None}
    names = (*given, "out", *(["norms"] if shape.split else []), *own)

    def body(*refs):
        _block(shape, Refs(**dict(zip(names, refs, strict=True))))

    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=list(own.values()),
        grid=(min(processors, count * K),),
        grid_names=("block",),
        num_threads=shape.multipliers + 1,
        thread_name="warpgroup",
        kernel_name=f"paged_attention_{'short' if shape.split else 'tall'}",
        interpret=shape.interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(*given.values())


def _block(shape: Shape, refs: Refs):
    warpgroup = lax.axis_index("warpgroup")
    fewer = BRINGER[shape.narrow]
    more = (REGISTERS - fewer) // shape.multipliers // 8 * 8

    @pl.when(warpgroup < shape.multipliers)
    def _():
        plgpu.set_max_registers(more, action="increase")
        _each(shape, refs, functools.partial(_multiply, shape, refs, warpgroup))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == shape.multipliers)
    def _():
        plgpu.set_max_registers(fewer, action="decrease")
        steps = _each(shape, refs, functools.partial(widen if shape.narrow else bring, shape, refs))
        drain(shape, refs, steps)


def _each(shape: Shape, refs: Refs, do):
    """``do(item, steps of the items before it)`` for every item here; returns all their steps."""
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    work = refs.used[0] * shape.kv_heads

    def one(i, before):
        each = work - 1 - (block + i * blocks)
        number = lax.div(each, shape.kv_heads)
        fields = (refs.items[field, number] for field in range(5))
        item = Item(number, lax.rem(each, shape.kv_heads), *fields)
        do(item, before)
        return before + item.steps(shape)

    return lax.fori_loop(0, lax.div(work - block + blocks - 1, blocks), one, jnp.int32(0))


def _multiply(shape: Shape, refs: Refs, warpgroup, item: Item, before):
    """One warpgroup's share of an item, from the first step to the result."""
    H, block = shape.head_dim, shape.block
    # Of split items: every which step from which one, so that a slot always is the same one's.
    stride = shape.multipliers if shape.split else 1
    begin = lax.rem(warpgroup + stride - lax.rem(before, stride), stride) if shape.split else 0
    first = item.first if shape.split else item.first + warpgroup * shape.tokens
    _fetch_queries(shape, refs, warpgroup, item)

    def step(i, carry, *, masked):
        top, total, acc = carry
        i = begin + i * stride
        slot = lax.rem(before + i, shape.stages)
        plgpu.barrier_wait(refs.ready.at[slot])
        keys, values = (refs.slots.at[slot, :, pl.ds(part * H, H)] for part in range(2))
        scores = product(refs.q_tile.at[warpgroup], keys.T, (ROWS, block))
        scores = scores * (shape.sm_scale * math.log2(math.e))
        if shape.scaled:
            scores = scores * _factors(shape, refs, before + i, 0)
        start = item.begin + i * block
        seen = _seen(shape, start - first, item.end - start) if masked else None
        scores = scores if seen is None else jnp.where(seen, scores, -jnp.inf)
        top, total, decay, weights = weigh(scores, top, total)
        if shape.scaled:
            weights = weights * _factors(shape, refs, before + i, 1)
            weights = weights if seen is None else jnp.where(seen, weights, 0.0)
        if masked and not shape.narrow:
            _clean(shape, refs, slot, warpgroup, item.end - start)
        weights = weights.astype(jnp.bfloat16)
        if shape.interpret:
            refs.weights.at[warpgroup][...] = weights
            weights = refs.weights.at[warpgroup]
        found = product(weights, values, (ROWS, H))
        plgpu.barrier_arrive(refs.taken.at[slot])
        return top, total, acc * along(decay, acc.shape) + found

    # Every row sees the whole of the steps before this one.
    whole = jnp.maximum(lax.div(jnp.minimum(item.end, first + 1) - item.begin, block), 0)
    whole, steps = (lax.div(n - begin + stride - 1, stride) for n in (whole, item.steps(shape)))
    carry = lax.fori_loop(0, whole, functools.partial(step, masked=False), empty(H))
    carry = lax.fori_loop(whole, steps, functools.partial(step, masked=True), carry)
    _write(shape, refs, warpgroup, item, *carry)


def _fetch_queries(shape: Shape, refs: Refs, warpgroup, item: Item):
    row = 0 if shape.split else pl.multiple_of(warpgroup * ROWS, ROWS)
    # The results of the item before stood here.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.copy_gmem_to_smem(
        refs.q.at[item.tile, item.head, pl.ds(row, shape.rows)],
        refs.q_tile.at[warpgroup, pl.ds(0, shape.rows)],
        refs.asked.at[warpgroup],
    )
    plgpu.barrier_wait(refs.asked.at[warpgroup])


def _seen(shape: Shape, ahead, left):
    """bool [ROWS, block]: what rows see of a slot.

    Args:
        ahead: the slot's first position minus that of the rows' first token.
        left: the item's positions from the slot's first one on.
    """
    rows, position = places((ROWS, shape.block))
    return (rows >= (position + ahead) * shape.group) & (position < left)


def _factors(shape: Shape, refs: Refs, step, part):
    """float32 [ROWS, block]: the scales of a step's keys (part 0) or values (1)."""
    kept = lax.rem(step, shape.stages + shape.narrow_stages)
    scales = plgpu.load(refs.factors.at[kept, part], layout=plgpu.Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(scales, (ROWS, shape.block), [1])


def _clean(shape: Shape, refs: Refs, slot, warpgroup, left):
    """Overwrites the values from position ``left`` of a slot on with zeros."""

    @pl.when(left < shape.block)
    def _():
        # Those who share a slot clean a part each, and wait for each other.
        shared = not shape.split and shape.multipliers > 1
        height = shape.block // (shape.multipliers if shared else 1)
        start = pl.multiple_of(warpgroup * height, height) if shared else 0
        H = shape.head_dim
        place = refs.slots.at[slot, pl.ds(start, height), pl.ds(H, H)]
        position = lax.broadcasted_iota(jnp.int32, (height, H), 0) + start
        place[...] = jnp.where(position < left, place[...], jnp.zeros((height, H), jnp.bfloat16))
        plgpu.commit_smem()
        if shared:
            plgpu.barrier_arrive(refs.cleaned.at[0])
            plgpu.barrier_wait(refs.cleaned.at[0])


def _write(shape: Shape, refs: Refs, warpgroup, item: Item, top, total, acc):
    """Brings the normed sum to where it belongs, by way of the queries' place."""
    tile = refs.q_tile.at[warpgroup]
    acc = normed(total, acc)
    high = acc.astype(jnp.bfloat16)
    tile[...] = high
    if shape.split:
        refs.sums.at[warpgroup][...] = jnp.where(total > 0, top + jnp.log2(total), LEAST)
    plgpu.commit_smem()
    if not shape.split:
        row = pl.multiple_of(warpgroup * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(tile, refs.out.at[item.number, 0, item.head, pl.ds(row, ROWS)])
        return
    H = shape.head_dim
    place = refs.out.at[item.number, warpgroup, item.head]
    plgpu.copy_smem_to_gmem(
        refs.sums.at[warpgroup], refs.norms.at[item.number, warpgroup, item.head]
    )
    plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, shape.rows)], place.at[:, pl.ds(0, H)])
    # Float32 as two bfloat16s: 16 bits, where the result keeps 8.
    low = (acc - high.astype(jnp.float32)).astype(jnp.bfloat16)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    tile[...] = low
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, shape.rows)], place.at[:, pl.ds(H, H)])
