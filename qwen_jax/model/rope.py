"""Rotary position embedding: angle tables, and their application.

Knows frequencies and positions; knows no weight and no cache. Positions come with three axes (time,
height, width); text has the same number on all three, and a text-only model reads the first.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.weights.config import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position of each of the ``head_dim / 2`` pairs, and the factor on cos and sin.

    YaRN leaves fast frequencies alone, slows slow ones down by ``factor``, and blends linearly in
    between. Source: Peng et al. 2023, section 3.2-3.4; transformers `_compute_yarn_parameters`.

    Returns:
        float32 [H/2], and 1.0 or YaRN's attention factor.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = 1.0 / np.power(np.float32(rope.theta), exponents, dtype=np.float32)
    if rope.kind == "default":
        return plain, 1.0

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that makes this many turns over the original context."""
        wavelengths = rope.original_max_position / (times * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = max(high - low, 0.001)
    slowed = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
    blended = plain / np.float32(rope.factor) * slowed + plain * (1 - slowed)
    factor = rope.attention_factor
    if factor is None:
        factor = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return blended.astype(np.float32), factor


def axis_of_pair(rope: RopeConfig, pairs: int) -> np.ndarray:
    """Which position axis (0 time, 1 height, 2 width) turns each pair: interleaved M-RoPE.

    Pairs go T H W T H W … as long as height and width have pairs left, and T after that.
    Source: transformers Qwen3VLMoeTextRotaryEmbedding.apply_interleaved_mrope.
    """
    axis = np.zeros(pairs, np.int32)
    for which, count in enumerate(rope.mrope_section[1:], start=1):
        axis[which : 3 * count : 3] = which
    return axis


def angles(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cosines and sines of a step, shared by all layers.

    Args:
        rope: the model's rotary configuration.
        head_dim: H.
        positions: int32 [3, T].

    Returns:
        float32 [T, H/2] twice: cos, sin, times YaRN's attention factor.
    """
    per_pair, factor = frequencies(rope, head_dim)
    chosen = positions[axis_of_pair(rope, per_pair.size)].T  # [T, H/2]
    angle = chosen.astype(jnp.float32) * per_pair
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns pair j, made of elements j and j + H/2 of each head, by its angle; in float32.

    Args:
        x: [T, N, H] queries or keys.
        cos, sin: float32 [T, H/2].

    Returns:
        [T, N, H] in x's dtype, rounded once.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
