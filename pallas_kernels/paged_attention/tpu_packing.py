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


def read(ref, head: int, *, plain: bool) -> jax.Array:
    """One head, float32 [S, H]; float8 and int8 numbers are converted exactly."""
    S, C, _ = ref.shape
    if plain:
        return ref[:, head, :].astype(jnp.float32)
    pack = pack_of(ref.dtype)
    group, i = divmod(head, pack)
    words = _words(ref, pack)[pl.ds(group, S, stride=C // pack), :]
    return _decode(words, i, ref.dtype)


def read_halves(ref, head: int) -> jax.Array:
    """One bfloat16 head [S, H], its rows in the order of `halves`: two operations per register.

    Two rows of a bfloat16 array share a word, the even one low. So the words of the first half of
    the rows and those of the second give a head without ever being float32.
    """
    S, C, _ = ref.shape
    words = _words(ref, 2)
    group, high = divmod(head, 2)
    first, second = (
        words[pl.ds(group + start * C // 2, S // 2, stride=C // 2), :] for start in (0, S // 2)
    )
    if high:
        pairs = (first >> 16) | (second & jnp.uint32(0xFFFF0000))
    else:
        pairs = (first & jnp.uint32(0xFFFF)) | (second << 16)
    return pltpu.bitcast(pairs, ref.dtype)


def halves(S: int) -> jax.Array:
    """int32 [1, S], which row stands where in `read_halves`: 0, S/2, 1, S/2 + 1 …"""
    at = lax.broadcasted_iota(jnp.int32, (1, S), 1)
    return (at >> 1) + (at & 1) * (S // 2)


def read_planes(ref, group: int) -> list[jax.Array]:
    """The four heads of 8 bits that share words, each [S, H] as stored, in 7 operations a register.

    Four rows of an array of 8 bits share a word. So the words of four neighbouring positions are
    turned like a matrix of 4 by 4 bytes: halves of words first, then bytes.

        words of positions 0, 1, 2, 3     k v k' v'   ->   k k k k,  v v v v,  k' …,  v' …
    """
    S, C, _ = ref.shape
    words = _words(ref, 4)
    w = [words[pl.ds(group + i * C // 4, S // 4, stride=C), :] for i in range(4)]
    low, odd = jnp.uint32(0x0000FFFF), jnp.uint32(0x00FF00FF)
    planes = []
    for half in range(2):
        if half:
            even, uneven = ((w[i] >> 16) | (w[i + 2] & ~low) for i in (0, 1))
        else:
            even, uneven = ((w[i] & low) | (w[i + 2] << 16) for i in (0, 1))
        planes.append((even & odd) | ((uneven & odd) << 8))
        planes.append(((even >> 8) & odd) | (uneven & ~odd))
    return [pltpu.bitcast(plane, ref.dtype) for plane in planes]


def _decode(words, i: int, dtype):
    """The i-th number of each word, float32."""
    if dtype.itemsize == 4:
        return words
    if dtype.itemsize == 2:
        return pltpu.bitcast(words & jnp.uint32(0xFFFF0000) if i else words << 16, jnp.float32)
    return (_int8 if dtype == jnp.int8 else _float8)(words, i)


def write(ref, group: int, heads: list[jax.Array], *, plain: bool) -> None:
    """Stores the heads of one group, each float32 [S, H]; 16 and 32 bits only."""
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
