"""Narrow floating point arrays moved as integers.

Knows dtypes; knows no operation. XLA:CPU has no float8 data movement: it widens the whole operand
of a slice, gather or scatter to float16 first, which for a stack of experts is a copy of all of it
(`memory_analysis`: 10 GB of temporaries to slice one expert of [160, 6144, 2, 2560]). JAX 0.10's
does the same to bfloat16, in float32 (1.6 GB for one expert of [128, 2, 2048, 768]). Seen as
integers, nothing is widened but what was picked. Seeing is free where it fuses with the picking,
and a copy where it does not.
"""

import jax
import jax.numpy as jnp
from jax import lax

_SEEN_AS = {1: jnp.uint8} if jax.__version_info__ >= (0, 11) else {1: jnp.uint8, 2: jnp.uint16}


def as_bits(x: jax.Array) -> jax.Array:
    """An array of floating point numbers that XLA:CPU would widen, as integers; others as is."""
    seen_as = _SEEN_AS.get(x.dtype.itemsize) if jnp.issubdtype(x.dtype, jnp.floating) else None
    return x if seen_as is None else lax.bitcast_convert_type(x, seen_as)


def from_bits(x: jax.Array, dtype) -> jax.Array:
    """The inverse: ``x``, a piece of ``as_bits(y)``, in y's ``dtype``."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def bits_at(x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``as_bits(x)`` and ``index``, for slicing the one at the other inside a loop.

    The barrier ties them, so that XLA does not hoist the view out of the loop, where it would be a
    copy of x instead of a part of the slice.
    """
    if as_bits(x) is x:
        return x, index
    x, index = lax.optimization_barrier((x, index))
    return as_bits(x), index
