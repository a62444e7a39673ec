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

VMEM: three steps of blocks, STEPS * items * block * 2K * H numbers of the cache (6 MiB for 4 heads
of bfloat16), the tiles' queries and results, and 3 float32 arrays of K * rows * 128.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import registry
from pallas_kernels.device import Device
from pallas_kernels.paged_attention import tpu_kernel, tpu_packing, tpu_walk, xla
from pallas_kernels.paged_attention.facts import Facts
from pallas_kernels.paged_attention.schedule import Rows
from pallas_kernels.paged_attention.tpu_walk import Refs, Shape

# Key positions of an item: one lane of scores each, so a multiple of 128; long enough that a step's
# latency is hidden by its copies.
BLOCK = 512
# (Heads of a tile's key/value, times items) that a step of short tiles attends side by side.
CHAINS = 8
# Query rows of a kv head in a tall tile.
TALL_ROWS = 512
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
):
    """`pallas_kernels.paged_attention`, on checked arguments, as a tuple (out, pages, scales).

    Args:
        interpret: as `pallas_call` takes it.
        cores: TensorCores that share the work; default: as many as the device has.
    """
    T, N, H = q_TNH.shape
    if T == 0:
        return q_TNH, pages, scales
    facts = Facts(N, k_TKH.shape[1], H, pages.shape[1], *map(str, (q_TNH.dtype, pages.dtype)), False)
    reason = _reason(facts)
    if reason is not None:
        raise ValueError(f"paged_attention: implementation 'tpu' cannot take this: {reason}")
    info = None if interpret else pltpu.get_tpu_info()
    cores = cores or (info.num_cores if info else 1)
    rows = Rows(row_starts, kv_lens)
    shapes = _shapes(facts, T, page_table.shape, sm_scale, isinstance(interpret, pltpu.InterpretParams))
    lists = [rows.one_token(T)]
    if T > kv_lens.shape[0]:
        lists.append(rows.longer(T, shapes[1].height))
    cached = kv_lens - rows.lengths
    packed = [
        tpu_walk.pack_tiles(count, tiles, cached, cores, shape.block)
        for shape, (count, tiles) in zip(shapes, lists, strict=True)
    ]
    new = jnp.stack([k_TKH, v_TKH], axis=2).reshape(T, -1, H).astype(pages.dtype)
    q = jnp.pad(q_TNH, ((0, 0), (0, shapes[0].padded_heads - N), (0, 0)))
    out, pages = _call(
        shapes, cores, info, interpret, packed, _lines(page_table, pages.shape[0], shapes[0]), q, new, pages
    )
    used = jnp.arange(T, dtype=jnp.int32) < row_starts[-1]
    return jnp.where(used[:, None, None], out[:, :N], 0), pages, scales


def _shapes(facts: Facts, T: int, table: tuple[int, int], sm_scale: float, plain: bool):
    """The walk over tiles of one token and, where T > B, the one over longer tiles."""
    B, W = table
    line = min(LINE, max(128, pl.next_power_of_2(W)))
    block = max(BLOCK, facts.page_size)
    items = max(1, CHAINS // facts.kv_heads)
    height = max(16, pl.next_power_of_2(TALL_ROWS * facts.kv_heads // facts.query_heads + 1) // 2)
    common = functools.partial(
        Shape,
        block=block,
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
    shapes = [common(height=1, items=items)]
    if T > B:
        shapes.append(common(height=height, items=1))
    return shapes


def _lines(page_table, num_pages: int, shape: Shape):
    """The page table as [B * lines, line / 128, 128], so that a line is one copy."""
    B, W = page_table.shape
    page_table = jnp.clip(page_table, 0, num_pages - 1)
    padded = jnp.pad(page_table, ((0, 0), (0, shape.lines * shape.line - W)))
    return padded.reshape(B * shape.lines, shape.line // 128, 128)


def _call(shapes, cores, info, interpret, packed, table, q, new, pages):
    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    limit = None if info is None else int(info.vmem_capacity_bytes * VMEM_SHARE)
    return pl.pallas_call(
        functools.partial(_kernel, shapes, cores),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, pages)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(packed),
            grid=(cores,),
            in_specs=[anywhere] * 4,
            out_specs=[anywhere] * 2,
        ),
        input_output_aliases={len(packed) + 3: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=limit,
            # Page numbers are clipped once; checking every copy costs more than starting it.
            disable_bounds_checks=True,
        ),
        cost_estimate=_cost(q, new, pages),
        interpret=interpret,
        name="paged_attention",
    )(*packed, table, q, new, pages)


def _cost(q, new, pages) -> pl.CostEstimate:
    """Of a context as long as all pages: how long it is, is not known when this is compiled."""
    positions = pages.shape[0] * pages.shape[1]
    (T, N, H), item = q.shape, pages.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * T * N * H * positions,
        transcendentals=T * N * positions,
        bytes_accessed=pages.size * item + 2 * q.size * q.dtype.itemsize + 2 * new.size * item,
    )


def _kernel(shapes, cores, *refs):
    core = pl.program_id(0)
    scalars = refs[: len(shapes)]
    table, q, new, _, out, pages = refs[len(shapes) :]
    for shape, ref in zip(shapes, scalars, strict=True):
        needed = tpu_walk.scratch(shape, q.dtype, pages.dtype, scaled=False)
        names = [name for name, each in needed.items() if each is not None]

        def body(*scratch, shape=shape, ref=ref, names=names, needed=needed):
            found = dict.fromkeys(needed) | dict(zip(names, scratch, strict=True))
            walk = Refs(table=table, q=q, new=new, pages=pages, scales=None, out=out, **found)
            tiles = tpu_walk.TileScalars(ref, cores)
            tpu_kernel.walk(shape, tiles, walk, core)

        pl.run_scoped(body, *(needed[name] for name in names))


def _reason(facts: Facts) -> str | None:
    if facts.head_dim != 128:
        return (
            f"head_dim={facts.head_dim}: a position's heads fill 128 lanes, and XLA pads a cache of "
            "another width to 128 anyway; use head_dim 128 or kernels={'paged_attention': 'xla'}"
        )
    return None


def supports(device: Device, facts: Facts) -> str | None:
    """Why these heads and this cache cannot run on a TPU, or None."""
    return _reason(facts)


IMPL = registry.Impl("paged_attention", "tpu", "tpu", supports, paged_attention)
