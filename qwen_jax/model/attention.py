"""Grouped-query attention of the decoder over the paged cache.

Knows projections, head norms, rotary angles and which devices hold which heads and rows; what
happens inside one device's pages is `pallas_kernels.paged_attention`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import paged_attention
from qwen_jax import sharding as sharding_lib
from qwen_jax.model.cache import RaggedBatch, stored_kv_heads
from qwen_jax.model.norm import rms_norm
from qwen_jax.model.rope import apply_rope
from qwen_jax.model.row_shards import rows_here
from qwen_jax.runtime import Runtime
from qwen_jax.weights import quant
from qwen_jax.weights.config import TextConfig
from qwen_jax.weights.params import Attention


def attention(
    weights: Attention,
    x_TD: jax.Array,
    *,
    rotary: tuple[jax.Array, jax.Array],
    batch: RaggedBatch,
    pages: jax.Array,
    scales: jax.Array | None,
    config: TextConfig,
    runtime: Runtime,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """One layer's attention. Source: transformers Qwen3MoeAttention.

    Args:
        weights: of this layer.
        x_TD: normed input.
        rotary: cos and sin, float32 [T, H/2].
        batch: rows, lengths and page tables.
        pages, scales: this layer's cache.
        config, runtime: static.

    Returns:
        The output [T, D] (zero for padding before the output bias), and the updated pages, scales.
    """
    q_TNH = _project("TD,DNH->TNH", x_TD, weights.q, weights.q_bias)
    k_TKH = _project("TD,DKH->TKH", x_TD, weights.k, weights.k_bias)
    v_TKH = _project("TD,DKH->TKH", x_TD, weights.v, weights.v_bias)
    q_TNH = apply_rope(rms_norm(q_TNH, weights.q_norm, config.rms_norm_eps), *rotary)
    k_TKH = apply_rope(rms_norm(k_TKH, weights.k_norm, config.rms_norm_eps), *rotary)
    copies = stored_kv_heads(config, runtime) // config.num_key_value_heads
    if copies > 1:
        k_TKH, v_TKH = (jnp.repeat(x, copies, axis=1) for x in (k_TKH, v_TKH))
    o_TNH, pages, scales = _paged(q_TNH, k_TKH, v_TKH, batch, pages, scales, config, runtime)
    out = quant.einsum("TNH,NHD->TD", o_TNH, weights.o)
    out = out if weights.o_bias is None else out + weights.o_bias
    return sharding_lib.constrain(out, "T D", runtime.mesh, runtime.rules), pages, scales


def _project(spec: str, x: jax.Array, w: quant.Weight, bias: jax.Array | None) -> jax.Array:
    out = quant.einsum(spec, x, w)
    return out if bias is None else out + bias


def _paged(q_TNH, k_TKH, v_TKH, batch, pages, scales, config, runtime):
    mesh, rules = runtime.mesh, runtime.rules
    if rules.axes("N") != rules.axes("K"):
        raise ValueError(
            f"rules split N over {rules.axes('N')} but K over {rules.axes('K')}: query heads must "
            "lie where their key/value heads are; give both letters the same mesh axes"
        )

    holders = rules.axes("B")
    split = sharding_lib.ways(mesh, holders) > 1

    def local(q, k, v, pages, scales, row_starts, kv_lens, page_table):
        here = None
        if split:
            here = rows_here(
                row_starts,
                kv_lens,
                page_table,
                first_page=sharding_lib.shard_index(mesh, holders) * pages.shape[0],
                num_pages=pages.shape[0],
                num_tokens=q.shape[0],
            )
            q, k, v = (here.take(x) for x in (q, k, v))
            row_starts, kv_lens, page_table = here.row_starts, here.kv_lens, here.page_table
        out = paged_attention(
            q,
            k,
            v,
            pages,
            row_starts=row_starts,
            kv_lens=kv_lens,
            page_table=page_table,
            sm_scale=config.head_dim**-0.5,
            scales=scales,
            impl=runtime.kernel("paged_attention"),
        )
        o_TNH = out.out_TNH
        if here is not None:  # tokens of rows that are elsewhere are 0, so the sum is all of them
            o_TNH = sharding_lib.reduce_over(here.put_back(o_TNH), mesh, holders)
        return o_TNH, out.pages, out.scales

    def spec(dims: str):
        return sharding_lib.spec(dims, mesh, rules)

    heads, cache, cache_scales = spec(". N ."), spec("B . K ."), spec("B K .")
    whole, wide = spec("."), spec(". .")
    return sharding_lib.per_shard(
        local,
        mesh,
        in_specs=(heads, heads, heads, cache, cache_scales, whole, whole, wide),
        out_specs=(heads, cache, cache_scales),
    )(q_TNH, k_TKH, v_TKH, pages, scales, batch.row_starts, batch.kv_lens, batch.page_table)
