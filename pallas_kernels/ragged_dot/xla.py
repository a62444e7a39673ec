"""Ragged products in XLA: a loop over (expert, row tile) pairs that exist."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import registry


def ragged_dot(x_MD, w, group_sizes, *, scale, blocks, activation, first_expert, out_dtype):
    M, _ = x_MD.shape
    E, F = w.shape[0], w.shape[-1]
    out = jnp.zeros((M, F), out_dtype)
    if M == 0:
        return out
    m = min(M, 8 if M <= 512 else 64)
    ends_R = jnp.cumsum(group_sizes)
    local = first_expert + jnp.arange(E)
    ends_E = ends_R[local]
    sizes_E = group_sizes[local]
    starts_E = ends_E - sizes_E
    last_E = jnp.cumsum(-(-sizes_E // m))

    def tile(t, out):
        e = jnp.searchsorted(last_E, t, side="right").astype(jnp.int32)
        first = starts_E[e] + (t - (last_E[e] - -(-sizes_E[e] // m))) * m
        start = jnp.minimum(first, M - m)
        row = start + jnp.arange(m)
        x = lax.dynamic_slice_in_dim(x_MD, start, m)
        y = _product(x, _expert(w, scale, blocks, e, x.dtype), activation).astype(out_dtype)
        old = lax.dynamic_slice_in_dim(out, start, m)
        keep = (row >= first) & (row < ends_E[e])
        return lax.dynamic_update_slice_in_dim(out, jnp.where(keep[:, None], y, old), start, 0)

    return lax.fori_loop(0, last_E[-1], tile, out)


def _expert(w, scale, blocks, e, dtype):
    w = lax.dynamic_index_in_dim(w, e, keepdims=False)
    if scale is None:
        return w.astype(dtype)
    scale = lax.dynamic_index_in_dim(scale, e // blocks[0], keepdims=False).astype(jnp.float32)
    for axis, (size, block) in enumerate(zip(w.shape, blocks[1:], strict=True)):
        if scale.shape[axis] > 1 and block > 1:
            scale = lax.slice_in_dim(jnp.repeat(scale, block, axis), 0, size, axis=axis)
    return (w.astype(jnp.float32) * scale).astype(dtype)


def _product(x, w, activation):
    if activation is None:
        return jnp.einsum("MD,DF->MF", x, w, preferred_element_type=jnp.float32)
    both = jnp.einsum("MD,DPF->MPF", x, w, preferred_element_type=jnp.float32)
    return jax.nn.silu(both[:, 0]) * both[:, 1]


def supports(platform: str, **facts) -> str | None:
    """Runs everything, everywhere."""
    return None


IMPL = registry.Impl("ragged_dot", "xla", None, supports, ragged_dot)
