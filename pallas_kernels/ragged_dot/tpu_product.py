"""The arithmetic of one tile of the TPU kernel: rows times weights in VMEM, scaled and activated.

Knows values, weights and scales; knows no expert, copy or HBM. Weights of 8 bits are multiplied as
they are stored, and each partial sum over a block of rows is scaled in float32, so nothing is
rounded before the end; but for rows that are to be `rounded`, which the caller asks for.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


def product(
    x, w, scale, *, blocks: tuple[int, int] | None, column, round_rows: bool = False
) -> jax.Array:
    """float32 [rows, columns]: ``x @ w[0]``, or SwiGLU of it and ``x @ w[1]``.

    Args:
        x: [rows, D].
        w: VMEM [P, D, columns].
        scale: VMEM [P, row blocks, column blocks] of the whole matrices, or None.
        blocks: rows and columns that share a scale, or None.
        column: the first of the tile's columns, a multiple of 128.
        round_rows: multiply `rounded` rows; w is int8.
    """
    unit = None
    if round_rows:
        x, unit = rounded(x)
    if blocks is None:
        y = [_dot(x, w[p]) for p in range(w.shape[0])]
    else:
        y = [_scaled(x, w.at[p], scale.at[p], blocks, column) for p in range(w.shape[0])]
    if unit is not None:
        y = [each * unit for each in y]
    return y[0] if len(y) == 1 else y[0] * jax.nn.sigmoid(y[0]) * y[1]


def rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows as int8 [rows, D] times float32 [rows, 1]: a row's largest number becomes 127."""
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    # In two steps, as the compiler converts.
    whole = jnp.round(x * (127 / jnp.maximum(top, 1e-30))).astype(jnp.int32)
    return whole.astype(jnp.int8), top * (1 / 127)


def _scaled(x, w, scale, blocks: tuple[int, int], column) -> jax.Array:
    """The sum over blocks of rows of (x times the values as they are) times their scales."""
    rows = _scale_rows(scale, blocks[1], column, w.shape[-1])
    y = jnp.zeros((x.shape[0], w.shape[-1]), jnp.float32)
    for i in range(rows.shape[0]):
        k = slice(i * blocks[0], (i + 1) * blocks[0])
        y = y + _dot(x[:, k], w[k]) * rows[i : i + 1]
    return y


def _scale_rows(scale, block: int, column, columns: int) -> jax.Array:
    """float32 [row blocks, columns]: a scale for every column of the tile."""
    if block == 1:
        return scale[:, pl.ds(column, columns)].astype(jnp.float32)
    # A product with zeros and ones repeats each scale over its columns, exactly.
    whole = scale[...].astype(jnp.float32)
    shape = (whole.shape[1], columns)
    place = lax.div(column + lax.broadcasted_iota(jnp.int32, shape, 1), block)
    own = place == lax.broadcasted_iota(jnp.int32, shape, 0)
    return _dot(whole, own.astype(jnp.float32))


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w in float32; values of 8 bits are exact in x's dtype.

    bfloat16 times float8 is one instruction of the matrix unit, which reads float8 at no cost; int8
    is converted in front of it, but where both are: such sums are exact in int32.
    """
    if x.dtype == jnp.int8:
        y = lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
        return y.astype(jnp.float32)
    exact = x.dtype == jnp.float32
    if exact or w.dtype == jnp.int8:
        w = w.astype(x.dtype)
    return lax.dot_general(
        x,
        w,
        (((1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )
