"""Normalisation. Knows one array and its weight."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """``x / rms(x)`` over the last axis, in float32; rounded to x's dtype, then times ``weight``.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.

    Source: transformers Qwen3MoeRMSNorm (the weight multiplies after the rounding, no "1 + w").
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """``(x - mean) / std * weight + bias`` over the last axis, in float32, rounded to x's dtype.

    Args:
        x: [..., D].
        weight, bias: [D].
        eps: added to the variance.

    Source: torch.nn.LayerNorm.
    """
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (centred * scale * weight + bias).astype(x.dtype)
