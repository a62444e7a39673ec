"""The decoder: layers in order, each a jitted function of its weights and its pages.

Knows the residual stream. Layers are a tuple looped over in Python, because scanning stacked
weights into a kernel copies them; the layer function is jitted on its own, so that equal layers
trace once.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax.model.attention import attention
from qwen_jax.model.cache import KVCache, RaggedBatch
from qwen_jax.model.moe import mlp, moe
from qwen_jax.model.norm import rms_norm
from qwen_jax.model.rope import angles
from qwen_jax.model.routing import no_experts
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import TextConfig
from qwen_jax.weights.params import Layer, Mlp


@struct.dataclass
class LayerOut:
    """What a layer makes.

    Attributes:
        x_TD: the stream behind it.
        pages, scales: its updated cache.
        experts: int32 [T, A], where its tokens went (`Routing`); None of a dense layer.
        shares: float32 [T, R], the router's softmax; None of a dense layer.
    """

    x_TD: jax.Array
    pages: jax.Array
    scales: jax.Array | None
    experts: jax.Array | None = None
    shares: jax.Array | None = None


@struct.dataclass
class Decoded:
    """What all layers make.

    Attributes:
        x_TD: the stream before the final norm.
        cache: updated.
        experts, shares: per layer, as in `LayerOut`; a program that does not use them does not keep
            them.
    """

    x_TD: jax.Array
    cache: KVCache
    experts: tuple[jax.Array | None, ...]
    shares: tuple[jax.Array | None, ...]

    def routing(self, config: TextConfig) -> jax.Array:
        """int32 [layers, T, A]: the experts of each token; R where a layer or token has none.

        Raises:
            ValueError: the model has no experts.
        """
        if not config.num_experts:
            raise ValueError("return_routing: this model is dense, it has no experts to route to")
        none = no_experts(self.x_TD.shape[0], config)
        return jnp.stack([none if each is None else each for each in self.experts])


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
) -> LayerOut:
    """Attention and MLP, each added to the stream. Source: transformers Qwen3MoeDecoderLayer."""
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
        return LayerOut(x_TD + mlp(weights.mlp, normed), pages, scales)
    out, routing, shares_TR = moe(weights.mlp, normed, batch.is_token, config, runtime)
    return LayerOut(x_TD + out, pages, scales, routing.experts, shares_TR)


def decode(
    layers: tuple[Layer, ...],
    x_TD: jax.Array,
    batch: RaggedBatch,
    cache: KVCache,
    config: TextConfig,
    runtime: Runtime,
) -> Decoded:
    """All layers."""
    rotary = angles(config.rope, config.head_dim, batch.positions)
    made: list[LayerOut] = []
    visual = batch.visual
    batch = dataclasses.replace(batch, visual=None)  # no layer depends on its shapes
    for i, (weights, pages, scales) in enumerate(
        zip(layers, cache.pages, cache.scales, strict=True)
    ):
        out = decoder_layer(
            weights, x_TD, rotary, batch, pages, scales, config=config, runtime=runtime
        )
        made.append(out)
        x_TD = out.x_TD
        if visual is not None and i < visual.levels.shape[0]:  # DeepStack, after both residuals
            x_TD = x_TD + visual.take(visual.levels[i]).astype(x_TD.dtype)
    cache = KVCache(tuple(out.pages for out in made), tuple(out.scales for out in made))
    experts, shares = (tuple(getattr(out, name) for out in made) for name in ("experts", "shares"))
    return Decoded(x_TD, cache, experts, shares)
