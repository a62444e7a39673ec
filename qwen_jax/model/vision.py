"""The vision tower: patches of pictures in, one row of features per merged block out.

Knows patches, learned and rotary positions and merge blocks; knows no file, prompt or token. All
that depends on a picture's size (order, coordinates, interpolation, segments) is in the arrays of a
`VisionBatch`, made on the host, so one program per size bucket serves any mixture of pictures.
Source: transformers Qwen3VLMoeVisionModel.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pallas_kernels.buffers import map_rows
from pallas_kernels.segment_attention import segment_attention
from qwen_jax import sharding as sharding_lib
from qwen_jax.model.norm import layer_norm
from qwen_jax.model.rope import apply_rope
from qwen_jax.runtime import Runtime
from qwen_jax.weights import quant
from qwen_jax.weights.config import VisionConfig
from qwen_jax.weights.params import Merger, Vision, VisionBlock

NORM_EPS = 1e-6  # fixed in the tower, whatever the decoder uses
ROPE_THETA = 10000.0
# Patches whose widest intermediates exist at once: of 65,536 fc1 alone makes 1.1 GB in float32.
TILE = 4096


@struct.dataclass
class VisionBatch:
    """Pictures and videos, one behind the other, in merge-block order.

    Attributes:
        patches: uint8 or float [U, C * Z * Y * X], colour slowest; uint8 is normalised here.
        coordinates: int32 [U, 2], row and column of each patch.
        taps, tap_weights: int32 and float32 [4, U], learned positions to mix.
        segment_starts: int32 [segments + 1]; a patch sees its own segment (a slice in time).
    """

    patches: jax.Array
    coordinates: jax.Array
    taps: jax.Array
    tap_weights: jax.Array
    segment_starts: jax.Array


@struct.dataclass
class VisionFeatures:
    """What the decoder gets.

    Attributes:
        rows: [U / 4, O], one per merge block: they replace the placeholders' embeddings.
        levels: [J, U / 4, O], DeepStack: added after decoder layer j.
    """

    rows: jax.Array
    levels: jax.Array


def encode(
    weights: Vision,
    batch: VisionBatch,
    config: VisionConfig,
    runtime: Runtime,
    *,
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    std: tuple[float, ...] = (0.5, 0.5, 0.5),
) -> VisionFeatures:
    """Runs the tower.

    Args:
        weights: of the tower.
        batch: the pictures; what lies behind the last segment is padding, whose rows mean nothing.
        config, runtime: static.
        mean, std: per colour, of the checkpoint's preprocessor.
    """
    x_UD = _embed(weights, batch, config, runtime, mean, std)
    rotary = angles(batch.coordinates, config)
    levels = []
    taps = dict(zip(config.deepstack_visual_indexes, weights.deepstack, strict=True))
    for i, block in enumerate(weights.blocks):
        x_UD = vision_block(
            block, x_UD, rotary, batch.segment_starts, config=config, runtime=runtime
        )
        if i in taps:
            levels.append(map_rows(partial(_merge, taps[i], config=config), x_UD, tile=TILE))
    rows = map_rows(partial(_merge_last, weights.merger, config=config), x_UD, tile=TILE)
    # A tower without DeepStack has no level: an empty axis keeps the type.
    stacked = jnp.stack(levels) if levels else jnp.zeros((0, *rows.shape), rows.dtype)
    # The host takes them, in each of several processes: whole on every device.
    whole = partial(sharding_lib.constrain, mesh=runtime.mesh, rules=runtime.rules)
    return VisionFeatures(whole(rows, ". ."), whole(stacked, ". . ."))


def _embed(weights: Vision, batch: VisionBatch, config: VisionConfig, runtime: Runtime, mean, std):
    def embed(patches, taps_U4, tap_weights_U4):
        pixels = normalise(patches, config, mean, std).astype(runtime.dtype)
        x_UD = quant.einsum("UCZYX,CZYXD->UD", pixels, weights.patch) + weights.patch_bias
        return x_UD + learned_positions(weights.positions, taps_U4, tap_weights_U4, runtime)

    return map_rows(embed, batch.patches, batch.taps.T, batch.tap_weights.T, tile=TILE)


def normalise(
    patches: jax.Array, config: VisionConfig, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """uint8 [U, C*Z*Y*X] -> float32 [U, C, Z, Y, X], ``(x / 255 - mean) / std`` per colour."""
    sizes = config.sizes
    pixels = patches.reshape(-1, sizes["C"], sizes["Z"], sizes["Y"], sizes["X"])
    if not jnp.issubdtype(patches.dtype, jnp.unsignedinteger):
        return pixels
    per_colour = (1, -1, 1, 1, 1)
    centre = jnp.asarray(mean, jnp.float32).reshape(per_colour)
    width = jnp.asarray(std, jnp.float32).reshape(per_colour)
    return (pixels.astype(jnp.float32) * np.float32(1 / 255) - centre) / width


def learned_positions(
    table: jax.Array, taps_U4: jax.Array, weights_U4: jax.Array, runtime: Runtime
) -> jax.Array:
    """Bilinear mixture [U, D] of four learned positions per patch, in float32, rounded once.

    Source: transformers vision_utils.get_vision_interpolation_indices_and_weights.
    """
    rows_U4D = table[taps_U4].astype(jnp.float32)
    mixed_UD = jnp.einsum("UnD,Un->UD", rows_U4D, weights_U4, precision="highest")
    return mixed_UD.astype(runtime.dtype)


def angles(coordinates: jax.Array, config: VisionConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [U, H/2]: the first half of the pairs turns with the row, then the column.

    Source: transformers Qwen3VLMoeVisionRotaryEmbedding.
    """
    per_axis = config.sizes["H"] // 4
    frequencies = ROPE_THETA ** (-np.arange(per_axis, dtype=np.float32) / np.float32(per_axis))
    turned = coordinates.astype(jnp.float32)[:, :, None] * frequencies.astype(np.float32)
    angle = turned.reshape(coordinates.shape[0], 2 * per_axis)
    return jnp.cos(angle), jnp.sin(angle)


