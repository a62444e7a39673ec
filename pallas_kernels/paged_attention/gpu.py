"""Paged attention for Hopper: pages through the copy engine, products by warpgroups.

1. *Write*: XLA scatters the new keys and values into the donated cache, as `xla` does. It is one
   fusion, which rounds, quantises and lays out K and V on the way; a kernel of our own could only
   begin when those were in memory.
2. *Short rows*: a row of one new token is a tile of all query heads of a kv head. Its context is
   cut into parts (`schedule.Tiles.parts`), about as many as there are multiprocessors, whatever the
   lengths of rows are; `gpu_combine` makes one result of each row's.
3. *Tall rows*: longer rows are cut into tiles of 2 * 64 query rows (tokens times heads), each of
   which walks over its context alone. Tiles of late tokens start first: they take longest.
4. Every token takes its result from where it was computed.

Both kinds run the same kernel, `gpu_kernel`, of which one block of threads fills a multiprocessor.
Only with T > B is the second kind in the program.

                    rows        block   slots              shared memory
    short, 16 bit   64          64      4 x 32 KiB         160 KiB and 3 for sums
    short, 8 bit    64          64      4 x 32 + 3 x 16    208 KiB
    tall, 16 bit    2 x 64      128     2 x 64 KiB         160 KiB
    tall, 8 bit     2 x 64      64      3 x 32 + 3 x 16    176 KiB

Of a short tile's 64 rows only those of the group are used: wgmma knows no smaller ones. By the
machine's figures its products take a third of the time that the copies of 16-bit pages take.
"""

import jax.numpy as jnp

from pallas_kernels import hopper, narrow, registry
from pallas_kernels.device import Device
from pallas_kernels.paged_attention import gpu_combine, gpu_kernel, xla
from pallas_kernels.paged_attention.facts import Facts
from pallas_kernels.paged_attention.gpu_shape import Shape
from pallas_kernels.paged_attention.schedule import Rows, Tiles
from pallas_kernels.warpgroup import ROWS, refusal

