"""Copies between numpy views of any strides at close to memory speed, and finds NaN on the way.

Knows strides, bits and threads; knows no file and no weight. `out[...] = x.T` is slow on matrices
whose rows are a power of two long (0.6 GB/s per core for bfloat16 [768, 2048]): walking down a
column, every element falls into the same few cache lines. Copying 256x256 blocks into a buffer with
padded rows first costs a second pass inside the cache and makes it two to five times as fast. The
check for NaN and infinity looks at the block while it is there.
"""

import itertools
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

_SIDE = 256  # of a block that is transposed, in elements
_PADDING = 32  # elements behind each row of the block, so that columns spread over the cache
_BLOCK = _SIDE * _SIDE  # elements of a block that keeps its order
_TASK_BYTES = 4 << 20  # what one thread copies at a time
_MAX_THREADS = 16  # more wait for the memory, and for the interpreter's lock

# All bits of the exponent (for FP8, which has no infinity, of the single NaN): values from here on,
# sign aside, are not finite.
_NOT_FINITE = {
    np.dtype(np.float32): 0x7F800000,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
}
_BFLOAT16, _FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


class NotFiniteError(ValueError):
    """A value that was copied is NaN or infinite."""


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Like `np.empty`, aligned to 64 bytes, so that a CPU device can take the memory as it is."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def copy_all(jobs: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Copies (name, destination, source) triples of equal shapes with all cores, rounding once.

    Raises:
        NotFiniteError: a copied value is NaN or infinite; names the triple.
    """
    tasks = [task for job in jobs for task in _split(*job)]
    if len(tasks) < 2:
        for task in tasks:
            _copy(*task)
        return
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1, len(tasks))) as pool:
        for _ in pool.map(lambda task: _copy(*task), tasks):
            pass


def forget(mapped: np.ndarray) -> None:
    """Gives the resident pages of a view of a mapped file back; touched again, they are read again.

    Without this a process that reads a file once seems to hold it all, and the memory bound of a
    conversion could not be measured.
    """
    owner = mapped
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if not isinstance(owner, mmap.mmap) or not mapped.nbytes:
        return
    begin = mapped.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
    page = begin - begin % mmap.PAGESIZE
    owner.madvise(mmap.MADV_DONTNEED, page, begin + mapped.nbytes - page)


def _split(name: str, out: np.ndarray, x: np.ndarray) -> Iterator[tuple]:
    """Cuts one copy into tasks along the longest axis of the destination."""
    if out.size == 0:
        return
    axis = int(np.argmax(out.shape))
    count = min(out.shape[axis], math.ceil(out.nbytes / _TASK_BYTES))
    # Whole sides of a block, so that no task ends in slivers.
    step = math.ceil(out.shape[axis] / count / _SIDE) * _SIDE
    for start in range(0, out.shape[axis], step):
        at = (slice(None),) * axis + (slice(start, start + step),)
        yield name, out[at], x[at]


def _copy(name: str, out: np.ndarray, x: np.ndarray) -> None:
    """One task: ``out[...] = x`` block by block."""
    out, x = _merge(out, x)
    to, since = _fastest(out), _fastest(x)
    scratch = np.empty((_SIDE, _SIDE + _PADDING), out.dtype)
    bits = np.empty(_BLOCK, _unsigned(out.dtype))
    if to == since:
        for at in _blocks(out.shape, _BLOCK):
            _cast(out[at], x[at])
            _check(name, out[at], bits)
        return
    out, x = (np.moveaxis(a, (since, to), (-2, -1)) for a in (out, x))
    *outer, rows, columns = out.shape
    for at in itertools.product(*(range(n) for n in outer)):
        for i, j in itertools.product(range(0, rows, _SIDE), range(0, columns, _SIDE)):
            part = (*at, slice(i, i + _SIDE), slice(j, j + _SIDE))
            block = scratch[: min(_SIDE, columns - j), : min(_SIDE, rows - i)]
            _cast(block, x[part].T)
            _check(name, block, bits)
            _unsigned_view(out[part])[...] = _unsigned_view(block.T)


def _merge(out: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fuses neighbouring axes that are one axis in both arrays, and drops those of one element."""
    axes = [i for i, n in enumerate(out.shape) if n > 1]
    shape, strides = [1], [(out.itemsize, x.itemsize)]
    for i in axes:
        n, step = out.shape[i], (out.strides[i], x.strides[i])
        if shape[-1] == 1:
            shape[-1], strides[-1] = n, step
        elif all(a == b * n for a, b in zip(strides[-1], step, strict=True)):
            shape[-1], strides[-1] = shape[-1] * n, step
        else:
            shape.append(n)
            strides.append(step)
    as_strided = np.lib.stride_tricks.as_strided
    return (
        as_strided(out, shape, [s[0] for s in strides]),
        as_strided(x, shape, [s[1] for s in strides], writeable=False),
    )


def _fastest(x: np.ndarray) -> int:
    return min(range(x.ndim), key=lambda i: abs(x.strides[i]))


def _blocks(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Cuts a shape into boxes of at most ``limit`` elements, the leading axes first."""
    inner = math.prod(shape[1:])
    if len(shape) > 1 and inner > limit:
        for i in range(shape[0]):
            for rest in _blocks(shape[1:], limit):
                yield (slice(i, i + 1), *rest)
        return
    step = max(1, limit // inner)
    for i in range(0, shape[0], step):
        yield (slice(i, i + step),)


def _cast(out: np.ndarray, x: np.ndarray) -> None:
    if out.dtype == x.dtype:
        # numpy moves integers several times faster than the extension dtypes of ml_dtypes.
        _unsigned_view(out)[...] = _unsigned_view(x)
    elif (out.dtype, x.dtype) == (_FLOAT32, _BFLOAT16):
        # A bfloat16 is the upper half of a float32.
        np.left_shift(_unsigned_view(x), 16, out=_unsigned_view(out), dtype=np.uint32)
    else:
        out[...] = x


def _check(name: str, block: np.ndarray, bits: np.ndarray) -> None:
    limit = _NOT_FINITE.get(block.dtype)
    if limit is None:
        return
    magnitude = bits[: block.size].reshape(block.shape)
    sign = 1 << (8 * block.itemsize - 1)
    np.bitwise_and(_unsigned_view(block), sign - 1, out=magnitude)
    if magnitude.max() >= limit:
        raise NotFiniteError(
            f"{name}: at least {np.count_nonzero(magnitude >= limit):,} values are NaN or infinite "
            f"(as {block.dtype}); the file is damaged: download it again"
        )


def _unsigned(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")


def _unsigned_view(x: np.ndarray) -> np.ndarray:
    return x.view(_unsigned(x.dtype))
