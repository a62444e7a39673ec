"""Heads out of interleaved rows: from [S, C, H] in VMEM to one head's [S, H], and back.

Knows how the TPU packs narrow numbers; knows no attention. The C heads of a position lie below each
other, 32 bits deep: two bfloat16 heads, or four of 8 bits, share a 32-bit word.

    word row          0        1                 C / pack words of one position
    heads          (0, 1)   (2, 3)   ...         low half first

So the words of one group of heads are read with a stride of C / pack rows, a whole vector register
at a time, and taken apart with shifts: a key and its value come with one load. The interpreter that
looks for races cannot see one array as another, so there a head is read by its plain index
(`plain`); that both read the same is a test.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def pack_of(dtype) -> int:
    """How many numbers share a 32-bit word."""
    return 4 // jnp.dtype(dtype).itemsize


def strided(heads: int, dtype) -> bool:
    """Whether XLA lays [.., heads, H] out without padding, so that a stride reaches every row."""
    words, rest = divmod(heads, pack_of(dtype))
    return rest == 0 and (words in (1, 2, 4) or words % 8 == 0)


def padded(heads: int, dtype) -> int:
    """The least number of heads, from ``heads`` on, that `strided` takes."""
    while not strided(heads, dtype):
        heads += 1
    return heads


def _words(ref, pack: int):
    """[S, C, H] seen as [S * C / pack, H] words; float32 as it is."""
    S, C, H = ref.shape
    flat = ref.reshape(S * C, H)
    return flat if pack == 1 else flat.bitcast(jnp.uint32)


def read(ref, group: int, *, plain: bool) -> list[jax.Array]:
    """The ``pack`` heads of one group, each float32 [S, H] (float8 and int8 converted exactly)."""
    S, C, _ = ref.shape
    pack = pack_of(ref.dtype)
    if plain:
        return [ref[:, group * pack + i, :].astype(jnp.float32) for i in range(pack)]
    words = _words(ref, pack)[pl.ds(group, S, stride=C // pack), :]
    if pack == 1:
        return [words]
    if pack == 2:
        halves = words << 16, words & jnp.uint32(0xFFFF0000)
        return [pltpu.bitcast(half, jnp.float32) for half in halves]
    decode = _int8 if ref.dtype == jnp.int8 else _float8
    return [decode(words, i) for i in range(pack)]


def write(ref, group: int, heads: list[jax.Array], *, plain: bool) -> None:
    """Stores one group of heads, each float32 [S, H]; the inverse of `read`, for 16 and 32 bits."""
    S, C, _ = ref.shape
    pack = pack_of(ref.dtype)
    if plain:
        for i, head in enumerate(heads):
            ref[:, group * pack + i, :] = head.astype(ref.dtype)
        return
    if pack == 2:
        low, high = (
            pltpu.bitcast(head.astype(ref.dtype).astype(jnp.float32), jnp.uint32) for head in heads
        )
        value = (low >> 16) | high
    else:
        (value,) = heads
    _words(ref, pack)[pl.ds(group, S, stride=C // pack), :] = value


def _int8(words, i: int):
    number = pltpu.bitcast(words << (24 - 8 * i), jnp.int32) >> 24
    return number.astype(jnp.float32)


def _float8(words, i: int):
    """e4m3 by integer arithmetic, since only the newest chips convert it.

    Exponent and mantissa move to where float32 has them, 120 higher. A subnormal number then reads
    ``2**-7 (1 + m / 8)`` instead of ``2**-6 m / 8``: twice that minus ``2**-6``.
    """
    word = pltpu.bitcast(words, jnp.int32)
    byte = lax.shift_right_logical(word, jnp.int32(8 * i)) if i else word
    magnitude = byte & 0x7F
    number = pltpu.bitcast((magnitude << 20) + (120 << 23), jnp.float32)
    number = jnp.where(magnitude < 8, number + number - 2.0**-6, number)
    number = jnp.where(magnitude == 0x7F, jnp.nan, number)
    sign = (byte & 0x80) << 24
    return pltpu.bitcast(pltpu.bitcast(number, jnp.int32) | sign, jnp.float32)
