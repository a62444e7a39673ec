"""Ragged batches over paged caches for the tests of `paged_attention`, and what must come of them.

Knows no implementation. Everything that must not be read is NaN (99 in int8 pages).
"""

import dataclasses

import numpy as np
import oracles

# Static shapes that most batches are padded to, so that few programs are compiled.
ROWS, WIDTH, TOKENS = 10, 10, 56
PAGES = ROWS * WIDTH + 3
NARROW = {"float8_e4m3fn": 448.0, "int8": 127.0}
DECODE = ([1] * 10, [1, 3, 4, 5, 7, 8, 9, 15, 16, 37])
# Rows: decode, nothing, a chunk with context, first token, a whole prompt, decode, prompt of 2.
MIXED = ([1, 0, 13, 1, 23, 1, 2], [30, 5, 21, 1, 23, 8, 2])


@dataclasses.dataclass
class Batch:
    """A ragged batch whose old context is random, and everything else NaN (or 99 in int8 pages)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pages: np.ndarray
    scales: np.ndarray | None
    row_starts: np.ndarray
    kv_lens: np.ndarray
    page_table: np.ndarray

    def args(self):
        """Positional arguments of `run`."""
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads, and what the batch and its cache are stored in."""

    N: int = 4
    K: int = 2
    H: int = 16
    dtype: str = "float32"
    cache: str = "float32"
    scaled: bool = False
    page: int = 4


def make(q_lens, kv_lens, shape=Shape(), *, seed=0, T=None, width=WIDTH) -> Batch:
    """A batch with these new tokens and contexts; pages are handed out in shuffled order.

    It is padded to ROWS rows of no tokens and, unless T is given, to ROWS tokens (decode) or
    TOKENS.
    """
    rng = np.random.default_rng(seed)
    rows = max(ROWS, len(q_lens))
    q_lens, kv_lens = (list(x) + [0] * (rows - len(x)) for x in (q_lens, kv_lens))
    starts = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    T = T or (ROWS if max(q_lens) <= 1 else TOKENS)
    new = [rng.standard_normal((T, heads, shape.H)) for heads in (shape.N, shape.K, shape.K)]
    for x in new:
        x[starts[-1] :] = np.nan
    q, k, v = (oracles.round_to(x, shape.dtype) for x in new)
    num_pages = PAGES if width == WIDTH else rows * width + 3
    order = rng.permutation(num_pages)
    table = np.full((rows, width), order[-1], np.int32)
    pages, scales = empty_cache(num_pages, shape)
    for b, length in enumerate(kv_lens):
        count = -(-length // shape.page)
        table[b, :count], order = order[:count], order[count:]
        for position in range(length - q_lens[b]):
            slot = table[b, position // shape.page], position % shape.page
            kv = rng.standard_normal((2 * shape.K, shape.H))
            if scales is not None:
                scale = rng.uniform(0.5, 2, 2 * shape.K) / NARROW[shape.cache]
                scales[slot[0], :, slot[1]] = scale = scale.astype(np.float32)
                kv = kv / scale[:, None]
                kv = np.round(kv.clip(-127, 127)) if shape.cache == "int8" else kv.clip(-448, 448)
            pages[slot] = oracles.round_to(kv, shape.cache)
    return Batch(q, k, v, pages, scales, starts, np.asarray(kv_lens, np.int32), table)


def empty_cache(num_pages, shape):
    """Pages and scales of nothing but poison."""
    dims = (num_pages, shape.page, 2 * shape.K, shape.H)
    nothing = np.full(dims, 99 if shape.cache == "int8" else np.nan)
    scaled = shape.scaled or shape.cache == "int8"
    scales = np.full((num_pages, 2 * shape.K, shape.page), np.nan, np.float32) if scaled else None
    return oracles.round_to(nothing, shape.cache), scales


def check(batch: Batch, run, *, sm_scale=0.25, slack=1.0):
    """Attention equals the oracle's over the pages that came back; those hold what they should."""
    got = run(*batch.args(), sm_scale=sm_scale)
    check_writes(batch, got)
    want = oracles.paged_attention(
        batch.q,
        got.pages,
        got.scales,
        row_starts=batch.row_starts,
        kv_lens=batch.kv_lens,
        page_table=batch.page_table,
        sm_scale=sm_scale,
    )
    bound = oracles.tolerance(batch.q.dtype, int(batch.kv_lens.max())) * slack
    assert got.out_TNH.dtype == batch.q.dtype
    assert oracles.row_error(got.out_TNH, want) < bound
    assert not np.asarray(got.out_TNH)[batch.row_starts[-1] :].any()
    return got


def new_slots(batch: Batch):
    """The page and slot of each new token, in order."""
    page = batch.pages.shape[1]
    for b, length in enumerate(batch.kv_lens):
        count = batch.row_starts[b + 1] - batch.row_starts[b]
        for position in range(length - count, length):
            yield int(batch.page_table[b, position // page]), position % page


def check_writes(batch: Batch, got):
    """New tokens stand in their slots to the cache's precision; every other slot kept its bits."""
    pages = np.asarray(got.pages)
    assert pages.dtype == batch.pages.dtype
    untouched = np.ones(pages.shape[:2], bool)
    for t, slot in enumerate(new_slots(batch)):
        untouched[slot] = False
        kv = np.empty(pages.shape[2:])
        kv[0::2], kv[1::2] = batch.k[t], batch.v[t]
        if got.scales is None:
            np.testing.assert_array_equal(pages[slot], oracles.round_to(kv, pages.dtype))
            continue
        largest = NARROW[pages.dtype.name]
        amax = np.abs(kv).max(-1)
        scale = np.asarray(got.scales)[slot[0], :, slot[1]]
        np.testing.assert_allclose(scale, amax / largest, rtol=1e-6)
        error = np.abs(oracles.exact(pages[slot]) * scale[:, None] - kv)
        step = (
            amax[:, None] / 127
            if pages.dtype == np.int8
            else np.maximum(np.abs(kv) * 2.0**-3, amax[:, None] / largest * 2.0**-9)
        )
        assert (error <= step / 2 * (1 + 1e-5)).all()
    for before, after in ((batch.pages, got.pages), (batch.scales, got.scales)):
        if before is not None:
            before, after = (np.asarray(a) for a in (before, after))
            if before.ndim == 3:  # scales: positions last
                before, after = before.swapaxes(1, 2), after.swapaxes(1, 2)
            before, after = before[untouched].tobytes(), after[untouched].tobytes()
            assert before == after, "a slot without a new token changed"
