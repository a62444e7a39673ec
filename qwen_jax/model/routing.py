"""Which experts each token goes to, and with what weight.

Knows the router; knows neither expert weights nor devices.
"""

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax.weights import quant
from qwen_jax.weights.config import TextConfig
from qwen_jax.weights.quant import Weight


@struct.dataclass
class Routing:
    """Which experts each token chose.

    Attributes:
        experts: int32 [T, A], the best one first; for padding tokens R, which is no expert.
        weights: float32 [T, A], what each expert's output is multiplied by.
    """

    experts: jax.Array
    weights: jax.Array


def route(
    router: Weight, x_TD: jax.Array, is_token: jax.Array, config: TextConfig
) -> tuple[Routing, jax.Array]:
    """Softmax over all experts in float32, the best A, normalised where the model says so.

    Args:
        router: [D, R].
        x_TD: normed input.
        is_token: bool [T]; padding is sent to no expert.
        config: static.

    Returns:
        The choice, and the softmax it was made from: float32 [T, R], for losses that balance the
        experts. A program that does not use it does not keep it.

    Source: transformers Qwen3MoeTopKRouter.
    """
    logits_TR = quant.einsum("TD,DR->TR", x_TD, router, jnp.float32)
    shares_TR = jax.nn.softmax(logits_TR)
    weights, experts = jax.lax.top_k(shares_TR, config.num_experts_per_tok)
    if config.norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    experts = jnp.where(is_token[:, None], experts, config.num_experts)
    return Routing(experts.astype(jnp.int32), weights), shares_TR


def no_experts(tokens: int, config: TextConfig) -> jax.Array:
    """int32 [T, A] of a dense layer among sparse ones: R, which is no expert."""
    return jnp.full((tokens, config.num_experts_per_tok), config.num_experts, jnp.int32)
