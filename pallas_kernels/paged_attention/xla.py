"""Paged attention in XLA: the definition of correct, for any platform.

1. *Write*: one scatter puts every new key and value into its page (padding tokens are dropped).
   XLA updates a donated cache in place. On CPU float8 pages (see `narrow`) and, before jax 0.11,
   bfloat16 pages cost a copy of the cache instead: there, keep it in float32 or int8.
2. *Tiles*: the rows are cut into tiles of consecutive query tokens of one row. Rows with a single
   new token (decode) make tiles of height 1, sorted by length, `LANES` of which advance together;
   longer rows make tall tiles, taken one at a time. When T <= B every row has one token at most,
   and only the first kind is compiled.
3. *Blocks*: a tile walks over the pages of its row, `BLOCK` positions at a time, with an online
   softmax, and stops at the last position its own tokens may see:

        positions   0 ........ BLOCK ...... 2 BLOCK ....
        token i     [ all seen ][ all seen ][ seen|masked ]  -> next blocks are never read
        top, total, acc = merge(top, total, acc; block)

Trip counts depend on the data, so the cost of a row follows its own length, not the longest row's
and not the page table's width; scores are never larger than a tile by a block.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pallas_kernels import narrow, registry
from pallas_kernels.buffers import in_own_loop
from pallas_kernels.device import Device
from pallas_kernels.paged_attention.facts import Facts
from pallas_kernels.paged_attention.schedule import Rows
from pallas_kernels.precision import exact

# Largest magnitude of each narrow cache dtype.
LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}

# Key positions per step of the online softmax; tiles of one token, whose rows are often shorter,
# take half as many.
BLOCK = 256
# Query rows (tokens times heads) that a tall tile aims at.
TALL_ROWS = 2048
# Decode tiles that advance together, by platform.
LANES = {"cpu": 4, "default": 64}


def paged_attention(
    q_TNH, k_TKH, v_TKH, pages, scales, *, row_starts, kv_lens, page_table, sm_scale
):
    """`pallas_kernels.paged_attention`, on checked arguments, as a tuple (out, pages, scales)."""
    if q_TNH.shape[0] == 0:
        return q_TNH, pages, scales
    rows = Rows(row_starts, kv_lens)
    num_pages, page_size = pages.shape[:2]
    # Entries behind a row's context may be anything; whole blocks of them are read, and masked.
    table = jnp.clip(page_table, 0, num_pages - 1)
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % max(1, BLOCK // page_size))))
    cache = Cache(narrow.as_bits(pages), scales, table, pages.dtype)
    cache = write(k_TKH, v_TKH, cache, rows)
    out = _attend(q_TNH, cache, rows, sm_scale)
    return out, narrow.from_bits(cache.pages, pages.dtype), cache.scales


@struct.dataclass
class Cache:
    """The pages (float8 as bytes), their scales, and the page table in whole blocks."""

    pages: jax.Array
    scales: jax.Array | None
    table: jax.Array
    dtype: jax.typing.DTypeLike = struct.field(pytree_node=False)

    def read(self, page, combined_head, dtype):
        """Whole pages of some heads: [..., page_size, H] in ``dtype``."""
        values = self.pages.at[page, :, combined_head].get(mode="promise_in_bounds")
        return narrow.from_bits(values, self.dtype).astype(dtype)

    def read_scales(self, page, combined_head):
        """Their scales: [..., page_size]."""
        assert self.scales is not None
        return self.scales.at[page, combined_head].get(mode="promise_in_bounds")


def quantize(x, dtype):
    """[..., H] -> values in ``dtype`` and float32 scales [...]: amax over H fills the range."""
    largest = LARGEST[jnp.dtype(dtype).name]
    x = x.astype(jnp.float32)
    amax = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(amax > 0, amax / largest, 1.0)
    x = x / scale[..., None]
    x = jnp.round(x) if jnp.issubdtype(dtype, jnp.integer) else x
    return jnp.clip(x, -largest, largest).astype(dtype), scale


def write(k_TKH, v_TKH, cache, rows):
    """`Cache` with the new keys and values in their slots: one scatter of pages, one of scales."""
    T, K, H = k_TKH.shape
    num_pages, page_size = cache.pages.shape[:2]
    at = rows.single(T)
    page = cache.table[at.row, jnp.clip(at.position // page_size, 0, cache.table.shape[1] - 1)]
    slots = jnp.where(at.tokens > 0, page, num_pages), at.position % page_size
    kv = jnp.stack([k_TKH, v_TKH], axis=2).reshape(T, 2 * K, H)
    scales = cache.scales
    if scales is None:
        kv = kv.astype(cache.dtype)
    else:
        kv, scale = quantize(kv, cache.dtype)
        scales = scales.at[slots[0], :, slots[1]].set(scale, mode="drop")
    pages = cache.pages.at[slots].set(narrow.as_bits(kv), mode="drop")
    return cache.replace(pages=pages, scales=scales)


def _attend(q_TNH, cache, rows, sm_scale):
    T, N, _ = q_TNH.shape
    B = rows.kv_lens.shape[0]
    out = jnp.zeros_like(q_TNH)
    count, tiles = rows.one_token(T)
    # Tiles that advance together should be of like length; those of no tokens go last.
    order = jnp.argsort(jnp.where(tiles.tokens > 0, tiles.position, jnp.iinfo(jnp.int32).max))
    tiles = jax.tree.map(lambda a: a[order], tiles)

    def short(out, lanes):
        return _walk(out, q_TNH, cache, sm_scale, count, tiles, 1, min(lanes, T, B))

    out = lax.platform_dependent(
        out,
        cpu=functools.partial(short, lanes=LANES["cpu"]),
        default=functools.partial(short, lanes=LANES["default"]),
    )
    if T <= B:
        return out
    height = max(1, min(T, TALL_ROWS // N))
    count, tiles = rows.longer(T, height)
    return _walk(out, q_TNH, cache, sm_scale, count, tiles, height, 1)


def _walk(out, q_TNH, cache, sm_scale, count, tiles, height, lanes):
    """Attends tile after tile, ``lanes`` at once, and scatters what they give into ``out``."""
    T, N, H = q_TNH.shape
    K = cache.pages.shape[2] // 2
    pad = -tiles.row.shape[0] % lanes
    tiles = jax.tree.map(lambda a: jnp.pad(a, (0, pad)), tiles)

    def step(i, out):
        now = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, i * lanes, lanes), tiles)
        token = now.token[:, None] + jnp.arange(height)
        q = q_TNH[jnp.minimum(token, T - 1)].reshape(lanes, height, K, N // K, H)
        q = jnp.einsum("UtKGH->UKtGH", q).reshape(lanes, K, -1, H)
        y = _online(q, cache, now, sm_scale, height)
        y = jnp.einsum("UKtGH->UtKGH", y.reshape(lanes, K, height, -1, H))
        token = jnp.where(jnp.arange(height) < now.tokens[:, None], token, T)
        return out.at[token].set(y.reshape(lanes, height, N, H).astype(out.dtype), mode="drop")

    return lax.fori_loop(0, -(-count // lanes), step, out)


def _online(q, cache, tiles, sm_scale, height):
    """Attention of ``q`` [lanes, K, rows, H] (rows = height * G) over its pages, in float32."""
    lanes, K, R, H = q.shape
    page_size = cache.pages.shape[1]
    per_block = max(1, (BLOCK if height > 1 else BLOCK // 2) // page_size)
    S = per_block * page_size
    head = 2 * jnp.arange(K)[:, None]
    table = cache.table[tiles.row]
    row_position = tiles.position[:, None] + jnp.repeat(jnp.arange(height), R // height)
    last = tiles.position + tiles.tokens - 1

    def block(j, carry):
        top, total, acc = carry
        page = lax.dynamic_slice_in_dim(table, j * per_block, per_block, axis=1)[:, None]
        position = j * S + jnp.arange(S)
        # Gathered head by head, [lanes, K, pages, page_size, H], so that no product needs a
        # transposed copy.
        keys = cache.read(page, head, q.dtype).reshape(lanes, K, S, H)
        values = cache.read(page, head + 1, q.dtype).reshape(lanes, K, S, H)
        # Values nobody of the tile sees may be NaN, and 0 * NaN is no 0.
        used = (position <= last[:, None])[:, None, :]
        values = jnp.where(used[..., None], values, 0)
        scores = _scores(q, keys) * sm_scale
        if cache.scales is not None:
            scores = scores * cache.read_scales(page, head).reshape(lanes, K, 1, S)
        seen = position <= row_position[:, :, None]
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        # Position 0 is seen by every token, so this is finite from the first block on.
        new = jnp.maximum(top, scores.max(-1))
        decay = jnp.exp(top - new)
        weights = jnp.exp(scores - new[..., None])
        total = total * decay + weights.sum(-1)
        if cache.scales is not None:
            scale = cache.read_scales(page, head + 1).reshape(lanes, K, S)
            weights = weights * jnp.where(used, scale, 0)[:, :, None]
        acc = acc * decay[..., None] + jnp.einsum(
            "UKRS,UKSH->UKRH",
            weights.astype(q.dtype),
            values,
            precision=exact(q),
            preferred_element_type=jnp.float32,
        )
        return new, total, acc

    start = (jnp.full((lanes, K, R), -1e30), jnp.zeros((lanes, K, R)), jnp.zeros((lanes, K, R, H)))
    blocks = jnp.max(jnp.where(tiles.tokens > 0, last // S + 1, 0))
    _, total, acc = lax.fori_loop(0, blocks, block, start)
    return acc / jnp.where(total > 0, total, 1.0)[..., None]


def _scores(q, keys):
    """[lanes, K, R, H] times [lanes, K, S, H]: float32 [lanes, K, R, S].

    XLA:CPU copies the right-hand operand of such a product transposed, slowly, so the smaller one
    stands there (30 us instead of 390 for 4 lanes of 4 heads, R = 4, S = 256, H = 64).
    """
    product = functools.partial(jnp.einsum, precision=exact(q), preferred_element_type=jnp.float32)
    if q.shape[2] >= keys.shape[2]:
        return product("UKRH,UKSH->UKRS", q, keys)
    return in_own_loop(product("UKSH,UKRH->UKSR", keys, q), q).swapaxes(2, 3)


def supports(device: Device, facts: Facts) -> str | None:
    """Runs every case on every platform."""
    return None


IMPL = registry.Impl("paged_attention", "xla", None, supports, paged_attention)
