"""Segment attention for Hopper: tiles of queries of one head, other segments' blocks skipped.

cuDNN takes ragged segments only as a batch padded to the longest: [segments, U] keys for static
shapes, which is segments times the work and memory. So this is a kernel of our own:

    warpgroup 2     |k0 v0 |k1 v1 |k2 v2 |k3 v3 …              blocks of keys -> slots
    warpgroups 0, 1        |q k0 |softmax |p v0 |q k1 …        64 queries each

A tile walks over the key blocks from the first key that any of its queries may see to the last, as
the TPU kernel does. Blocks in the middle, which every query of a tile sees whole, need no mask; of
a single picture those are all blocks but the last.

Heads are widened to whole 32 bytes (72 numbers to 80) by XLA, in the pass that clears what padding
holds; matrix products take them in lines of 128, 64 or 32 bytes.

Shared memory: STAGES slots of 2 * 128 * H numbers and 128 * H of queries: 112 KiB for 64, 140 for
72.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import registry
from pallas_kernels.device import Device
from pallas_kernels.segment_attention import xla
from pallas_kernels.segment_attention.facts import Facts
from pallas_kernels.warpgroup import (
    ROWS,
    along,
    empty,
    normed,
    places,
    product,
    refusal,
    tiled,
    weigh,
)

# Warpgroups that multiply, with ROWS queries each; and with the bringer their registers.
MULTIPLIERS = 2
TILE = MULTIPLIERS * ROWS
REGISTERS, BRINGER_REGISTERS = 232, 40
# Keys of a step, and slots for them.
BLOCK = 128
STAGES = 3


def segment_attention(q_UNH, k_UNH, v_UNH, segment_starts, sm_scale, interpret=None):
    """`pallas_kernels.segment_attention`, on checked arguments.

    Args:
        interpret: as `plgpu.kernel` takes it.
    """
    U, _, H = q_UNH.shape
    if U == 0:
        return q_UNH
    used = jnp.arange(U, dtype=jnp.int32) < segment_starts[-1]
    # What no query sees may be NaN, and a weight of 0 times NaN is no 0.
    v_UNH = jnp.where(used[:, None, None], v_UNH, 0)
    more = -U % TILE
    q, k, v = (jnp.pad(x, ((0, more), (0, 0), (0, -H % 16))) for x in (q_UNH, k_UNH, v_UNH))
    low, high = (jnp.pad(x, (0, more)) for x in xla.seen(segment_starts, U))
    first, blocks, inner_low, inner_high = xla.walks(low, high, TILE, BLOCK)
    # Blocks from `begin` on are seen whole, until `end`.
    begin = jnp.clip(-(-inner_low // BLOCK), first, first + blocks)
    end = jnp.clip(inner_high // BLOCK, begin, first + blocks)
    walks = jnp.stack([first, begin, end, first + blocks])
    out = _call(q, k, v, walks, jnp.stack([low, high]), sm_scale, interpret)
    return out[:U, :, :H]


def _call(q, k, v, walks, bounds, sm_scale, interpret):
    U, N, H = q.shape
    arrivals = plgpu.Barrier(num_barriers=STAGES)
    scratch = {
        "q_tile": tiled(MULTIPLIERS, ROWS, H),
        "keys": tiled(STAGES, BLOCK, H),
        "values": tiled(STAGES, BLOCK, H),
        "low": plgpu.SMEM((MULTIPLIERS, ROWS), jnp.int32),
        "high": plgpu.SMEM((MULTIPLIERS, ROWS), jnp.int32),
        "asked": plgpu.Barrier(num_arrivals=3, num_barriers=MULTIPLIERS),
        "keys_here": arrivals,
        "values_here": arrivals,
        "taken": plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=STAGES),
    }
    if interpret:
        scratch["weights"] = tiled(MULTIPLIERS, ROWS, BLOCK)
    names = ("q", "k", "v", "walks", "bounds", "out", *scratch)

    def body(*refs):
        _block(Refs(**dict(zip(names, refs, strict=True))), sm_scale)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=list(scratch.values()),
        # Heads of a tile side by side: their keys are neighbours in memory.
        grid=(U // TILE * N,),
        grid_names=("work",),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        kernel_name="segment_attention",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(q, k, v, walks, bounds)


@dataclasses.dataclass(frozen=True)
class Refs:
    """The kernel's references: arguments and result in global memory, scratch in shared.

    Attributes:
        q, k, v, out: bfloat16 [U, N, H].
        walks: int32 [4, tiles]: the first block of keys, the first that every query of the tile
            sees whole, the one behind the last of those, and the one behind the last.
        bounds: int32 [2, U], the first key that a query sees and the one behind the last.
        q_tile: [MULTIPLIERS, ROWS, H]; takes the results, too.
        keys, values: [STAGES, BLOCK, H].
        low, high: int32 [MULTIPLIERS, ROWS], ``bounds`` of the tile.
        asked: barriers [MULTIPLIERS]: queries and bounds have come.
        keys_here, values_here, taken: barriers [STAGES]: may be read; may be overwritten.
        weights: [MULTIPLIERS, ROWS, BLOCK], only for the interpreter, which multiplies nothing from
            registers.
    """

    q: Any
    k: Any
    v: Any
    walks: Any
    bounds: Any
    out: Any
    q_tile: Any
    keys: Any
    values: Any
    low: Any
    high: Any
    asked: Any
    keys_here: Any
    values_here: Any
    taken: Any
    weights: Any = None


def _block(refs: Refs, sm_scale: float):
    work, N = lax.axis_index("work"), refs.q.shape[1]
    tile, head = lax.div(work, N), lax.rem(work, N)
    warpgroup = lax.axis_index("warpgroup")
    walk = tuple(refs.walks[i, tile] for i in range(4))

    @pl.when(warpgroup < MULTIPLIERS)
    def _():
        plgpu.set_max_registers(REGISTERS, action="increase")
        _multiply(refs, sm_scale, tile, head, warpgroup, walk)

    @pl.when(warpgroup == MULTIPLIERS)
    def _():
        plgpu.set_max_registers(BRINGER_REGISTERS, action="decrease")
        _bring(refs, head, walk[0], walk[3])


def _bring(refs: Refs, head, first, end):
    """Copies blocks of keys and values to slots; returns when all are taken."""

    @pl.loop(0, end - first)
    def _(i):
        slot = lax.rem(i, STAGES)
        pl.when(i >= STAGES)(lambda: plgpu.barrier_wait(refs.taken.at[slot]))
        here = pl.ds(pl.multiple_of((first + i) * BLOCK, BLOCK), BLOCK)
        plgpu.copy_gmem_to_smem(refs.k.at[here, head], refs.keys.at[slot], refs.keys_here.at[slot])
        plgpu.copy_gmem_to_smem(
            refs.v.at[here, head], refs.values.at[slot], refs.values_here.at[slot]
        )

    @pl.loop(0, jnp.minimum(end - first, STAGES))
    def _(slot):
        plgpu.barrier_wait(refs.taken.at[slot])


def _multiply(refs: Refs, sm_scale, tile, head, warpgroup, walk):
    """One warpgroup's queries, from the first block to the result."""
    first, begin, end, last = walk
    queries = refs.q_tile.at[warpgroup]
    mine = pl.ds(pl.multiple_of(tile * TILE + warpgroup * ROWS, ROWS), ROWS)
    asked = refs.asked.at[warpgroup]
    plgpu.copy_gmem_to_smem(refs.q.at[mine, head], queries, asked)
    plgpu.copy_gmem_to_smem(refs.bounds.at[0, mine], refs.low.at[warpgroup], asked)
    plgpu.copy_gmem_to_smem(refs.bounds.at[1, mine], refs.high.at[warpgroup], asked)
    plgpu.barrier_wait(asked)
    H = queries.shape[1]

    def step(i, carry, *, masked):
        top, total, acc = carry
        slot = lax.rem(i - first, STAGES)
        plgpu.barrier_wait(refs.keys_here.at[slot])
        scores = product(queries, refs.keys.at[slot].T, (ROWS, BLOCK))
        scores = scores * (sm_scale * math.log2(math.e))
        if masked:
            low, high = (
                along(
                    plgpu.load(x.at[warpgroup], layout=plgpu.Layout.WGMMA.reduce(1)), scores.shape
                )
                for x in (refs.low, refs.high)
            )
            key = places(scores.shape)[1] + i * BLOCK
            scores = jnp.where((key >= low) & (key < high), scores, -jnp.inf)
        top, total, decay, weights = weigh(scores, top, total)
        weights = weights.astype(jnp.bfloat16)
        if refs.weights is not None:
            refs.weights.at[warpgroup][...] = weights
            weights = refs.weights.at[warpgroup]
        plgpu.barrier_wait(refs.values_here.at[slot])
        found = product(weights, refs.values.at[slot], (ROWS, H))
        plgpu.barrier_arrive(refs.taken.at[slot])
        return top, total, acc * along(decay, acc.shape) + found

    carry = empty(H)
    for start, stop, masked in ((first, begin, True), (begin, end, False), (end, last, True)):
        carry = lax.fori_loop(start, stop, functools.partial(step, masked=masked), carry)
    _, total, acc = carry
    queries[...] = normed(total, acc).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, refs.out.at[mine, head])
    plgpu.wait_smem_to_gmem(0)


def supports(device: Device, facts: Facts) -> str | None:
    """Why these heads cannot run on this GPU, or None."""
    reason = refusal(device)
    if reason is not None:
        return reason
    if facts.dtype != "bfloat16":
        return f"q, k, v are {facts.dtype}; use bfloat16"
    if facts.head_dim > 128:
        return f"head_dim={facts.head_dim}; use 128 at most"
    return None


IMPL = registry.Impl("segment_attention", "gpu", "gpu", supports, segment_attention)
