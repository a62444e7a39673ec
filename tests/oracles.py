"""Independent oracles: float64 numpy written from the definitions, one row and one head at a time.

Knows no code of ours: no helper, default or constant is shared with what it judges. Arrays of
narrow types are read exactly (every float8, bfloat16 and int8 number is a float64 number).
"""

import math

import ml_dtypes
import numpy as np

# Unit roundoff of each storage type: half the distance from 1 to the next number.
_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float8_e4m3fn": 2.0**-4,
}


def tolerance(dtype, terms: int = 1) -> float:
    """How far a row may be off, relative to its norm, when computed in ``dtype``.

    A few roundings to ``dtype``, and a sum of ``terms`` products accumulated in float32 (or in
    float64, for float64), whose errors grow like the root of their number.
    """
    name = np.dtype(dtype).name
    accumulator = min(_ROUNDOFF["float32"], _ROUNDOFF[name])
    return 4 * _ROUNDOFF[name] + 4 * accumulator * math.sqrt(terms)


def row_error(got, want) -> float:
    """The largest ||got - want|| / ||want|| over the rows (all axes but the first); inf for NaN.

    A row that should be exactly zero counts as infinitely wrong unless it is.
    """
    got = exact(got).reshape(len(got), -1)
    want = exact(want).reshape(len(want), -1)
    if got.shape != want.shape:
        raise ValueError(f"shapes differ: {got.shape} and {want.shape}")
    if not len(got):
        return 0.0
    error = np.linalg.norm(got - want, axis=1)
    norm = np.linalg.norm(want, axis=1)
    relative = np.where(norm > 0, error / np.where(norm > 0, norm, 1.0), np.where(error, np.inf, 0))
    return float(np.max(np.where(np.isnan(relative), np.inf, relative)))


def exact(x) -> np.ndarray:
    """Any array as float64."""
    return np.asarray(x).astype(np.float64)


def round_to(x, dtype) -> np.ndarray:
    """Float64 numbers rounded to ``dtype``, which may be "bfloat16" or "float8_e4m3fn"."""
    return np.asarray(x).astype(np.dtype(getattr(ml_dtypes, str(dtype), dtype)))


def silu(x: np.ndarray) -> np.ndarray:
    """x / (1 + exp(-x)), without overflow."""
    return x * np.where(x >= 0, 1, np.exp(-np.abs(x))) / (1 + np.exp(-np.abs(x)))


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dequantize(values, scale, blocks) -> np.ndarray:
    """Element by element: values[i] * scale[i // blocks]."""
    values, scale = exact(values), exact(scale)
    index = np.indices(values.shape)
    blocks = np.reshape(blocks, (-1,) + (1,) * values.ndim)
    return values * scale[tuple(index // blocks)]


def ragged_dot(x, w, group_sizes, *, first_expert=0, activation=None) -> np.ndarray:
    """Row by row: x[i] times the matrix of the expert whose group row i is in; 0 if not held.

    Args:
        x: [M, D].
        w: [E, D, F] or, with ``activation="swiglu"``, [E, 2, D, F].
        group_sizes: [R].
        first_expert: the expert that w[0] is.
    """
    x, w = exact(x), exact(w)
    out = np.zeros((x.shape[0], w.shape[-1]))
    owners = [e for e, size in enumerate(np.asarray(group_sizes)) for _ in range(size)]
    for i, owner in enumerate(owners):
        e = owner - first_expert
        if not 0 <= e < w.shape[0]:
            continue
        if activation == "swiglu":
            out[i] = silu(x[i] @ w[e, 0]) * (x[i] @ w[e, 1])
        else:
            out[i] = x[i] @ w[e]
    return out


def causal_attention(q, k, v, *, first: int, sm_scale: float) -> np.ndarray:
    """One row: query i stands at position ``first + i`` and sees the keys 0 .. first + i.

    Args:
        q: [t, N, H].
        k: [s, K, H]; query head n reads key head n // (N // K).
        v: [s, K, H].
    """
    q, k, v = exact(q), exact(k), exact(v)
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        for n in range(q.shape[1]):
            seen = slice(0, first + i + 1)
            scores = k[seen, n // group] @ q[i, n] * sm_scale
            out[i, n] = softmax(scores) @ v[seen, n // group]
    return out


def paged_context(pages, scales, page_table_row, length: int):
    """Reads keys and values [length, K, H] of one row out of its pages, position by position."""
    page_size = pages.shape[1]
    kv = []
    for position in range(length):
        page, slot = page_table_row[position // page_size], position % page_size
        entry = exact(pages[page, slot])
        if scales is not None:
            entry = entry * exact(scales[page, :, slot])[:, None]
        kv.append(entry)
    kv = np.stack(kv)
    return kv[:, 0::2], kv[:, 1::2]


def paged_attention(q, pages, scales, *, row_starts, kv_lens, page_table, sm_scale) -> np.ndarray:
    """Causal attention of each row over pages that hold its new keys and values already.

    Returns:
        Shaped like q [T, N, H]; 0 for tokens behind ``row_starts[-1]``.
    """
    pages, scales = np.asarray(pages), None if scales is None else np.asarray(scales)
    out = np.zeros(np.shape(q))
    for b, length in enumerate(np.asarray(kv_lens)):
        start, end = row_starts[b], row_starts[b + 1]
        if end > start:
            k, v = paged_context(pages, scales, page_table[b], int(length))
            first = int(length) - int(end - start)
            row = np.asarray(q)[start:end]
            out[start:end] = causal_attention(row, k, v, first=first, sm_scale=sm_scale)
    return out