jit_encode = partial(jax.jit, static_argnames=("config", "runtime", "mean", "std"))(encode)


@partial(jax.jit, static_argnames=("config", "runtime"))
def vision_block(
    weights: VisionBlock,
    x_UD: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    segment_starts: jax.Array,
    *,
    config: VisionConfig,
    runtime: Runtime,
) -> jax.Array:
    """One pre-norm block: attention inside segments, then a GELU MLP, each added to the stream.

    Source: transformers Qwen3VLMoeVisionBlock.
    """

    def project(x_UD, cos, sin):
        normed = layer_norm(x_UD, weights.norm1, weights.norm1_bias, NORM_EPS)
        qkv = quant.einsum("UD,DQNH->UQNH", normed, weights.qkv) + weights.qkv_bias
        query, key, value = (qkv[:, i] for i in range(3))
        return apply_rope(query, cos, sin), apply_rope(key, cos, sin), value

    def finish(x_UD, seen_UNH):
        x_UD = x_UD + quant.einsum("UNH,NHD->UD", seen_UNH, weights.o) + weights.o_bias
        normed = layer_norm(x_UD, weights.norm2, weights.norm2_bias, NORM_EPS)
        hidden = quant.einsum("UD,DI->UI", normed, weights.fc1) + weights.fc1_bias
        hidden = jax.nn.gelu(hidden, approximate=True)
        return x_UD + quant.einsum("UI,ID->UD", hidden, weights.fc2) + weights.fc2_bias

    query, key, value = map_rows(project, x_UD, *rotary, tile=TILE)
    seen_UNH = _attend(query, key, value, segment_starts, config, runtime)
    return map_rows(finish, x_UD, seen_UNH, tile=TILE)


def _attend(query, key, value, segment_starts, config: VisionConfig, runtime: Runtime):
    mesh = runtime.mesh
    heads, whole = (sharding_lib.spec(d, mesh, runtime.rules) for d in (". N .", "."))

    def local(q, k, v, starts):
        return segment_attention(
            q,
            k,
            v,
            segment_starts=starts,
            sm_scale=config.sizes["H"] ** -0.5,
            impl=runtime.kernel("segment_attention"),
        )

    in_specs = (heads, heads, heads, whole)
    return sharding_lib.per_shard(local, mesh, in_specs, heads)(query, key, value, segment_starts)


def _merge(weights: Merger, x_UD: jax.Array, *, config: VisionConfig) -> jax.Array:
    """A DeepStack merger: [U, D] -> [U / 4, O], its norm over whole merge blocks."""
    merged_UM = _blocks(x_UD, config)
    return _project(weights, layer_norm(merged_UM, weights.norm, weights.norm_bias, NORM_EPS))


def _merge_last(weights: Merger, x_UD: jax.Array, *, config: VisionConfig) -> jax.Array:
    """The merger behind the last block: [U, D] -> [U / 4, O], its norm over single patches."""
    normed = layer_norm(x_UD, weights.norm, weights.norm_bias, NORM_EPS)
    return _project(weights, _blocks(normed, config))


def _blocks(x_UD: jax.Array, config: VisionConfig) -> jax.Array:
    """[U, D] -> [U / 4, 4 D]: the patches of a merge block are neighbours already."""
    return x_UD.reshape(-1, config.sizes["M"])


def _project(weights: Merger, x: jax.Array) -> jax.Array:
    """The two layers of a merger, with the exact (erf) GELU between them."""
    hidden = quant.einsum("UM,MW->UW", x, weights.fc1) + weights.fc1_bias
    hidden = jax.nn.gelu(hidden, approximate=False)
    return quant.einsum("UW,WO->UO", hidden, weights.fc2) + weights.fc2_bias
