"""The TPU kernel of paged attention on CPU: values, writes and races, under Pallas' interpreter.

The interpreter runs copies late and out of order, and its race detector sees two of them touch the
same bytes. It cannot reinterpret arrays, so the register tricks of `tpu_packing` are tested alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import paged_batches as batches
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from paged_batches import Shape, make

from pallas_kernels.device import Device
from pallas_kernels.paged_attention import (
    Facts,
    PagedOut,
    schedule,
    tpu,
    tpu_config,
    tpu_packing,
    tpu_walk,
    xla,
)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks of 128 positions and tall tiles of 16 tokens, so that small cases cross borders."""
    with pytest.MonkeyPatch.context() as patch:
        small = tpu_config.Config(block=128, longest=128, step=512, tall_rows=64)
        patch.setattr(tpu_config, "RULE", small)
        yield


@functools.cache
def jitted(sm_scale, cores):
    """The kernel as the interpreter runs it; batches of the same shapes share a program."""
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    how = {"sm_scale": sm_scale, "interpret": interpret, "cores": cores}
    return jax.jit(functools.partial(tpu.paged_attention, **how))


def run(q, k, v, pages, scales, row_starts, kv_lens, page_table, sm_scale=0.25, cores=1):
    """The kernel under the race detector."""
    arrays = (None if x is None else jnp.asarray(x) for x in (q, k, v, pages, scales))
    rows = {"row_starts": row_starts, "kv_lens": kv_lens, "page_table": page_table}
    out = jax.block_until_ready(jitted(sm_scale, cores)(*arrays, **rows))
    assert not interpret_pallas_call.races.races_found
    return PagedOut(*out)


