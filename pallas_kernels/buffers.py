"""Buffers that come into being when they are needed, and loops over rows that fill one.

Knows XLA's habits; knows no operation. XLA:CPU schedules for concurrency: buffers of zeros depend
on nothing, so it makes those of every layer first and holds them all (`memory_analysis` of a tower
of 27 blocks over 65,536 patches: 41 GB of temporaries, 3 GB with these).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def hidden_zero(x: jax.Array) -> jax.Array:
    """The int32 scalar 0, of which XLA cannot see that it is one, nor before ``x`` is there.

    (An optimization barrier does the same for jax 0.11; jax 0.10 drops barriers on CPU too early.)
    """
    first = x[(0,) * x.ndim].astype(jnp.float32)
    sign = lax.shift_right_logical(lax.bitcast_convert_type(first, jnp.int32), jnp.int32(31))
    return lax.shift_right_logical(sign, jnp.int32(1))


def zeros_after(x: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Zeros of ``shape``, made once ``x`` (not empty) is there."""
    return jnp.broadcast_to(hidden_zero(x).astype(dtype), shape)


def in_own_loop(y: jax.Array, after: jax.Array) -> jax.Array:
    """``y`` (float32) itself, computed in one loop of its own, apart from what consumes it.

    XLA:CPU hands sums and products, with all that stands before them, to a library that takes
    slices as copies only, and turns the operands of a product as it likes. The library knows no
    integers, so y passes through them, changed by a hidden zero of ``after`` (not empty).
    """
    bits = lax.bitcast_convert_type(y, jnp.int32) ^ hidden_zero(after)
    return lax.bitcast_convert_type(bits, jnp.float32)


def map_rows(fn: Callable[..., Any], *rows: jax.Array, tile: int) -> Any:
    """``fn(*rows)``, for a function that keeps rows apart, ``tile`` rows at a time.

    Args:
        fn: takes pieces of ``rows`` of equal length n; its results (any pytree of arrays) have the
            same rows, or one for each group of neighbours: n * k / m rows for fixed k, m.
        rows: arrays of equal length, which must be whole groups.
        tile: rows that ``fn`` sees at once; whole groups.

    Returns:
        What ``fn`` of all rows at once would return. Only one tile's intermediates exist at a time.
    """
    count = rows[0].shape[0]
    if count <= tile:
        return fn(*rows)

    def piece(start):
        return fn(*(lax.dynamic_slice_in_dim(x, start, tile) for x in rows))

    def rows_of(found, n):  # of a result, for n rows that went in
        return n * found.shape[0] // tile

    def step(i, out):
        start = jnp.minimum(i * tile, count - tile)  # the last tile does some rows once more

        def put(whole, found):
            return lax.dynamic_update_slice_in_dim(whole, found, rows_of(found, start), 0)

        return jax.tree.map(put, out, piece(start))

    def make(found):
        return zeros_after(rows[0], (rows_of(found, count), *found.shape[1:]), found.dtype)

    out = jax.tree.map(make, jax.eval_shape(piece, 0))
    return lax.fori_loop(0, -(-count // tile), step, out)
