"""Float8 arrays moved as bytes.

Knows dtypes; knows no operation. XLA:CPU has no float8 data movement: it widens the whole operand
of a slice, gather or scatter to float16 first, which for a stack of experts is a copy of all of it
(`memory_analysis`: 10 GB of temporaries to slice one expert of [160, 6144, 2, 2560]). Seen as
bytes, nothing is widened but what was picked. Seeing is free where it fuses with the picking, and a
copy of one byte per element where it does not.
"""

import jax
import jax.numpy as jnp
from jax import lax


def as_bytes(x: jax.Array) -> jax.Array:
    """A float8 array seen as uint8; any other array as it is."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 1
    return lax.bitcast_convert_type(x, jnp.uint8) if narrow else x


def from_bytes(x: jax.Array, dtype) -> jax.Array:
    """The inverse: ``x``, a piece of ``as_bytes(y)``, in y's ``dtype``."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def bytes_at(x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``as_bytes(x)`` and ``index``, for slicing the one at the other inside a loop.

    The barrier ties them, so that XLA does not hoist the view out of the loop, where it would be a
    copy of x instead of a part of the slice.
    """
    if as_bytes(x) is x:
        return x, index
    x, index = lax.optimization_barrier((x, index))
    return as_bytes(x), index
