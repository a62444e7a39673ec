"""Quantised weights: values in a narrow type, and scales of the same rank.

Knows arrays and blocks; knows no checkpoint, layer or kernel. A `QArray` keeps the letters of the
weight it stands for: axis i of ``scale`` holds one entry per ``blocks[i]`` elements of axis i of
``values`` (the last block may be partial). The published FP8 checkpoints have blocks of 128x128;
quantising per output channel gives a block as long as the contracted axis.
"""

import functools
import math
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from pallas_kernels.precision import exact

FORMATS = {"fp8": (jnp.float8_e4m3fn, 448.0), "int8": (jnp.int8, 127.0)}
# Rows up to which a TPU scales sums of blocks: from there on dequantising is less work.
MOST_SPLIT_ROWS = 256


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
    scaled afterwards, which is exact. Another is dequantised to x's dtype first (one rounding), but
    on a TPU the sums of blocks are scaled instead where they can be, which is exact too.

    Args:
        spec: one capital letter per axis, no ellipsis; every letter of the result is in x or in w.
        x: float.
        w: plain or quantised.
    """
    out_dtype = out_dtype or x.dtype
    if not isinstance(w, QArray):
        return _product(spec, x, w).astype(out_dtype)
    letters, result = spec.split(",")[1].split("->")
    contracted = [i for i, letter in enumerate(letters) if letter not in result]
    scaled = [i for i in contracted if w.scale.shape[i] > 1]
    if scaled:
        rows = math.prod(x.shape) // math.prod(w.shape[i] for i in contracted)
        whole = functools.partial(_dequantized, spec)
        split = whole
        if rows <= MOST_SPLIT_ROWS and len(scaled) == 1 and _splits(w, *scaled):
            split = functools.partial(_sum_of_blocks, spec, axis=scaled[0])
        return lax.platform_dependent(x, w, tpu=split, default=whole).astype(out_dtype)
    out = _product(spec, x, w.values.astype(x.dtype))
    scale = spread(w.scale.astype(jnp.float32), w.shape, w.blocks)
    return (out * _as_result(scale, letters, result)).astype(out_dtype)


def _dequantized(spec: str, x: jax.Array, w: QArray) -> jax.Array:
    return _product(spec, x, dequantize(w, x.dtype))


def _splits(w: QArray, axis: int) -> bool:
    return w.blocks[axis] > 1 and w.shape[axis] % w.blocks[axis] == 0


def _sum_of_blocks(spec: str, x: jax.Array, w: QArray, *, axis: int) -> jax.Array:
    """Contracts each block of an axis of w by itself, scales, and adds up: float32.

    XLA:TPU adds within the product. Dequantising [D, N, H] is a pass of its own there, because the
    axis that is summed lies outside of the tiles: 8 rows of 2048 by [2048, 32, 128] on v6e take
    13,500 cycles in blocks and 87,000 dequantised, by the compiler's own estimate.
    """
    rows, letters = spec.split("->")[0].split(",")
    result, letter, size = spec.split("->")[1], letters[axis], w.blocks[axis]
    place = rows.index(letter)
    x = x.reshape(*x.shape[:place], -1, size, *x.shape[place + 1 :])
    values = w.values.reshape(*w.shape[:axis], -1, size, *w.shape[axis + 1 :])
    split = [part.replace(letter, f"b{letter}") for part in (rows, letters)]
    out = _product(f"{','.join(split)}->b{result}", x, values.astype(x.dtype))
    shape = (*w.shape[:axis], w.scale.shape[axis], *w.shape[axis + 1 :])
    blocks = (*w.blocks[:axis], 1, *w.blocks[axis + 1 :])
    scale = spread(w.scale.astype(jnp.float32), shape, blocks)
    return jnp.sum(out * _as_result(scale, letters.replace(letter, "b"), f"b{result}"), axis=0)


def _as_result(scale: Any, letters: str, result: str) -> jax.Array:
    """A scale with axes ``letters``, those that are not in ``result`` of size 1, in its order."""
    kept = "".join(letter for letter in result if letter in letters)
    size = dict(zip(letters, scale.shape, strict=True))
    scale = jnp.einsum(f"{letters}->{kept}", scale)
    return scale.reshape([size.get(letter, 1) for letter in result])


def _product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    product = functools.partial(_exact_product, spec)
    rows, letters = spec.split("->")[0].split(",")
    own = [i for i, letter in enumerate(rows) if letter not in letters]
    if len(own) != 1 or x.shape[own[0]] != 1:
        return product(x, w)
    place = own[0], spec.split("->")[1].index(rows[own[0]])
    return lax.platform_dependent(
        x, w, tpu=functools.partial(_with_another_row, product, place), default=product
    )


def _with_another_row(product, place: tuple[int, int], x: jax.Array, w: jax.Array) -> jax.Array:
    """The product of one row, which XLA:TPU would take without the matrix unit if it were alone.

    (On v6e 73,800 cycles instead of 8,100 for one row of 2048 by [2048, 32, 128].)

    Args:
        product: of x and w.
        place: the row's axis in x and in the product.
    """
    pad = [(0, int(axis == place[0])) for axis in range(x.ndim)]
    return lax.slice_in_dim(product(jnp.pad(x, pad), w), 0, 1, axis=place[1])


def _exact_product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    # jnp.einsum contracts in alphabetical order: under letters that are not w's own order ("NHD"),
    # the weight is transposed in memory on every call. So its axes are called A, B, C, …
    letters = spec.split("->")[0].split(",")[1]
    others = [letter for letter in spec if letter.isalpha() and letter not in letters]
    names = {ord(c): ascii_uppercase[i] for i, c in enumerate([*letters, *dict.fromkeys(others)])}
    # TPUs and GPUs multiply float32 in fewer bits by default; who asks for float32 wants it exact.
    return jnp.einsum(
        spec.translate(names), x, w, precision=exact(x), preferred_element_type=jnp.float32
    )
