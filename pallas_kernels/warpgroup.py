"""What the warpgroups of our Hopper attention kernels have in common: products and softmax state.

Knows registers' layouts and shared memory; knows no operation. A warpgroup (128 threads) multiplies
64 rows at a time; a row's softmax state is its running maximum, its sum of weights, and the sum of
weighted values, all float32 in registers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.device import Device

# Rows of a warpgroup's product.
ROWS = 64
LEAST = -1e30  # below any score, and finite, so that no exponent is infinity minus infinity


def refusal(device: Device) -> str | None:
    """Why these kernels cannot run on a device, whatever the operation, or None."""
    if jax.__version_info__ < (0, 11):
        return f"jax is {jax.__version__}; the kernels were compiled and tested with 0.11 or newer"
    try:
        hopper.info(device.kind)
    except ValueError as error:
        return str(error)
    return None


def tiled(*dims: int, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory as matrix products read it: lines of up to 128 bytes, by eights, swizzled.

    Args:
        dims: the last one, of whole 32 bytes, is cut into lines.
        dtype: of the elements.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = next(n for n in (128, 64, 32) if dims[-1] * size % n == 0)
    tiles = plgpu.TilingTransform((8, swizzle // size))  # pyright: ignore[reportAbstractUsage]
    lines = plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(dims, dtype, transforms=(tiles, lines))


def product(a, b, dims: tuple[int, int]) -> jax.Array:
    """a @ b in float32; a from shared memory or registers, b from shared memory."""

    def scope(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef(dims, jnp.float32))


def empty(width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax state of ROWS rows that have seen nothing; values are ``width`` wide."""
    row, matrix = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
    return (
        plgpu.layout_cast(jnp.full((ROWS,), LEAST, jnp.float32), row),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row),
        plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), matrix),
    )


def weigh(scores: jax.Array, top: jax.Array, total: jax.Array) -> tuple[jax.Array, ...]:
    """Takes scores (base 2) into a row's maximum and sum.

    Returns:
        The new maximum, the new sum, the factor that decays what was summed before, and the weights
        [ROWS, keys], all float32.
    """
    new = jnp.maximum(top, jnp.max(scores, axis=1))
    decay = jnp.exp2(top - new)
    weights = jnp.exp2(scores - along(new, scores.shape))
    return new, total * decay + jnp.sum(weights, axis=1), decay, weights


def along(row: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """[ROWS] -> [ROWS, columns], the same in every column."""
    return lax.broadcast_in_dim(row, dims, [0])


def normed(total: jax.Array, acc: jax.Array) -> jax.Array:
    """The softmax's result, 0 where nothing was seen."""
    return acc / along(jnp.where(total > 0, total, 1.0), acc.shape)


def places(dims: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """int32 ``dims`` twice: every element's row and column."""
    layout = plgpu.Layout.WGMMA
    rows, columns = (plgpu.broadcasted_iota(jnp.int32, dims, i, layout=layout) for i in range(2))
    return rows, columns
