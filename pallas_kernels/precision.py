"""How exactly products are taken. Knows dtypes; knows no operation."""

import jax
import jax.numpy as jnp


def exact(x: jax.Array) -> str | None:
    """The precision of products with ``x`` on its left: float32 is not to be rounded to less.

    (The default on TPU and GPU is a single bfloat16 or TF32 pass.)
    """
    return "highest" if x.dtype == jnp.float32 else None
