"""The paged key/value cache, and the ragged batch that a step works on.

Knows pages, rows and lengths; knows no weight. A row's positions live in pages named by its page
table, so rows of any lengths share one array per layer, and prefill, chunks of prefill and decode
differ only in how many new tokens a row brings.

    tokens      a0 a1 a2 a3 | b0 | c0 c1 | .      T = 8, the last one padding
    row_starts  0             4    5       7      row b brings one token: it decodes
    kv_lens     4             9    2              … and has eight older ones in the cache
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qwen_jax import sharding as sharding_lib
from qwen_jax.runtime import KV_DTYPES, Runtime
from qwen_jax.weights.config import TextConfig


@struct.dataclass
class KVCache:
    """Keys and values of all layers.

    Attributes:
        pages: per layer [pages, page_size, 2K, H]: the key of head j at 2j, its value at 2j + 1.
        scales: per layer float32 [pages, 2K, page_size] for int8 and fp8 pages, else None.
    """

    pages: tuple[jax.Array, ...]
    scales: tuple[jax.Array | None, ...]

    @property
    def page_size(self) -> int:
        return self.pages[0].shape[1]

    @property
    def num_pages(self) -> int:
        return self.pages[0].shape[0]


def stored_kv_heads(config: TextConfig, runtime: Runtime) -> int:
    """Heads in the cache: K, or one copy per device where the tensor axis is wider than K."""
    return max(config.num_key_value_heads, sharding_lib.ways(runtime.mesh, runtime.rules.axes("K")))


def page_bytes(config: TextConfig, runtime: Runtime) -> int:
    """Bytes of one page over all layers and devices."""
    entries = runtime.page_size * 2 * stored_kv_heads(config, runtime)
    dtype = jnp.dtype(KV_DTYPES[runtime.kv_dtype])
    per_entry = config.head_dim * dtype.itemsize + (4 if dtype.itemsize == 1 else 0)
    return config.num_hidden_layers * entries * per_entry


def row_ways(runtime: Runtime) -> int:
    """Over how many devices the rows, with their pages, are split."""
    return sharding_lib.ways(runtime.mesh, runtime.rules.axes("B"))


def abstract_cache(config: TextConfig, runtime: Runtime, num_pages: int) -> KVCache:
    """Shapes, dtypes and shardings of `make_cache`; allocates nothing.

    Raises:
        ValueError: the pages do not split over the axes of B (each row's pages are on one device).
    """
    ways = row_ways(runtime)
    if num_pages % ways:
        raise ValueError(
            f"cache: {num_pages} pages do not split over {'+'.join(runtime.rules.axes('B'))}="
            f"{ways}; use a multiple of {ways}, or rules.replicate('B')"
        )
    heads = 2 * stored_kv_heads(config, runtime)
    dtype = jnp.dtype(KV_DTYPES[runtime.kv_dtype])

    def one(dims: str, shape: tuple[int, ...], dtype) -> Any:
        spec = sharding_lib.spec(dims, runtime.mesh, runtime.rules)
        place = jax.sharding.NamedSharding(runtime.mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    shape = (num_pages, runtime.page_size, heads, config.head_dim)
    pages = one("B . K .", shape, dtype)
    per_head = (num_pages, heads, runtime.page_size)
    scales = one("B K .", per_head, jnp.float32) if dtype.itemsize == 1 else None
    layers = config.num_hidden_layers
    return KVCache((pages,) * layers, (scales,) * layers)


def make_cache(config: TextConfig, runtime: Runtime, num_pages: int) -> KVCache:
    """An empty cache of ``num_pages`` pages, split over the mesh by the rules of B (rows) and K."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding),
        abstract_cache(config, runtime, num_pages),
    )


def grow_cache(cache: KVCache, num_pages: int) -> KVCache:
    """The same cache with empty pages behind it; the old one is dropped layer by layer."""

    def grow(x: jax.Array) -> jax.Array:
        more = ((0, num_pages - x.shape[0]), *[(0, 0)] * (x.ndim - 1))
        return jax.jit(jnp.pad, static_argnums=1, out_shardings=x.sharding)(x, more)

    scales = tuple(None if x is None else grow(x) for x in cache.scales)
    return KVCache(tuple(map(grow, cache.pages)), scales)


@struct.dataclass
class VisualRows:
    """Features of pictures, and which flat token takes which.

    Attributes:
        rows: [M, D], what replaces a token's embedding.
        levels: [J, M, D], DeepStack: what is added to the token after decoder layer j.
        source: int32 [T], a token's feature row; -1 for text and padding.
    """

    rows: jax.Array
    levels: jax.Array
    source: jax.Array

    def take(self, features: jax.Array) -> jax.Array:
        """[M, D] features -> [T, D], zero where a token has none."""
        taken = features[jnp.maximum(self.source, 0)]
        return jnp.where((self.source >= 0)[:, None], taken, 0)


@struct.dataclass
class RaggedBatch:
    """New tokens of several rows, flat, with where each row's context lies.

    Attributes:
        tokens: int32 [T]; those behind the last row are padding.
        positions: int32 [3, T], rotary positions (time, height, width).
        row_starts: int32 [B + 1]: row b brings tokens ``row_starts[b]:row_starts[b + 1]``.
        kv_lens: int32 [B], context length including the new tokens; 0 for an unused row.
        page_table: int32 [B, W]: the page of position p is ``page_table[b, p // page_size]``.
        visual: features of the chunk's pictures; None where there are none, as in decode.
    """

    tokens: jax.Array
    positions: jax.Array
    row_starts: jax.Array
    kv_lens: jax.Array
    page_table: jax.Array
    visual: VisualRows | None = None

    @property
    def is_token(self) -> jax.Array:
        """bool [T]: False for padding."""
        return jnp.arange(self.tokens.shape[0]) < self.row_starts[-1]


def pack(
    rows: Sequence[Sequence[int]],
    cached: Sequence[int],
    page_table: np.ndarray,
    *,
    num_tokens: int,
    positions: Sequence[np.ndarray] | None = None,
) -> RaggedBatch:
    """Builds a batch on the host.

    Args:
        rows: the new tokens of each row; a row may bring none.
        cached: how many positions of each row are in the cache already.
        page_table: int32 [B, W], with B at least ``len(rows)``: the rest are unused rows.
        num_tokens: T, at least the number of new tokens.
        positions: int32 [3, n] per row; default: the context positions, on all three axes.

    Raises:
        ValueError: more tokens than T, or more rows than B.
    """
    lengths = [len(row) for row in rows]
    if sum(lengths) > num_tokens or len(rows) > page_table.shape[0]:
        raise ValueError(
            f"{sum(lengths)} tokens in {len(rows)} rows do not fit "
            f"T={num_tokens}, B={page_table.shape[0]}"
        )
    tokens = np.zeros(num_tokens, np.int32)
    where = np.zeros((3, num_tokens), np.int32)
    row_starts = np.full(page_table.shape[0] + 1, sum(lengths), np.int32)
    kv_lens = np.zeros(page_table.shape[0], np.int32)
    start = 0
    for b, (row, past) in enumerate(zip(rows, cached, strict=True)):
        stop = start + len(row)
        tokens[start:stop] = row
        where[:, start:stop] = (
            np.arange(past, past + len(row)) if positions is None else positions[b]
        )
        row_starts[b], kv_lens[b] = start, past + len(row)
        start = stop
    return RaggedBatch(
        jnp.asarray(tokens),
        jnp.asarray(where),
        jnp.asarray(row_starts),
        jnp.asarray(kv_lens),
        jnp.asarray(page_table, jnp.int32),
    )
