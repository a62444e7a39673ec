"""Quantised weights: values in a narrow type, and scales of the same rank.

Knows arrays and blocks; knows no checkpoint, layer or kernel. A `QArray` keeps the letters of the
weight it stands for: axis i of ``scale`` holds one entry per ``blocks[i]`` elements of axis i of
``values`` (the last block may be partial). The published FP8 checkpoints have blocks of 128x128;
quantising per output channel gives a block as long as the contracted axis.
"""

import math
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pallas_kernels.precision import exact

FORMATS = {"fp8": (jnp.float8_e4m3fn, 448.0), "int8": (jnp.int8, 127.0)}


@struct.dataclass
class QArray:
    """``values * scale`` with one scale per block; also a pair of what describes two such arrays.

    Attributes:
        values: float8_e4m3fn or int8, the weight's shape.
        scale: float32 or bfloat16, shape ``ceil(values.shape[i] / blocks[i])``.
        blocks: elements of each axis that share a scale.
    """

    values: Any
    scale: Any
    blocks: tuple[int, ...] = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim


Weight = jax.Array | QArray


def scale_shape(shape: Sequence[int], blocks: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scale of a weight of ``shape``: blocks per axis, the last one partial."""
    return tuple(math.ceil(n / b) for n, b in zip(shape, blocks, strict=True))


def spread(scale, shape: Sequence[int], blocks: Sequence[int]):
    """Repeats each scale over its block, so that it multiplies ``values`` elementwise.

    Args:
        scale: numpy or jax, of shape ``scale_shape(shape, blocks)``.
        shape: the weight's.
        blocks: elements of each axis that share a scale.

    Returns:
        An array of ``shape``, but of size 1 along axes that are a single block, for broadcasting.
    """
    xp = np if isinstance(scale, np.ndarray) else jnp
    for axis, (size, block) in enumerate(zip(shape, blocks, strict=True)):
        if scale.shape[axis] > 1 and block > 1:
            scale = xp.repeat(scale, block, axis=axis)
            scale = scale[(slice(None),) * axis + (slice(0, size),)]
    return scale


def dequantize(w: Weight, dtype=jnp.float32) -> jax.Array:
    """The weight as a plain array: the product in float32, rounded once to ``dtype``."""
    if not isinstance(w, QArray):
        return w.astype(dtype)
    scale = spread(w.scale.astype(jnp.float32), w.shape, w.blocks)
    return (w.values.astype(jnp.float32) * scale).astype(dtype)


def quantize(w: jax.Array, blocks: Sequence[int], form: str) -> QArray:
    """Quantises to ``form`` ("fp8" or "int8") with scales of max-abs per block, in float32.

    Args:
        w: a float array.
        blocks: elements of each axis that share a scale; capped at the axis.
        form: a key of `FORMATS`.

    Returns:
        Values no larger than the format's largest, and float32 scales (1 for a block of zeros).

    Raises:
        ValueError: ``form`` is unknown.
    """
    if form not in FORMATS:
        raise ValueError(f"quantization {form!r} is unknown; use one of {list(FORMATS)}")
    dtype, largest = FORMATS[form]
    w = jnp.asarray(w, jnp.float32)
    blocks = tuple(min(b, n) for b, n in zip(blocks, w.shape, strict=True))
    scale = _block_max(jnp.abs(w), blocks) / largest
    # Zeros, and numbers so small that their scale would not be a normal float32.
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    scaled = w / spread(scale, w.shape, blocks)
    values = jnp.round(scaled) if form == "int8" else scaled
    return QArray(jnp.clip(values, -largest, largest).astype(dtype), scale, blocks)


def _block_max(x: jax.Array, blocks: Sequence[int]) -> jax.Array:
    """The maximum of each block of a non-negative array."""
    for axis, block in enumerate(blocks):
        count = math.ceil(x.shape[axis] / block)
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, count * block - x.shape[axis])
        split = (*x.shape[:axis], count, block, *x.shape[axis + 1 :])
        x = jnp.pad(x, pad).reshape(split).max(axis + 1)
    return x


def einsum(spec: str, x: jax.Array, w: Weight, out_dtype=None) -> jax.Array:
    """``jnp.einsum(spec, x, w)``, accumulated in float32, rounded to ``out_dtype`` (x's dtype).

    A weight with a single scale along every contracted axis is multiplied as it is stored and
    scaled afterwards, which is exact; another is dequantised to x's dtype first (one rounding).

    Args:
        spec: one letter per axis, no ellipsis; every letter of the result is in x or in w.
        x: float.
        w: plain or quantised.
    """
    if not isinstance(w, QArray):
        return _product(spec, x, w).astype(out_dtype or x.dtype)
    operands, result = spec.split("->")
    letters = operands.split(",")[1]
    contracted = [i for i, letter in enumerate(letters) if letter not in result]
    if any(w.scale.shape[i] > 1 for i in contracted):
        return einsum(spec, x, dequantize(w, x.dtype), out_dtype)
    out = _product(spec, x, w.values.astype(x.dtype))
    scale = spread(w.scale.astype(jnp.float32), w.shape, w.blocks)
    kept = "".join(letter for letter in result if letter in letters)
    size = dict(zip(letters, scale.shape, strict=True))
    scale = jnp.einsum(f"{letters}->{kept}", scale)  # contracted axes have size 1
    out = out * scale.reshape([size.get(letter, 1) for letter in result])
    return out.astype(out_dtype or x.dtype)


def _product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    # jnp.einsum contracts in alphabetical order: under letters that are not w's own order ("NHD"),
    # the weight is transposed in memory on every call. So its axes are called A, B, C, …
    letters = spec.split("->")[0].split(",")[1]
    others = [letter for letter in spec if letter.isalpha() and letter not in letters]
    names = {ord(c): ascii_uppercase[i] for i, c in enumerate([*letters, *dict.fromkeys(others)])}
    # TPUs and GPUs multiply float32 in fewer bits by default; who asks for float32 wants it exact.
    return jnp.einsum(
        spec.translate(names), x, w, precision=exact(x), preferred_element_type=jnp.float32
    )
