"""One step of the model: tokens in, logits out, cache updated.

Knows the whole forward pass, and that prefill, chunks of prefill, decode and mixtures of them are
the same function of a ragged batch.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax import sharding as sharding_lib
from qwen_jax.model import text
from qwen_jax.model.cache import KVCache, RaggedBatch
from qwen_jax.model.norm import rms_norm
from qwen_jax.runtime import Runtime
from qwen_jax.weights import quant
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Weights


@struct.dataclass
class StepOut:
    """What a step returns.

    Attributes:
        logits: float32 [B, V] of each row's last new token (meaningless for a row that brought
            none), [T, V] of every token, or None.
        cache: the updated cache.
        routing: int32 [layers, T, A], the experts that each token went to in each layer, the best
            first; R (their number: no expert) for padding and in dense layers. None if not wanted.
    """

    logits: jax.Array | None
    cache: KVCache
    routing: jax.Array | None = None


def step(
    params: Weights,
    config: ModelConfig,
    runtime: Runtime,
    batch: RaggedBatch,
    cache: KVCache,
    *,
    logits: Literal["last", "all", "none"] = "last",
    return_routing: bool = False,
) -> StepOut:
    """Runs new tokens through the model. Pure; `jit_step` is the jitted form.

    Args:
        params: the weights.
        config, runtime: static.
        batch: T new tokens of B rows.
        cache: keys and values of what came before; donate it.
        logits: of which tokens logits are wanted.
        return_routing: whether `StepOut.routing` is wanted.

    Raises:
        ValueError: ``return_routing`` of a model without experts.

    Source: transformers Qwen3MoeForCausalLM.forward.
    """
    out = forward(params, config, runtime, batch, cache)
    routing = out.routing(config.text) if return_routing else None
    if logits == "none":
        return StepOut(None, out.cache, routing)
    x_TD = last_of_rows(out.x_TD, batch) if logits == "last" else out.x_TD
    return StepOut(unembed(params, x_TD, config, runtime), out.cache, routing)


def forward(
    params: Weights, config: ModelConfig, runtime: Runtime, batch: RaggedBatch, cache: KVCache
) -> text.Decoded:
    """Embedding (or a picture's features) and decoder; no final norm."""
    x_TD = params.embed[batch.tokens].astype(runtime.dtype)
    if batch.visual is not None:
        placed = batch.visual.take(batch.visual.rows).astype(runtime.dtype)
        x_TD = jnp.where((batch.visual.source >= 0)[:, None], placed, x_TD)
    x_TD = sharding_lib.constrain(x_TD, "T D", runtime.mesh, runtime.rules)
    return text.decode(params.layers, x_TD, batch, cache, config.text, runtime)


def last_of_rows(x_TD: jax.Array, batch: RaggedBatch) -> jax.Array:
    """[B, D]: the last new token of each row (any token for a row that brought none)."""
    return x_TD[jnp.maximum(batch.row_starts[1:] - 1, 0)]


def unembed(params: Weights, x_TD: jax.Array, config: ModelConfig, runtime: Runtime) -> jax.Array:
    """Final norm and head: [T, D] -> float32 logits [T, V], whole on every device."""
    normed = rms_norm(x_TD, params.norm, config.text.rms_norm_eps)
    if params.head is None:
        logits = quant.einsum("TD,VD->TV", normed, params.embed, jnp.float32)
    else:
        logits = quant.einsum("TD,DV->TV", normed, params.head, jnp.float32)
    # First where the head lies, then whole: told only the latter, XLA gathers the head instead.
    logits = sharding_lib.constrain(logits, ". V", runtime.mesh, runtime.rules)
    return sharding_lib.constrain(logits, ". .", runtime.mesh, runtime.rules)


jit_step = partial(
    jax.jit,
    static_argnames=("config", "runtime", "logits", "return_routing"),
    donate_argnames=("cache",),
)(step)
