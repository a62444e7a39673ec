"""The decoder: layers in order, each a jitted function of its weights and its pages.

Knows the residual stream. Layers are a tuple looped over in Python, because scanning stacked
weights into a kernel copies them; the layer function is jitted on its own, so that equal layers
trace once.
"""

import dataclasses
from functools import partial

import jax

from qwen_jax.model.attention import attention
from qwen_jax.model.cache import KVCache, RaggedBatch
from qwen_jax.model.moe import mlp, moe
from qwen_jax.model.norm import rms_norm
from qwen_jax.model.rope import angles
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import TextConfig
from qwen_jax.weights.params import Layer, Mlp


@partial(jax.jit, static_argnames=("config", "runtime"))
def decoder_layer(
    weights: Layer,
    x_TD: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    batch: RaggedBatch,
    pages: jax.Array,
    scales: jax.Array | None,
    *,
    config: TextConfig,
    runtime: Runtime,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Attention and MLP, each added to the stream. Source: transformers Qwen3MoeDecoderLayer.

    Returns:
        The stream [T, D] and this layer's updated pages and scales.
    """
    normed = rms_norm(x_TD, weights.attn_norm, config.rms_norm_eps)
    out, pages, scales = attention(
        weights.attn,
        normed,
        rotary=rotary,
        batch=batch,
        pages=pages,
        scales=scales,
        config=config,
        runtime=runtime,
    )
    x_TD = x_TD + out
    normed = rms_norm(x_TD, weights.mlp_norm, config.rms_norm_eps)
    if isinstance(weights.mlp, Mlp):
        out = mlp(weights.mlp, normed)
    else:
        out = moe(weights.mlp, normed, batch.is_token, config, runtime)
    return x_TD + out, pages, scales


def decode(
    layers: tuple[Layer, ...],
    x_TD: jax.Array,
    batch: RaggedBatch,
    cache: KVCache,
    config: TextConfig,
    runtime: Runtime,
) -> tuple[jax.Array, KVCache]:
    """All layers: the stream [T, D] before the final norm, and the updated cache."""
    rotary = angles(config.rope, config.head_dim, batch.positions)
    all_pages, all_scales = [], []
    visual = batch.visual
    batch = dataclasses.replace(batch, visual=None)  # no layer depends on its shapes
    for i, (weights, pages, scales) in enumerate(
        zip(layers, cache.pages, cache.scales, strict=True)
    ):
        x_TD, pages, scales = decoder_layer(
            weights, x_TD, rotary, batch, pages, scales, config=config, runtime=runtime
        )
        if visual is not None and i < visual.levels.shape[0]:  # DeepStack, after both residuals
            x_TD = x_TD + visual.take(visual.levels[i]).astype(x_TD.dtype)
        all_pages.append(pages)
        all_scales.append(scales)
    return x_TD, KVCache(tuple(all_pages), tuple(all_scales))