def check(batch, **how):
    """As `paged_batches.check`; the cache is the XLA implementation's, bit for bit."""
    got = batches.check(batch, functools.partial(run, **how.pop("run", {})), **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_attend", lambda q, *_: q)
        wanted = xla.paged_attention(
            *(None if x is None else jnp.asarray(x) for x in batch.args()[:5]),
            row_starts=jnp.asarray(batch.row_starts),
            kv_lens=jnp.asarray(batch.kv_lens),
            page_table=jnp.asarray(batch.page_table),
            sm_scale=1.0,
        )
    for mine, theirs in zip((got.pages, got.scales), wanted[1:], strict=True):
        assert (mine is None) == (theirs is None)
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()
    return got


Wide = functools.partial(Shape, H=128, page=16)
# Every cache with another number of query heads per kv head, and one shard of 64/4 heads.
CACHES = {
    "float32, ratio 4": Wide(N=8, K=2),
    "bfloat16, ratio 12": Wide(N=24, K=2, page=32, dtype="bfloat16", cache="bfloat16"),
    "float8, ratio 2": Wide(N=4, K=2, dtype="bfloat16", cache="float8_e4m3fn"),
    "scaled float8, ratio 8": Wide(
        N=16, K=2, page=128, dtype="bfloat16", cache="float8_e4m3fn", scaled=True
    ),
    "int8, ratio 1": Wide(N=2, K=2, page=128, cache="int8"),
    "bfloat16, ratio 16": Wide(N=16, K=1, dtype="bfloat16", cache="bfloat16"),
    "float32, ratio 12": Wide(N=12, K=1),
}


def single_tokens(cache, lengths):
    """Rows of one token each, all of the same static shapes."""
    shape = CACHES[cache]
    return make([1] * len(lengths), lengths, shape, width=-(-300 // shape.page))


@pytest.mark.parametrize("cache", list(CACHES)[:-1])
def test_one_token_of_each_row(cache):
    # Contexts that end around pages of 16 and blocks of 128.
    check(single_tokens(cache, [1, 15, 16, 17, 127, 128, 129, 300]))


@pytest.mark.parametrize("cache", ["float32, ratio 12", "scaled float8, ratio 8"])
def test_prompts_chunks_and_single_tokens_in_one_call(cache):
    # One token beside chunks whose ends cross pages, tiles of 16 tokens and a block of 128.
    lens = [1, 0, 20, 1, 33], [130, 5, 141, 1, 33]
    check(make(*lens, CACHES[cache], width=-(-141 // CACHES[cache].page)))


def test_two_cores_share_the_rows():
    check(single_tokens("float32, ratio 4", [40, 129, 1, 17, 200, 16]), run={"cores": 2})


def test_peaked_scores_stay_exact():
    # Scores of hundreds: a score of size s carries s roundoffs into the exponent.
    batch = single_tokens("float32, ratio 4", [300, 200, 130])
    batch.q *= 160
    check(batch, slack=200.0)


def test_a_batch_without_tokens_touches_nothing():
    batch = single_tokens("float32, ratio 4", [3, 5])
    batch.row_starts[:] = 0
    assert not np.asarray(check(batch).out_TNH).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("heads", [2, 4, 16])
def test_heads_are_taken_out_of_their_words_exactly(dtype, heads):
    if not tpu_packing.strided(heads, jnp.dtype(dtype)):
        pytest.skip("refused: heads do not fill whole words")
    # Every bit pattern of 8 bits, so subnormal, negative zero and NaN too.
    rng = np.random.default_rng(heads)
    if jnp.dtype(dtype).itemsize == 1:
        x = rng.integers(0, 256, (32, heads, 128)).astype(np.uint8).view(jnp.dtype(dtype))
    else:
        x = oracles.round_to(rng.standard_normal((32, heads, 128)), dtype)
    by_halves, by_planes = dtype == "bfloat16", jnp.dtype(dtype).itemsize == 1

    def kernel(x, out, other, planes):
        for head in range(heads):
            out[head] = tpu_packing.read(x, head, plain=False)
            if by_halves:
                other[head] = tpu_packing.read_halves(x, head).astype(jnp.float32)
            if by_planes:
                planes[head] = tpu_packing.read_planes(x, head // 4)[head % 4]

    shape = jax.ShapeDtypeStruct((heads, 32, 128), jnp.float32)
    shapes = [shape, shape, jax.ShapeDtypeStruct(shape.shape, dtype)]
    got, halves, planes = pl.pallas_call(kernel, out_shape=shapes, interpret=True)(jnp.asarray(x))
    want = x.astype(np.float32).swapaxes(0, 1)
    np.testing.assert_array_equal(got, want)
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got)[numbers], np.signbit(want)[numbers])
    if by_halves:
        np.testing.assert_array_equal(halves, want[:, np.asarray(tpu_packing.halves(32))[0]])
    if by_planes:
        np.testing.assert_array_equal(
            np.asarray(planes).view(np.uint8), x.view(np.uint8).swapaxes(0, 1)
        )


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason=f"JAX {jax.__version__} interprets no store to a reshaped reference; 0.11 does",
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_are_put_back_into_their_words(dtype):
    x = oracles.round_to(np.random.default_rng(0).standard_normal((4, 16, 128)), dtype)
    pack = tpu_packing.pack_of(jnp.dtype(dtype))

    def kernel(x, out):
        for group in range(4 // pack):
            heads = [x[group * pack + i].astype(jnp.float32) for i in range(pack)]
            tpu_packing.write(out, group, heads, plain=False)

    shape = jax.ShapeDtypeStruct((16, 4, 128), x.dtype)
    out = pl.pallas_call(kernel, out_shape=shape, interpret=True)(jnp.asarray(x))
    np.testing.assert_array_equal(out, x.swapaxes(0, 1))


def test_a_million_positions_need_no_more_than_31_bits():
    # Tall tiles of a chunk that ends at 2**20, and single rows of that length, 256 rows in all.
    B, T, length = 256, 8192, 2**20
    lengths = np.ones(B, np.int64)
    lengths[-1] = T - B + 1
    rows = schedule.Rows(
        jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32),
        jnp.full(B, length, jnp.int32),
    )
    facts = Facts(32, 4, 128, 16, "bfloat16", "bfloat16", False)
    short, tall = tpu._shapes(facts, tpu_config.RULE, T, (B, length // 16), 1.0, True)
    touched = rows.touched(T, 16)
    for shape, (count, tiles) in (
        (short, rows.one_token(T)),
        (tall, rows.longer(T, tall.height)),
    ):
        packed = tpu_walk.pack_tiles(count, tiles, length - rows.lengths, touched.base, 2, shape)
        fields, bounds = np.split(np.asarray(packed, np.int64), [6 * len(tiles.row)])
        row, token, tokens, position, cached, _ = fields.reshape(6, -1)[:, : int(count)]
        np.testing.assert_array_equal(cached, (length - lengths)[row])
        in_row = token - (np.cumsum(lengths) - lengths)[row]
        np.testing.assert_array_equal(position - cached, in_row)
        # The largest numbers that the kernel makes of them.
        assert (position + tokens).max() == length
        assert (row * shape.lines + shape.lines).max() * shape.line < 2**31
        blocks = -(-(position + tokens) // shape.block)
        assert blocks.sum() < 2**31
        halves = blocks[: bounds[1]].sum(), blocks[bounds[1] :].sum()
        assert abs(halves[0] - halves[1]) <= 2 * blocks.max(), "cores get like numbers of blocks"
        assert bounds[2] == count
        assert bounds[5] == tokens.sum()


def test_pages_that_get_tokens_are_each_counted_once():
    batch = make([1, 0, 13, 1, 23, 1, 2], [30, 5, 21, 1, 23, 8, 2])
    rows = schedule.Rows(jnp.asarray(batch.row_starts), jnp.asarray(batch.kv_lens))
    touched = rows.touched(batches.TOKENS, 4)
    found = set()
    for i in range(len(touched.row)):
        b, index = int(touched.row[i]), int(touched.index[i])
        for slot in range(int(touched.low[i]), int(touched.high[i])):
            token = int(touched.token[i]) + slot
            found.add((int(batch.page_table[b, index]), slot, token))
            assert int(touched.base[b]) + index == i
    assert found == {(*slot, t) for t, slot in enumerate(batches.new_slots(batch))}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"kv_heads": 1, "query_heads": 12}, None),
        ({"kv_dtype": "float8_e4m3fn", "page_size": 128, "scaled": True}, None),
        ({"head_dim": 64}, "use head_dim 128"),
        ({"kv_dtype": "int8", "kv_heads": 1}, "do not fill whole 32-bit words"),
        ({"kv_heads": 3}, "do not fill whole 32-bit words"),
        ({"kv_dtype": "int8", "scaled": True}, "use a multiple of 128"),
        ({"page_size": 8}, "a power of two from 16"),
        ({"dtype": "float16"}, "use bfloat16 or float32"),
        ({"kv_dtype": "float16"}, "pages are float16"),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(changes, reason):
    plain = Facts(32, 4, 128, 64, "bfloat16", "bfloat16", False)
    got = tpu.supports(Device("tpu", "TPU v6 lite"), dataclasses.replace(plain, **changes))
    assert (got is None) if reason is None else (reason in got)
