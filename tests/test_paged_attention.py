"""Paged attention against a token-by-token float64 oracle; what must not be read is NaN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import paged_batches as batches
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batches import DECODE, MIXED, NARROW, ROWS, TOKENS, WIDTH, Shape, make, new_slots

from pallas_kernels.paged_attention import cases, paged_attention, schedule, xla

PAGE = Shape().page
CACHES = ["float32", "bfloat16", "float8_e4m3fn", "int8"]
REAL_BLOCK = xla.BLOCK


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Two pages per block (one for one token), tall tiles of 5 tokens, 3 lanes: small cases then
    cross every border."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "BLOCK", 2 * PAGE)
        patch.setattr(xla, "TALL_ROWS", 20)
        patch.setattr(xla, "LANES", {"cpu": 3, "default": 3})
        yield


def call(q, k, v, pages, scales, row_starts, kv_lens, page_table, sm_scale=0.25):
    """The operation with positional arguments."""
    return paged_attention(
        q,
        k,
        v,
        pages,
        row_starts=row_starts,
        kv_lens=kv_lens,
        page_table=page_table,
        sm_scale=sm_scale,
        scales=scales,
    )


run = jax.jit(call, static_argnames="sm_scale")


def check(batch, *, run=run, **how):
    """`paged_batches.check` with the XLA implementation."""
    return batches.check(batch, run, **how)


FORMS = pytest.mark.parametrize("lens", [DECODE, MIXED], ids=["decode", "mixed"])


@FORMS
@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_dtype_and_page_border(cache, lens):
    check(make(*lens, Shape(cache=cache)))


@FORMS
def test_float8_pages_with_scales(lens):
    check(make(*lens, Shape(cache="float8_e4m3fn", scaled=True)))


@FORMS
@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_bfloat16_activations(cache, lens):
    check(make(*lens, Shape(dtype="bfloat16", cache=cache)))


@pytest.mark.parametrize("q_len", [2, 5, 6])
def test_chunks_around_tiles_and_page_borders(q_len):
    # 5 tokens of 4 heads fill a tall tile here; contexts end around pages and blocks.
    check(make([q_len] * 8, [q_len, q_len + 1, 15, 16, 17, 31, 32, 33]))


@pytest.mark.parametrize(
    ("N", "K"), [(g, 1) for g in (1, 3, 5, 7, 11, 16)] + [(8, 8), (16, 2), (24, 2)]
)
def test_every_head_ratio(N, K):
    check(make([1, 9, 0, 1], [9, 12, 0, 6], Shape(N=N, K=K, H=8), seed=N))


@pytest.mark.parametrize("q_lens", [[1, 1, 1, 1], [1, 7, 40, 2]], ids=["decode", "mixed"])
def test_contexts_longer_than_the_real_block(q_lens, monkeypatch):
    monkeypatch.setattr(xla, "BLOCK", REAL_BLOCK)
    kv_lens = [REAL_BLOCK - 1, REAL_BLOCK, REAL_BLOCK + 1, 2 * REAL_BLOCK + 3]
    batch = make(q_lens, kv_lens, width=-(-max(kv_lens) // PAGE))
    fresh = jax.jit(lambda *args, sm_scale: call(*args, sm_scale), static_argnames="sm_scale")
    check(batch, run=fresh)


@FORMS
def test_peaked_softmax_stays_exact(lens):
    # Scores of hundreds: without the running maximum exp overflows, and one position takes it all.
    # A score of size s carries an absolute error of about s roundoffs into the exponent.
    check(make(*lens), sm_scale=40.0, slack=200.0)


@pytest.mark.parametrize("direction", [1, -1])
def test_softmax_survives_scores_that_only_grow_or_only_shrink(direction):
    batch = make([1, 12], [30, 12])
    slots = {slot: 29 if t == 0 else t - 1 for t, slot in enumerate(new_slots(batch))}
    slots |= {(batch.page_table[0, p // PAGE], p % PAGE): p for p in range(29)}
    for t, slot in enumerate(new_slots(batch)):
        batch.k[t] = direction * slots[slot]
    for slot, position in slots.items():
        batch.pages[slot][0::2] = direction * position
    batch.q[:] = 1.0
    check(batch, sm_scale=10.0, slack=1000.0)


def test_a_row_that_has_no_tokens_writes_and_reads_nothing():
    assert not np.asarray(check(make([0, 0], [3, 5])).out_TNH).any()
    got = check(make([0, 2, 0], [3, 5, 0], T=TOKENS))
    assert np.asarray(got.out_TNH)[:2].any()


def test_page_numbers_behind_the_context_are_not_followed():
    for lens in (DECODE, MIXED):
        batch = make(*lens)
        want = check(batch)
        for b, length in enumerate(batch.kv_lens):
            used = -(-int(length) // PAGE)
            batch.page_table[b, used:] = 1_000_000 if b % 2 else -1_000_000
        got = run(*batch.args())
        np.testing.assert_array_equal(got.out_TNH, want.out_TNH)
        np.testing.assert_array_equal(got.pages, want.pages)


@pytest.mark.parametrize("cache", NARROW)
def test_zeros_are_cached_as_zeros(cache):
    batch = make(*MIXED, Shape(cache=cache, scaled=True))
    batch.k[:], batch.v[:] = 0, 0
    got = run(*batch.args())
    assert np.isfinite(np.asarray(got.out_TNH)).all()
    for slot in new_slots(batch):
        assert not np.asarray(got.pages)[slot].any()


@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_chunked_prefill_equals_one_prefill(cache):
    whole = make([23], [23], Shape(cache=cache))
    want = run(*whole.args())
    pages, scales, outs = whole.pages, whole.scales, []
    for start, end in ((0, 7), (7, 9), (9, 20), (20, 23)):
        part = dataclasses.replace(
            whole,
            **{x: np.roll(getattr(whole, x), -start, axis=0) for x in "qkv"},
            pages=pages,
            scales=scales,
            row_starts=np.minimum(whole.row_starts, end - start),
            kv_lens=np.minimum(whole.kv_lens, end),
        )
        got = run(*part.args())
        pages, scales = got.pages, got.scales
        outs.append(got.out_TNH[: end - start])
    assert np.asarray(pages).tobytes() == np.asarray(want.pages).tobytes()
    want = want.out_TNH[:23]
    assert oracles.row_error(np.concatenate(outs), want) < oracles.tolerance("float32", 23)


def test_a_batch_equals_its_rows_one_by_one():
    batch = make([1, 6, 3, 1], [12, 6, 9, 1], T=TOKENS)
    want = np.asarray(run(*batch.args()).out_TNH)
    for b in range(4):
        start, end = batch.row_starts[b : b + 2]
        alone = dataclasses.replace(
            batch,
            **{x: np.roll(getattr(batch, x), -start, axis=0) for x in "qkv"},
            row_starts=np.asarray([0] + [end - start] * ROWS, np.int32),
            kv_lens=np.roll(batch.kv_lens, -b),
            page_table=np.roll(batch.page_table, -b, axis=0),
        )
        got = run(*alone.args()).out_TNH[: end - start]
        assert oracles.row_error(got, want[start:end]) < oracles.tolerance("float32", 12)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_ragged_batch(data):
    decode = data.draw(st.booleans())
    q_lens, left = [], ROWS if decode else TOKENS
    for _ in range(data.draw(st.integers(1, ROWS))):
        q_lens.append(data.draw(st.integers(0, min(left, 1 if decode else 20))))
        left -= q_lens[-1]
    kv_lens = [q + data.draw(st.integers(0, WIDTH * PAGE - q)) for q in q_lens]
    check(make(q_lens, kv_lens, seed=data.draw(st.integers(0, 99))))


@FORMS
def test_no_page_is_read_behind_the_block_a_tile_ends_in(lens, monkeypatch):
    reads = []
    read = xla.Cache.read

    def counted(self, page, head, dtype):
        jax.debug.callback(lambda page: reads.append(page.size * PAGE), page)
        return read(self, page, head, dtype)

    monkeypatch.setattr(xla.Cache, "read", counted)
    monkeypatch.setattr(xla, "LANES", {"cpu": 1, "default": 1})
    jax.block_until_ready(jax.jit(lambda *args: call(*args))(*make(*lens).args()))
    jax.effects_barrier()
    want, tall = 0, 5
    for q_len, kv_len in zip(*lens, strict=True):
        block = PAGE if q_len == 1 else 2 * PAGE
        for start in range(0, q_len, tall):
            seen = kv_len - q_len + min(start + tall, q_len)
            want += -(-seen // block) * block
    assert sum(reads) == 2 * want, "keys and values of the blocks that are seen"


def compiled(case: cases.Case, cache="float32", page_size=16, inside=None):
    """A real case compiled for this machine from shapes alone, its cache donated."""
    B, T = len(case.kv_lens), sum(case.new_tokens)
    width = -(-max(case.kv_lens) // page_size)
    heads = 2 * case.kv_heads
    pages = (B * width, page_size, heads, case.head_dim)
    spec = jax.ShapeDtypeStruct
    q = spec((T, case.query_heads, case.head_dim), jnp.float32)
    kv = spec((T, case.kv_heads, case.head_dim), jnp.float32)
    scales = spec((pages[0], heads, page_size), jnp.float32) if cache == "int8" else None
    ints = [spec(s, jnp.int32) for s in ((B + 1,), (B,), (B, width))]
    fn = functools.partial(call, sm_scale=0.125)
    fn = inside(fn) if inside else fn
    args = (q, kv, kv, spec(pages, jnp.dtype(cache)), scales, *ints)
    exe = jax.jit(fn, donate_argnums=(3, 4)).lower(*args).compile()
    return exe, int(np.prod(pages)) * jnp.dtype(cache).itemsize


def in_a_while_loop(fn):
    """Twenty steps that carry the cache, as a generate loop does."""

    def loop(q, k, v, pages, scales, *ints):
        def step(_, carry):
            q, pages, scales = carry
            out = fn(q, k, v, pages, scales, *ints)
            return out.out_TNH, out.pages, out.scales

        return jax.lax.fori_loop(0, 20, step, (q, pages, scales))

    return loop


@pytest.mark.parametrize(
    ("name", "cache", "inside"),
    [
        ("decode-64-ragged", "float32", in_a_while_loop),
        ("decode-64-ragged", "int8", None),
        ("mixed", "float32", None),
        ("mixed", "int8", in_a_while_loop),
    ],
)
def test_a_donated_cache_is_updated_in_place(name, cache, inside):
    case = next(c for c in cases.cases("30B-A3B", 4) if c.name.endswith(name))
    exe, cache_bytes = compiled(case, cache, inside=inside)
    memory = exe.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    tokens = 4 * sum(case.new_tokens) * case.query_heads * case.head_dim
    assert memory.temp_size_in_bytes < cache_bytes / 4 + 12 * tokens


def test_memory_does_not_grow_with_the_page_table():
    case = next(c for c in cases.cases("cpu-bench") if c.name.endswith("chunk-512-of-8192"))
    short = dataclasses.replace(case, kv_lens=(1024,))
    temps = [compiled(c)[0].memory_analysis().temp_size_in_bytes for c in (short, case)]
    assert temps[1] < temps[0] * 1.05 + 4096
    scores = 4 * 512 * case.query_heads * 1024
    assert temps[1] < scores / 2, "scores of all positions are never held"


def test_tiles_cover_each_chosen_token_once():
    start = jnp.asarray([0, 1, 1, 14, 15, 38], jnp.int32)
    rows = schedule.Rows(start, jnp.asarray([30, 5, 21, 1, 23]))
    count, tiles = rows.tiles(rows.lengths > 1, 5, 20)
    got = [tuple(int(a[i]) for a in jax.tree.leaves(tiles)) for i in range(int(count))]
    chunk = [(2, 1 + 5 * i, min(5, 13 - 5 * i), 8 + 5 * i) for i in range(3)]
    prompt = [(4, 15 + 5 * i, min(5, 23 - 5 * i), 5 * i) for i in range(5)]
    assert got == chunk + prompt
    assert not np.asarray(tiles.tokens)[int(count) :].any()


def test_what_does_not_fit_together_raises():
    def fails(match, **changes):
        batch = make([1, 1], [3, 4])
        batch = dataclasses.replace(
            batch,
            **{x: getattr(batch, x)[:2] for x in ("q", "k", "v", "kv_lens", "page_table")},
            row_starts=batch.row_starts[:3],
        )
        batch = dataclasses.replace(batch, **changes)
        with pytest.raises(ValueError, match=match):
            call(*batch.args())

    fails(r"a whole number of query heads", q=np.zeros((2, 3, 16), np.float32))
    fails(r"use \[T, N, H\]", v=np.zeros((2, 2, 8), np.float32))
    fails(r"needs \[num_pages, page_size, 4, 16\]", pages=np.zeros((5, 4, 2, 16), np.float32))
    fails(r"use \[B \+ 1\] and \[B\]", row_starts=np.zeros(2, np.int32))
    fails(r"page_table \(1, 4\); needs \[2, W\]", page_table=np.zeros((1, 4), np.int32))
    fails("int8 pages need scales", pages=np.zeros((5, 4, 4, 16), np.int8))
    fails("float32 pages take no scales", scales=np.zeros((5, 4, 4), np.float32))
    fails("pages are float64", pages=np.zeros((5, 4, 4, 16), np.float64))
    fails(
        r"needs \(5, 4, 4\)",
        pages=np.zeros((5, 4, 4, 16), np.int8),
        scales=np.zeros((5, 4, 2), np.float32),
    )
