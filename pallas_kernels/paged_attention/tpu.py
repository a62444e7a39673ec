"""Paged attention for TPU: one kernel writes the new keys and values, and attends over the pages.

Rows are cut into tiles of tokens (`schedule`): rows with one new token make tiles of one token,
longer rows make tall tiles. A tile meets its row's positions in blocks, and a (tile, block) pair is
an item. The kernel walks over all items in order, first of the short tiles, then of the tall ones:

    tile       0        1     2           3                a row's context never pads another's
    block    0 1 2      0    0 1     0 1 2 3 4
    steps   |0   |1    |2   |3   |4    |5 …                two items side by side in a step

- Keys and values: one copy brings both of a page; a block is a few pages, three steps' blocks are
  in flight, and of a row's last page only the positions in use are copied.
- New keys and values are read from the argument, rounded as the cache stores them, and go to their
  pages by copies that nothing waits for until the end: see `tpu_copies` for why that has no race.
- A step of short tiles attends several items in one run of code, so that one item's matrix products
  hide another's reductions. All query heads of a kv head are one tile of the matrix unit: its
  16 rows of bfloat16 hold 12 heads (96/8) as they come, without padding in HBM.
- A tall tile orders its rows by query head, then by token: any ratio of heads fills its rows.

What limits decode beyond the bandwidth, by the static schedule of `scripts/bench_kernels.py`: a
step's copies are started by scalar code that no vector code overlaps (9 bundles a page, and what
only a row's last block needs), so few heads of small pages feel it, pages of 256 less; and on v7x
a step's vector and matrix work alone takes 1.2 times as long as its copies, in 8 bits 2.1 times.

VMEM: three steps of blocks, STEPS * items * block * 2K * H numbers of the cache (3 MiB for 4 heads
of bfloat16), the tiles' queries and results, and 3 float32 arrays of K * rows * 128.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import registry
from pallas_kernels.device import Device, tpu_info
from pallas_kernels.paged_attention import (
    tpu_config,
    tpu_copies,
    tpu_kernel,
    tpu_packing,
    tpu_walk,
    xla,
)
from pallas_kernels.paged_attention.facts import Facts
from pallas_kernels.paged_attention.schedule import Rows
from pallas_kernels.paged_attention.tpu_config import Config
from pallas_kernels.paged_attention.tpu_walk import Refs, Shape

# Page-table entries per line at most.
LINE = 1024
# Of the device's VMEM, what the kernel may use; the compiler spills into the rest.
VMEM_SHARE = 0.9


def paged_attention(
    q_TNH,
    k_TKH,
    v_TKH,
    pages,
    scales,
    *,
    row_starts,
    kv_lens,
    page_table,
    sm_scale,
    interpret=False,
    cores=None,
    config: Config | None = None,
):
    """`pallas_kernels.paged_attention`, on checked arguments, as a tuple (out, pages, scales).

    Args:
        interpret: as `pallas_call` takes it.
        cores: TensorCores that share the work; default: as many as the device has.
        config: overrides the sizes.
    """
    T, N, H = q_TNH.shape
    if T == 0:
        return q_TNH, pages, scales
    facts = Facts.of(q_TNH, pages, scales)
    device = Device.current()
    info = None if interpret else tpu_info(device.kind)
    cores = cores or (info.num_cores if info else 1)
    rows = Rows(row_starts, kv_lens)
    plain = isinstance(interpret, pltpu.InterpretParams)
    config = config or tpu_config.choose(facts, kv_lens.shape[0] >= T, device)
    shapes = _shapes(facts, config, T, page_table.shape, sm_scale, plain)
    lists = [rows.one_token(T)]
    if kv_lens.shape[0] < T:
        lists.append(rows.longer(T, shapes[1].height))
    touched = rows.touched(T, facts.page_size)
    packed = [
        tpu_walk.pack_tiles(count, tiles, kv_lens - rows.lengths, touched.base, cores, shape)
        for shape, (count, tiles) in zip(shapes, lists, strict=True)
    ]
    page_table = jnp.clip(page_table, 0, pages.shape[0] - 1)
    new = jnp.stack([k_TKH, v_TKH], axis=2).reshape(T, -1, H)
    fresh = None
    if scales is None:
        new = new.astype(pages.dtype)
    else:
        new, new_scales = xla.quantize(new, pages.dtype)
        fresh = _fresh_scales(touched, new_scales, scales, page_table)
    operands = {
        "table": _lines(page_table, shapes[0]),
        "q": jnp.pad(q_TNH, ((0, 0), (0, shapes[0].padded_heads - N), (0, 0))),
        "new": new,
        "fresh": fresh,
        "pages": pages,
        "scales": scales,
    }
    out, pages, scales = _call(shapes, cores, info, interpret, packed, operands)
    used = jnp.arange(T, dtype=jnp.int32) < row_starts[-1]
    return jnp.where(used[:, None, None], out[:, :N], 0), pages, scales


def _shapes(facts: Facts, config: Config, T: int, table, sm_scale: float, plain: bool):
    """The walk over tiles of one token and, where T > B, the one over longer tiles."""
    B, W = table
    line = min(LINE, max(128, pl.next_power_of_2(W)))
    short = max(
        facts.page_size, min(config.longest, max(config.block, config.step // facts.kv_heads))
    )
    items = max(1, config.step // (facts.kv_heads * short))
    rows = config.tall_rows * facts.kv_heads // facts.query_heads
    height = max(16, pl.next_power_of_2(rows + 1) // 2)
    common = functools.partial(
        Shape,
        page_size=facts.page_size,
        line=line,
        lines=pl.cdiv(W, line),
        heads=facts.query_heads,
        kv_heads=facts.kv_heads,
        padded_heads=tpu_packing.padded(facts.query_heads, facts.dtype),
        head_dim=facts.head_dim,
        sm_scale=sm_scale,
        plain=plain,
    )
    shapes = [common(height=1, items=items, block=short)]
    if T > B:
        shapes.append(common(height=height, items=1, block=max(config.block, facts.page_size)))
    return shapes


def walk_lengths(
    facts: Facts, new_tokens, kv_lens, device: Device
) -> tuple[int, tuple[float, ...]]:
    """What a schedule's time depends on, for benchmarks.

    Returns:
        Key positions that are copied into VMEM, and how often the loop over steps and the loop in
        it (which clears what a block lacks) run on each core.
    """
    config = tpu_config.choose(facts, sum(new_tokens) <= len(kv_lens), device)
    shapes = _shapes(facts, config, sum(new_tokens), (len(kv_lens), 1), 1.0, False)
    read, steps, cleared = 0, 0.0, 0.0
    for n, length in zip(new_tokens, kv_lens, strict=True):
        shape = shapes[0] if n == 1 else shapes[-1]
        for end in range(length - n + shape.height, length + shape.height, shape.height):
            seen = min(end, length)
            read += seen
            steps += pl.cdiv(seen, shape.block) / shape.items
            cleared += -seen % shape.block
    return read, (steps / tpu_info(device.kind).num_cores, cleared / tpu_copies.CLEARED / steps)


def _lines(page_table, shape: Shape):
    """The page table as [B * lines, line / 128, 128], so that a line is one copy."""
    B, W = page_table.shape
    padded = jnp.pad(page_table, ((0, 0), (0, shape.lines * shape.line - W)))
    return padded.reshape(B * shape.lines, shape.line // 128, 128)


def _fresh_scales(touched, new_scales, scales, page_table):
    """The scales of every page that gets tokens, as they will be: float32 [pages, 2K, page_size].

    A single scale is too small for a copy, so the kernel copies them by the page.
    """
    size = scales.shape[2]
    padded = jnp.pad(new_scales, ((size, size), (0, 0)))
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, padded, slice_size=size)
    mine = jax.vmap(cut)(touched.token + size)
    at = jnp.arange(size, dtype=jnp.int32)
    new = (at >= touched.low[:, None]) & (at < touched.high[:, None])
    old = scales[page_table[touched.row, jnp.clip(touched.index, 0, page_table.shape[1] - 1)]]
    return jnp.where(new[:, None], jnp.einsum("psk->pks", mine), old)


def _call(shapes, cores, info, interpret, packed, operands):
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    limit = None if info is None else int(info.vmem_capacity_bytes * VMEM_SHARE)
    given = {name: x for name, x in operands.items() if x is not None}
    # The queries' buffer takes no result; the cache's take theirs.
    results = [name for name in ("q", "pages", "scales") if name in given]
    where = {name: len(packed) + i for i, name in enumerate(given)}
    done = pl.pallas_call(
        functools.partial(_kernel, shapes, cores, tuple(given), tuple(results)),
        out_shape=[jax.ShapeDtypeStruct(given[x].shape, given[x].dtype) for x in results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(packed),
            grid=(cores,),
            in_specs=[hbm] * len(given),
            out_specs=[hbm] * len(results),
        ),
        input_output_aliases={where[name]: i for i, name in enumerate(results) if name != "q"},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=limit,
            # Page numbers are clipped once; checking every copy costs more than starting it.
            disable_bounds_checks=True,
        ),
        cost_estimate=_cost(operands["q"], operands["new"], operands["pages"]),
        interpret=interpret,
        name="paged_attention",
    )(*packed, *given.values())
    return done if "scales" in given else (*done, None)


def _cost(q, new, pages) -> pl.CostEstimate:
    """Of a context as long as all pages: how long it is, is not known when this is compiled."""
    positions = pages.shape[0] * pages.shape[1]
    (T, N, H), item = q.shape, pages.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * T * N * H * positions,
        transcendentals=T * N * positions,
        bytes_accessed=pages.size * item + 2 * q.size * q.dtype.itemsize + 2 * new.size * item,
    )


def _kernel(shapes, cores, given, results, *refs):
    core = pl.program_id(0)
    n = len(shapes)
    scalars, refs = refs[:n], refs[n:]
    hbm: dict[str, Any] = {"fresh": None, "scales": None, **dict(zip(given, refs, strict=False))}
    # The cache is read and written where it comes out, which is where it came in.
    hbm |= {
        "out" if x == "q" else x: ref for x, ref in zip(results, refs[len(given) :], strict=True)
    }
    for shape, ref in zip(shapes, scalars, strict=True):
        scaled = hbm["scales"] is not None
        needed = tpu_walk.scratch(shape, hbm["q"].dtype, hbm["pages"].dtype, scaled)
        names = [name for name, each in needed.items() if each is not None]

        def body(*scratch, shape=shape, ref=ref, names=names, needed=needed):
            found = dict.fromkeys(needed) | dict(zip(names, scratch, strict=True))
            tiles = tpu_walk.TileScalars(ref, cores)
            tpu_kernel.walk(shape, tiles, Refs(**hbm, **found), core)

        pl.run_scoped(body, *(needed[name] for name in names))


def supports(device: Device, facts: Facts) -> str | None:
    """Why these heads and this cache cannot run on a TPU, or None."""
    if facts.head_dim != 128:
        return (
            f"head_dim={facts.head_dim}: a cache of heads that are not 128 wide is padded to 128 "
            "lanes; use head_dim 128"
        )
    if facts.dtype not in ("bfloat16", "float32"):
        return f"queries are {facts.dtype}; use bfloat16 or float32"
    if facts.kv_dtype not in ("float32", "bfloat16", *xla.LARGEST):
        return f"pages are {facts.kv_dtype}; use float32, bfloat16 or {list(xla.LARGEST)}"
    if not tpu_packing.strided(2 * facts.kv_heads, jnp.dtype(facts.kv_dtype)):
        few = (
            "2, 4 or a multiple of 8" if jnp.dtype(facts.kv_dtype).itemsize == 1 else "1, 2, 4, 8 …"
        )
        return (
            f"{facts.kv_heads} kv heads of {facts.kv_dtype} do not fill whole 32-bit words of "
            f"whole tiles; use {few} heads per device or a wider kv_cache_dtype"
        )
    if facts.page_size & (facts.page_size - 1) or not 16 <= facts.page_size <= 1024:
        return f"page_size={facts.page_size}; use a power of two from 16 to 1024"
    if facts.scaled and facts.page_size % 128:
        return (
            f"page_size={facts.page_size}: a page's scales fill 128 lanes; use a multiple of 128, "
            "or a cache without scales"
        )
    return None


IMPL = registry.Impl("paged_attention", "tpu", "tpu", supports, paged_attention)