# Blocks of key positions in a part at least: one for each warpgroup that multiplies.
LEAST_BLOCKS = 2


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
    interpret=None,
):
    """`pallas_kernels.paged_attention`, on checked arguments, as a tuple (out, pages, scales).

    Args:
        interpret: as `plgpu.kernel` takes it.
    """
    T, N, H = q_TNH.shape
    if T == 0:
        return q_TNH, pages, scales
    num_pages, page_size, heads, _ = pages.shape
    K = heads // 2
    facts = Facts.of(q_TNH, pages, scales)
    rows = Rows(row_starts, kv_lens)
    table = jnp.clip(page_table, 0, num_pages - 1)
    cache = xla.Cache(narrow.as_bits(pages), scales, table, pages.dtype)
    cache = xla.write(k_TKH, v_TKH, cache, rows)
    pages, scales = narrow.from_bits(cache.pages, pages.dtype), cache.scales
    q_TKGH = q_TNH.reshape(T, K, N // K, H)
    operands = {
        "pages": pages.reshape(num_pages, page_size, K, 2 * H),
        "scales": scales,
        "table": table,
    }
    out = _short(facts, rows, q_TKGH, sm_scale, interpret, operands)
    if kv_lens.shape[0] < T:
        out = _merge(rows, out, *_tall(facts, rows, q_TKGH, sm_scale, interpret, operands))
    return out, pages, scales


def _short(facts: Facts, rows: Rows, q_TKGH, sm_scale, interpret, operands):
    """Rows of one token: [T, N, H], undefined for tokens of longer rows."""
    shape, T = short_shape(facts, sm_scale, interpret), q_TKGH.shape[0]
    _, tiles = rows.one_token(T)
    processors = _processors()
    parts = tiles.parts(shape.block, LEAST_BLOCKS, max(1, processors // facts.kv_heads))
    tile = parts.tile
    items = (tiles.token[tile], tiles.row[tile], tiles.position[tile], parts.begin, parts.end)
    q = jnp.pad(q_TKGH, ((0, 0), (0, 0), (0, shape.rows - shape.group), (0, 0)))
    found, norms = gpu_kernel.attend(
        shape,
        q,
        **operands,
        items=jnp.stack(items),
        used=jnp.sum(parts.count, keepdims=True),
        processors=processors,
    )
    spans = (parts.first * shape.multipliers, parts.count * shape.multipliers, tiles.token)
    return gpu_combine.combine(
        found.reshape(-1, *found.shape[2:]),
        norms.reshape(-1, *norms.shape[2:]),
        jnp.stack(spans),
        tokens=T,
        group=shape.group,
        every=rows.kv_lens.shape[0] >= T,
        processors=processors,
        interpret=interpret,
    )


def _tall(facts: Facts, rows: Rows, q_TKGH, sm_scale, interpret, operands):
    """Rows of several tokens: their tiles, and what came of each: [tiles, K, tokens, group, H]."""
    shape, (T, K, G, H) = tall_shape(facts, sm_scale, interpret), q_TKGH.shape
    wide, tokens = shape.multipliers, shape.tokens
    used, tiles = rows.longer(T, wide * tokens)
    count = tiles.row.shape[0]
    number = jnp.arange(count, dtype=jnp.int32)
    end = tiles.position + tiles.tokens
    items = (number, tiles.row, tiles.position, jnp.zeros_like(end), end)
    token = jnp.minimum(tiles.token[:, None] + jnp.arange(wide * tokens), T - 1)
    q = jnp.einsum("iwtKGH->iKwtGH", q_TKGH[token].reshape(count, wide, tokens, K, G, H))
    q = q.reshape(count, K, wide, tokens * G, H)
    q = jnp.pad(q, ((0, 0),) * 3 + ((0, ROWS - tokens * G), (0, 0)))
    (found,) = gpu_kernel.attend(
        shape,
        q.reshape(count, K, wide * ROWS, H),
        **operands,
        items=jnp.stack(items),
        used=used[None],
        processors=_processors(),
    )
    found = found.reshape(count, K, wide, ROWS, H)[:, :, :, : tokens * G]
    return tiles, found.reshape(count, K, wide * tokens, G, H)


def _merge(rows: Rows, short, tiles: Tiles, tall):
    """Every token's result: of its row's kind, or 0 for padding."""
    T = short.shape[0]
    at = rows.single(T)
    begun = (tiles.tokens > 0) & (tiles.token <= at.token[:, None])
    tile = jnp.maximum(jnp.sum(begun, axis=1, dtype=jnp.int32) - 1, 0)
    offset = jnp.clip(at.token - tiles.token[tile], 0, tall.shape[2] - 1)
    taken = tall[tile, :, offset].reshape(short.shape)
    length = jnp.where(at.tokens > 0, rows.lengths[at.row], 0)[:, None, None]
    return jnp.where(length == 1, short, jnp.where(length > 1, taken, 0))


def _processors() -> int:
    return hopper.info(Device.current().kind).multiprocessors


def short_shape(facts: Facts, sm_scale: float, interpret=None) -> Shape:
    """The kernel for tiles of one token."""
    return _shape(facts, sm_scale, interpret, block=64, stages=4, split=True)


def tall_shape(facts: Facts, sm_scale: float, interpret=None) -> Shape:
    """The kernel for tiles of many tokens of one row."""
    block, stages = (64, 3) if jnp.dtype(facts.kv_dtype).itemsize == 1 else (128, 2)
    return _shape(facts, sm_scale, interpret, block=block, stages=stages, split=False)


def _shape(facts: Facts, sm_scale: float, interpret, **how) -> Shape:
    return Shape(
        group=facts.query_heads // facts.kv_heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        page_size=facts.page_size,
        cache=jnp.dtype(facts.kv_dtype),
        scaled=facts.scaled,
        sm_scale=sm_scale,
        interpret=interpret,
        **how,
    )


def supports(device: Device, facts: Facts) -> str | None:
    """Why these heads and this cache cannot run on this GPU, or None."""
    reason = refusal(device)
    if reason is not None:
        return reason
    if facts.head_dim != 128:
        return f"head_dim={facts.head_dim}; use head_dim 128"
    if facts.dtype != "bfloat16":
        return f"queries are {facts.dtype}; use bfloat16"
    if facts.kv_dtype not in ("bfloat16", *xla.LARGEST):
        return f"pages are {facts.kv_dtype}; use bfloat16 or {list(xla.LARGEST)}"
    group = facts.query_heads // facts.kv_heads
    if group > ROWS:
        return f"{group} query heads per kv head; use {ROWS} at most"
    least = 32 if facts.scaled else 16
    if facts.page_size & (facts.page_size - 1) or not least <= facts.page_size <= 1024:
        return f"page_size={facts.page_size}; use a power of two from {least} to 1024" + (
            " (a copy of scales brings 128 bytes)" if facts.scaled else ""
        )
    return None


IMPL = registry.Impl("paged_attention", "gpu", "gpu", supports, paged_attention)
