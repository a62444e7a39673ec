"""The loss, the optimiser and one step. Knows weights and batches; knows no clock and no file."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from demo import kernels
from demo.packing import Batch
from qwen_jax.model import vision
from qwen_jax.model.cache import KVCache, RaggedBatch, VisualRows
from qwen_jax.model.step import forward, unembed
from qwen_jax.model.text import Decoded
from qwen_jax.runtime import Runtime
from qwen_jax.weights import derive
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Weights

PEAK_RATE = 2e-3
DECAY = 0.02  # of matrices, times the learning rate
BALANCE = 0.03  # of the loss that keeps experts busy
SHOWN = 0.3  # of the loss that has the tower tell what it sees


@struct.dataclass
class State:
    """What a step changes.

    Attributes:
        step: int32, steps done.
        params: float32 weights.
        moments: the optimiser's.
    """

    step: jax.Array
    params: Weights
    moments: Any


def runtime() -> Runtime:
    """One device, float32 and the differentiable kernels."""
    kernels.register()
    return Runtime.make(dtype="float32", kernels="train", devices=jax.devices()[:1])


def start(config: ModelConfig, machine: Runtime, seed: int) -> State:
    """Random weights."""
    params = derive.init(config, seed, "float32", machine.mesh, machine.rules)
    return State(jnp.zeros((), jnp.int32), params, _optimiser().init(params))


def _optimiser() -> optax.GradientTransformation:
    def matrices(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(DECAY, mask=matrices),
    )


def loss(params: Weights, config: ModelConfig, machine: Runtime, batch: Batch) -> jax.Array:
    """Mean cross entropy of the tokens to be learned, and what `untold` and `imbalance` add."""
    features, out = run(params, config, machine, batch)
    logits = unembed(params, out.x_TD[batch.learned], config, machine)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    wrong = jnp.sum(each * batch.weights) / jnp.sum(batch.weights)
    told = unembed(params, features.levels.sum(axis=0), config, machine)
    return wrong + SHOWN * untold(told, batch) + BALANCE * imbalance(out)


def untold(logits: jax.Array, batch: Batch) -> jax.Array:
    """Mean cross entropy of the words for what the tower's rows show.

    logits: float32 [U / 4, V], of the DeepStack levels' sum through the model's own head: told by
    the tower alone, so that the decoder's first layers know the shapes of things already.
    """
    each = jax.vmap(optax.softmax_cross_entropy_with_integer_labels, (None, 1), 1)(
        logits, batch.shown
    )
    return jnp.sum(jnp.where(batch.shown >= 0, each, 0)) / jnp.maximum(jnp.sum(batch.shown >= 0), 1)


def imbalance(out: Decoded) -> jax.Array:
    """1 where every expert of a layer has equally many tokens, up to E / A where A have all.

    The mean over layers of E * sum over experts (share of the choices * mean of the router's
    softmax): the second factor has a gradient. Source: Switch Transformer, section 2.2.
    """
    found = []
    for experts_TA, shares_TR in zip(out.experts, out.shares, strict=True):
        assert experts_TA is not None
        assert shares_TR is not None
        counts = jnp.bincount(experts_TA.reshape(-1), length=shares_TR.shape[-1])
        chosen = counts / jnp.sum(counts)
        found.append(shares_TR.shape[-1] * jnp.sum(chosen * shares_TR.mean(axis=0)))
    return jnp.mean(jnp.stack(found))


def logits_of(params: Weights, config: ModelConfig, machine: Runtime, batch: Batch) -> jax.Array:
    """float32 [n, V], before each token to be learned."""
    _, out = run(params, config, machine, batch)
    return unembed(params, out.x_TD[batch.learned], config, machine)


def run(
    params: Weights, config: ModelConfig, machine: Runtime, batch: Batch
) -> tuple[vision.VisionFeatures, Decoded]:
    """Pictures through the tower, then they and the tokens through the decoder.

    Of some pictures the last layer of the tower is hidden (``batch.kept``) behind the placeholder's
    own embedding, so that what is in them must be told by the DeepStack levels, never hidden.
    """
    assert params.vision is not None
    assert config.vision is not None
    features = vision.encode(
        params.vision,
        vision.VisionBatch(
            batch.patches, batch.coordinates, batch.taps, batch.tap_weights, batch.segment_starts
        ),
        config.vision,
        machine,
    )
    hidden = params.embed[config.image_token_id]
    shown = jnp.where(batch.kept[:, None] > 0, features.rows, hidden)
    lengths = jnp.diff(batch.row_starts)
    ragged = RaggedBatch(
        tokens=batch.tokens,
        positions=batch.positions,
        row_starts=batch.row_starts,
        kv_lens=lengths,
        page_table=jnp.zeros((lengths.shape[0], 1), jnp.int32),
        visual=VisualRows(shown, features.levels, batch.source),
    )
    return features, forward(params, config, machine, ragged, _no_cache(config))


def _no_cache(config: ModelConfig) -> KVCache:
    """Pages that are neither written nor read: rows are whole."""
    text = config.text
    pages = jnp.zeros((1, 16, 2 * text.num_key_value_heads, text.head_dim))
    return KVCache((pages,) * text.num_hidden_layers, (None,) * text.num_hidden_layers)


@functools.lru_cache
def make_step(config: ModelConfig, machine: Runtime):
    """The jitted ``(state, batch, learning rate) -> (state, loss)``; the state is donated."""
    optimiser = _optimiser()

    def step(state: State, batch: Batch, rate: jax.Array) -> tuple[State, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(state.params, config, machine, batch)
        updates, moments = optimiser.update(gradient, state.moments, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        return State(state.step + 1, params, moments), value

    return jax.jit(step, donate_argnums=0)
