"""The arithmetic of one stage of the Hopper kernel: weights times rows, both in shared memory.

Knows one warpgroup's buffers and sums; knows no expert, copy or barrier. The tensor cores multiply
64 x 16 by 16 x N: the weights stand on the left, transposed, so that few rows are a small N and not
a mostly empty 64. float8 becomes bfloat16 in registers, exactly, in front of the product.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def multiply(sums, w, x) -> None:
    """Starts ``sums += w.T @ x.T``.

    Args:
        sums: accumulators, float32 [64, rows].
        w: shared memory, [inner, 64], bfloat16 or float8_e4m3fn.
        x: shared memory, [rows, inner].
    """
    left = w.transpose((1, 0))
    plgpu.wgmma(sums, left if w.dtype == x.dtype else _upcast(left), x.transpose((1, 0)))


def _upcast(w) -> jax.Array:
    """A float8 matrix [64, inner], transposed in shared memory, in registers as bfloat16.

    Two neighbours of a column come as one word, become bfloat16 by way of float16 and float32 (the
    only ways that the chip has, all exact), and change places between threads: the tensor cores
    take neighbours of a row.
    """
    pairs = plgpu.layout_cast(w[...], plgpu.Layout.WGMMA_TRANSPOSED)
    wide = pairs.astype(jnp.float16).astype(jnp.float32).astype(jnp.bfloat16)
    return plgpu.layout_cast(wide, plgpu.Layout.WGMMA)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """``silu(gate) * up``, in float32."""
    return gate / (1 + jnp.exp(-gate)) * up
