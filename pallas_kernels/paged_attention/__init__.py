"""Causal attention of a ragged batch over a paged key/value cache, which it also writes.

Knows rows, pages and positions; knows no layer, rotary embedding, mesh or allocator.
Implementations: `xla`, `tpu`, `gpu`. This module checks what they all rely on.
"""

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels import registry
from pallas_kernels.device import Device
from pallas_kernels.paged_attention import gpu, tpu, xla
from pallas_kernels.paged_attention.facts import Facts as Facts

registry.register(tpu.IMPL)
registry.register(gpu.IMPL)
registry.register(xla.IMPL)

LARGEST = xla.LARGEST


@struct.dataclass
class PagedOut:
    """What `paged_attention` returns: out [T, N, H] in q's dtype, and the cache after the write."""

    out_TNH: jax.Array
    pages: jax.Array
    scales: jax.Array | None


def paged_attention(
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    pages: jax.Array,
    *,
    row_starts: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    sm_scale: float,
    scales: jax.Array | None = None,
    impl: str = "xla",
) -> PagedOut:
    """Writes the new keys and values to their pages, then attends causally over each row's pages.

    Row b owns the flat tokens ``row_starts[b]:row_starts[b + 1]``; its i-th stands at position
    ``kv_lens[b] - (row_starts[b + 1] - row_starts[b]) + i``.

    Args:
        q_TNH: float [T, N, H]; query head n reads key/value head ``n // (N // K)``.
        k_TKH: float [T, K, H], the new tokens' keys.
        v_TKH: float [T, K, H], their values.
        pages: [num_pages, page_size, 2K, H], key of head j at 2j, value at 2j + 1. float32,
            bfloat16, float16, float8_e4m3fn or int8. Donate it: it is updated in place.
        row_starts: int32 [B + 1], non-decreasing, from 0; tokens from the last one on are padding.
        kv_lens: int32 [B], length of each row's context including its new tokens.
        page_table: int32 [B, W]; position p is in page ``page_table[b, p // page_size]``.
        sm_scale: multiplies the scores.
        scales: None, or float32 [num_pages, 2K, page_size]: one scale per combined head and token,
            written as ``amax / 448`` (float8) or ``amax / 127`` (int8). int8 pages need it. (With
            positions last no lane of a TPU is padding.)
        impl: the implementation's name, as `registry.choose` gave it.

    Returns:
        `PagedOut`; rows of padding tokens are exactly 0. T <= B takes the decode form, which allows
        one token per row at most; otherwise rows may be of any length.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the implementation cannot run this on
            the device that the mesh names (`Device.current`).
    """
    _check(q_TNH, k_TKH, v_TKH, pages, row_starts, kv_lens, page_table, scales)
    facts = Facts.of(q_TNH, pages, scales)
    fn = registry.runnable("paged_attention", impl, Device.current(), [facts])
    out, pages, scales = fn(
        jnp.asarray(q_TNH),
        jnp.asarray(k_TKH),
        jnp.asarray(v_TKH),
        jnp.asarray(pages),
        None if scales is None else jnp.asarray(scales),
        row_starts=jnp.asarray(row_starts, jnp.int32),
        kv_lens=jnp.asarray(kv_lens, jnp.int32),
        page_table=jnp.asarray(page_table, jnp.int32),
        sm_scale=sm_scale,
    )
    return PagedOut(out, pages, scales)


def _check(q_TNH, k_TKH, v_TKH, pages, row_starts, kv_lens, page_table, scales) -> None:
    if q_TNH.ndim != 3 or k_TKH.ndim != 3 or k_TKH.shape != v_TKH.shape:
        raise ValueError(
            f"paged_attention: q {q_TNH.shape}, k {k_TKH.shape}, v {v_TKH.shape}; "
            "use [T, N, H], [T, K, H], [T, K, H]"
        )
    (T, N, H), K = q_TNH.shape, k_TKH.shape[1]
    if k_TKH.shape != (T, K, H) or N % K:
        raise ValueError(
            f"paged_attention: q {q_TNH.shape} and k {k_TKH.shape} need the same T and H, "
            "and a whole number of query heads per key/value head"
        )
    if pages.ndim != 4 or pages.shape[2:] != (2 * K, H):
        raise ValueError(
            f"paged_attention: pages {pages.shape}; needs [num_pages, page_size, {2 * K}, {H}]"
        )
    B = kv_lens.shape[0]
    if kv_lens.ndim != 1 or row_starts.shape != (B + 1,):
        raise ValueError(
            f"paged_attention: row_starts {row_starts.shape}, kv_lens {kv_lens.shape}; "
            "use [B + 1] and [B]"
        )
    if page_table.ndim != 2 or page_table.shape[0] != B:
        raise ValueError(f"paged_attention: page_table {page_table.shape}; needs [{B}, W]")
    _check_dtype(pages, scales)


def _check_dtype(pages, scales) -> None:
    name = jnp.dtype(pages.dtype).name
    if name not in ("float32", "bfloat16", "float16", *LARGEST):
        raise ValueError(
            f"paged_attention: pages are {name}; use float32, bfloat16, float16 or {list(LARGEST)}"
        )
    if name == "int8" and scales is None:
        raise ValueError("paged_attention: int8 pages need scales [num_pages, 2K, page_size]")
    if scales is not None and name not in LARGEST:
        raise ValueError(f"paged_attention: {name} pages take no scales; pass scales=None")
    num_pages, page_size, heads, _ = pages.shape
    if scales is not None and scales.shape != (num_pages, heads, page_size):
        raise ValueError(
            f"paged_attention: scales {scales.shape} for pages {pages.shape}; "
            f"needs {(num_pages, heads, page_size)}"
        )
