"""Routed expert products: each row times the matrix of its own expert, SwiGLU fused if wanted.

Knows rows sorted by expert, group sizes and quantisation scales; knows no router, no mesh and no
layer. Implementations: `tpu` and `gpu` (Mosaic), `xla`, and `tpu_w8a8`, which rounds rows to int8.
This module checks what all rely on.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.device import Device
from pallas_kernels.ragged_dot import gpu, tpu, xla
from pallas_kernels.ragged_dot.facts import Facts as Facts

registry.register(tpu.IMPL)
registry.register(gpu.IMPL)
registry.register(xla.IMPL)
# Behind the one that runs everywhere, where "auto" never comes: it rounds, so it is asked for.
registry.register(tpu.W8A8)

WEIGHT_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int8")


def ragged_dot(
    x_MD: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    scale: jax.Array | None = None,
    blocks: tuple[int, ...] | None = None,
    activation: str | None = None,
    first_expert: jax.Array | int = 0,
    impl: str = "xla",
    out_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Multiplies each row by its expert's matrix, accumulating in float32.

    Args:
        x_MD: float [M, D], rows sorted by expert.
        w: [E, D, F]; with ``activation="swiglu"`` [E, 2, D, F] holding (gate, up): whole matrices,
            because a pair next to F would be interleaved in the tiles of a TPU's memory. float32,
            bfloat16, float8_e4m3fn or int8.
        group_sizes: int32 [R], how many rows each of ALL the experts has, in order.
        scale: None, or float, w's rank: ``w[i] * scale[i // blocks]`` is the weight meant.
        blocks: elements of each axis of w that share one entry of ``scale``; the last block of an
            axis may be partial.
        activation: None, or ``"swiglu"``: ``silu(x @ w[:, 0]) * (x @ w[:, 1])``.
        first_expert: w holds the experts ``first_expert .. first_expert + E - 1`` of the R; may be
            a traced int32 scalar, so that shards of one program differ.
        impl: the implementation's name, as `registry.choose` gave it.
        out_dtype: default x's dtype.

    Returns:
        [M, F]. Rows of experts not in w, and rows behind ``sum(group_sizes)``, are exactly 0; they
        are never read.

    Raises:
        ValueError: shapes, dtypes, scale and blocks do not fit together, or the implementation
            cannot run this on the device that the mesh names (`Device.current`).
    """
    _check(x_MD, w, group_sizes, scale, blocks, activation)
    if isinstance(first_expert, int) and not 0 <= first_expert <= len(group_sizes) - len(w):
        raise ValueError(
            f"ragged_dot: experts {first_expert} .. {first_expert + len(w) - 1} "
            f"of only {len(group_sizes)}"
        )
    out_dtype = jnp.dtype(out_dtype or x_MD.dtype)
    facts = Facts.of(x_MD, w, scale, blocks, activation, out_dtype)
    fn = registry.runnable("ragged_dot", impl, Device.current(), [facts])
    return fn(
        jnp.asarray(x_MD),
        jnp.asarray(w),
        jnp.asarray(group_sizes, jnp.int32),
        scale=None if scale is None else jnp.asarray(scale),
        blocks=blocks,
        activation=activation,
        first_expert=jnp.asarray(first_expert, jnp.int32),
        out_dtype=out_dtype,
    )


def _check(x_MD, w, group_sizes, scale, blocks, activation) -> None:
    if activation not in (None, "swiglu"):
        raise ValueError(f'ragged_dot: activation {activation!r}; use None or "swiglu"')
    rank = 4 if activation else 3
    dims = "[E, 2, D, F]" if activation else "[E, D, F]"
    if w.ndim != rank or (activation and w.shape[1] != 2):
        raise ValueError(f"ragged_dot: w has shape {w.shape}, activation={activation} needs {dims}")
    if x_MD.ndim != 2 or x_MD.shape[1] != w.shape[-2]:
        raise ValueError(f"ragged_dot: x {x_MD.shape} is not [M, D={w.shape[-2]}] of w {w.shape}")
    if jnp.dtype(w.dtype).name not in WEIGHT_DTYPES:
        raise ValueError(f"ragged_dot: w is {w.dtype}; use one of {WEIGHT_DTYPES}")
    if not jnp.issubdtype(x_MD.dtype, jnp.floating) or x_MD.dtype.itemsize < 2:
        raise ValueError(f"ragged_dot: x is {x_MD.dtype}; use float32, bfloat16 or float16")
    if group_sizes.ndim != 1 or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"ragged_dot: group_sizes is {group_sizes.dtype}{group_sizes.shape}; use int32 [R]"
        )
    if group_sizes.shape[0] < w.shape[0]:
        raise ValueError(
            f"ragged_dot: w holds {w.shape[0]} experts, group_sizes only {group_sizes.shape[0]}"
        )
    if (scale is None) != (blocks is None):
        raise ValueError("ragged_dot: give scale and blocks together, or neither")
    if scale is not None:
        _check_scale(w, scale, blocks)


def _check_scale(w, scale, blocks) -> None:
    if len(blocks) != w.ndim or any(b < 1 for b in blocks):
        raise ValueError(f"ragged_dot: blocks {blocks} use one size >= 1 per axis of w {w.shape}")
    wanted = tuple(math.ceil(n / b) for n, b in zip(w.shape, blocks, strict=True))
    if scale.shape != wanted:
        raise ValueError(
            f"ragged_dot: scale {scale.shape} for w {w.shape} in blocks {blocks}; needs {wanted}"
        )
