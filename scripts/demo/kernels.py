"""The three operations of the model in a form that reverse mode can differentiate, called "train".

The XLA implementations loop as often as the data say, which cannot be run backwards. These have
fixed shapes, and are made of gathers and batched products only. They register beside the others, so
that `Runtime.make(kernels="train")` trains the very functions that serve.

They ask of the batch what `packing` gives: a flat axis is cut into lines of a fixed length, and no
row (text) or segment (patches) goes over the end of its line; no row has anything cached.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.device import Device

TEXT_LINE = 256  # tokens that a row has at most
PATCH_LINE = 36  # patches that a segment has at most: a picture of 96 x 96
TILE = 64  # rows of one expert that are multiplied at once


def train_ragged_dot(x_MD, w, group_sizes, *, scale, blocks, activation, first_expert, out_dtype):
    """`ragged_dot` of float weights that hold all experts.

    Each expert's rows are padded to whole tiles. There are never more than M / TILE + E of them, so
    the shapes are fixed, and no row is dropped however the router decides.

        rows     a a a b c c        TILE = 2, E = 3, M = 6: at most 6 tiles
        tiles    aa a- b- cc -- --
    """
    E, M = w.shape[0], x_MD.shape[0]
    if scale is not None or group_sizes.shape[0] != E:
        raise ValueError(
            f"ragged_dot: 'train' takes float weights of all {group_sizes.shape[0]} experts, "
            f"got {E} of them in {w.dtype}; use 'xla' for shards and quantised weights"
        )
    tiles = -(-M // TILE) + E
    first_row = jnp.cumsum(group_sizes) - group_sizes
    used = -(-group_sizes // TILE)
    first_tile = jnp.cumsum(used) - used
    tile = jnp.arange(tiles)
    expert = jnp.minimum(jnp.searchsorted(jnp.cumsum(used), tile, side="right"), E - 1)
    inside = (tile - first_tile[expert])[:, None] * TILE + jnp.arange(TILE)
    held = inside < group_sizes[expert][:, None]
    rows = jnp.where(held, first_row[expert][:, None] + inside, M)
    x = x_MD.at[rows].get(mode="fill", fill_value=0)
    product = jnp.einsum("ntd,n...df->n...tf", x, w[expert])
    if activation is not None:
        product = jax.nn.silu(product[:, 0]) * product[:, 1]
    out = jnp.zeros((M, w.shape[-1]), product.dtype)
    out = out.at[rows.reshape(-1)].set(
        product.reshape(-1, w.shape[-1]), mode="drop", unique_indices=True
    )
    return out.astype(out_dtype)


def train_paged_attention(
    q_TNH, k_TKH, v_TKH, pages, scales, *, row_starts, kv_lens, page_table, sm_scale
):
    """`paged_attention` of whole rows inside lines; the pages are left as they are."""
    lines, (_, N, H), K = (q_TNH.shape[0] // TEXT_LINE, q_TNH.shape, k_TKH.shape[1])
    token = jnp.arange(q_TNH.shape[0])
    row = jnp.searchsorted(row_starts[1:], token, side="right").reshape(lines, TEXT_LINE)
    at = jnp.arange(TEXT_LINE)
    seen = (row[:, :, None] == row[:, None, :]) & (at[:, None] >= at[None, :])
    q = q_TNH.reshape(lines, TEXT_LINE, K, N // K, H)
    k, v = (x.reshape(lines, TEXT_LINE, K, H) for x in (k_TKH, v_TKH))
    scores = jnp.einsum("ltKGH,lsKH->lKGts", q, k) * sm_scale
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30))
    out = jnp.einsum("lKGts,lsKH->ltKGH", weights, v).reshape(-1, N, H)
    return jnp.where((token < row_starts[-1])[:, None, None], out, 0), pages, scales


def train_segment_attention(q_UNH, k_UNH, v_UNH, segment_starts, sm_scale):
    """`segment_attention` of whole segments inside lines."""
    lines = q_UNH.shape[0] // PATCH_LINE
    patch = jnp.arange(q_UNH.shape[0])
    segment = jnp.searchsorted(segment_starts[1:], patch, side="right").reshape(lines, PATCH_LINE)
    q, k, v = (x.reshape(lines, PATCH_LINE, *x.shape[1:]) for x in (q_UNH, k_UNH, v_UNH))
    seen = segment[:, :, None] == segment[:, None, :]
    scores = jnp.einsum("ltNH,lsNH->lNts", q, k) * sm_scale
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30))
    out = jnp.einsum("lNts,lsNH->ltNH", weights, v).reshape(q_UNH.shape)
    return jnp.where((patch < segment_starts[-1])[:, None, None], out, 0)


def _supports(device: Device, facts: object) -> str | None:
    """Runs everywhere; what it asks of a batch is said above."""
    return None


def register() -> None:
    """Makes "train" known to the registry; once."""
    for op, fn in (
        ("ragged_dot", train_ragged_dot),
        ("paged_attention", train_paged_attention),
        ("segment_attention", train_segment_attention),
    ):
        if "train" not in registry.names(op):
            registry.register(registry.Impl(op, "train", None, _supports, fn))
