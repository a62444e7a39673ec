"""Paged attention in XLA (first simple form)."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import registry

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}


def quantize(kv, dtype):
    largest = LARGEST[jnp.dtype(dtype).name]
    kv = kv.astype(jnp.float32)
    amax = jnp.max(jnp.abs(kv), axis=-1)
    scale = jnp.where(amax > 0, amax / largest, 1.0)
    scaled = kv / scale[..., None]
    values = jnp.round(scaled) if dtype == jnp.int8 else scaled
    return jnp.clip(values, -largest, largest).astype(dtype), scale


def paged_attention(
    q_TNH, k_TKH, v_TKH, pages, scales, *, row_starts, kv_lens, page_table, sm_scale
):
    (T, N, H), K = q_TNH.shape, k_TKH.shape[1]
    B, W = page_table.shape
    num_pages, page_size = pages.shape[:2]
    token = jnp.arange(T)
    row_T = jnp.searchsorted(row_starts[1:], token, side="right")
    row = jnp.minimum(row_T, B - 1)
    valid = token < row_starts[B]
    position = kv_lens[row] - row_starts[row + 1] + token
    page = page_table[row, jnp.clip(position // page_size, 0, W - 1)]
    page = jnp.where(valid, page, num_pages)
    kv = jnp.stack([k_TKH, v_TKH], 2).reshape(T, 2 * K, H)
    if scales is not None:
        kv, scale = quantize(kv, pages.dtype)
        scales = scales.at[page, position % page_size].set(scale, mode="drop")
    pages = pages.at[page, position % page_size].set(kv.astype(pages.dtype), mode="drop")

    G = N // K

    def one(t, out):
        b = row[t]
        q = q_TNH[t].reshape(K, G, H).astype(jnp.float32) * sm_scale

        def block(j, carry):
            top, total, acc = carry
            p = page_table[b, j]
            kv = lax.dynamic_index_in_dim(pages, p, keepdims=False).astype(jnp.float32)
            if scales is not None:
                kv = kv * lax.dynamic_index_in_dim(scales, p, keepdims=False)[..., None]
            kv = kv.reshape(page_size, K, 2, H)
            ok = j * page_size + jnp.arange(page_size) <= position[t]
            kv = jnp.where(ok[:, None, None, None], kv, 0)
            s = jnp.einsum("KGH,SKH->KGS", q, kv[:, :, 0])
            s = jnp.where(ok, s, -jnp.inf)
            new = jnp.maximum(top, s.max(-1))
            fix = jnp.exp(top - new)
            w = jnp.exp(s - new[..., None])
            acc = acc * fix[..., None] + jnp.einsum("KGS,SKH->KGH", w, kv[:, :, 1])
            return new, total * fix + w.sum(-1), acc

        init = (jnp.full((K, G), -1e30), jnp.zeros((K, G)), jnp.zeros((K, G, H)))
        _, total, acc = lax.fori_loop(0, position[t] // page_size + 1, block, init)
        return out.at[t].set((acc / total[..., None]).reshape(N, H).astype(out.dtype))

    out = lax.fori_loop(0, jnp.minimum(row_starts[B], T), one, jnp.zeros_like(q_TNH))
    return out, pages, scales


def supports(platform: str, **facts) -> str | None:
    """Runs everything, everywhere."""
    return None


IMPL = registry.Impl("paged_attention", "xla", None, supports, paged_attention)
