"""Attention inside segments against a float64 oracle, with NaN wherever nothing may be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.segment_attention import segment_attention

# Lengths of the segments, and U: around a tile of 256 queries and a block of 512 keys.
CASES = {
    "one element": ([1], 1),
    "one segment, no padding": ([40], 40),
    "padding": ([40], 64),
    "empty segments": ([0, 7, 0, 0, 5], 20),
    "nothing but padding": ([0], 16),
    "a tile": ([256], 256),
    "a tile and one": ([257], 300),
    "many in a tile": ([3, 60, 1, 100, 30, 40], 250),
    "border inside a tile and a block": ([200, 400, 90, 500], 1300),
    "keys moved back to end at U": ([500, 513], 1013),
}
N, H = 2, 8


def oracle(q, k, v, lengths: list[int], scale: float) -> np.ndarray:
    """float64 [U, N, H]: each segment by itself, zero behind the last."""
    out = np.zeros(q.shape)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        for head in range(q.shape[1]):
            scores = scale * q[own, head].astype(np.float64) @ k[own, head].astype(np.float64).T
            weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e300))
            weights /= weights.sum(-1, keepdims=True)
            out[own, head] = weights @ v[own, head].astype(np.float64)
        start += length
    return out


def arrays(lengths: list[int], size: int, sharpness: float = 1.0):
    """q, k, v, NaN behind the last segment, and the segments' starts."""
    rng = np.random.default_rng(size)
    q, k, v = (rng.standard_normal((size, N, H)).astype(np.float32) for _ in range(3))
    for x in (q, k, v):
        x[sum(lengths) :] = np.nan
    return q * sharpness, k, v, np.cumsum([0, *lengths]).astype(np.int32)


@pytest.mark.parametrize("sharpness", [1.0, 12.0])
@pytest.mark.parametrize("case", CASES)
def test_every_segment_equals_the_oracle_and_padding_is_zero(case, sharpness):
    lengths, size = CASES[case]
    q, k, v, starts = arrays(lengths, size, sharpness)
    out = segment_attention(q, k, v, segment_starts=jnp.asarray(starts), sm_scale=H**-0.5)
    used = sum(lengths)
    np.testing.assert_allclose(out, oracle(q, k, v, lengths, H**-0.5), atol=2e-5)
    assert not np.asarray(out[used:]).any()


def test_what_neighbours_hold_changes_no_bit_of_a_segment():
    lengths, size = [100, 200, 50], 400
    q, k, v, starts = arrays(lengths, size)
    whole = segment_attention(q, k, v, segment_starts=jnp.asarray(starts), sm_scale=0.5)
    for x in (q, k, v):
        x[:100] = 1e6
        x[300:350] = -1e6
    alone = segment_attention(q, k, v, segment_starts=jnp.asarray(starts), sm_scale=0.5)
    np.testing.assert_array_equal(alone[100:300], whole[100:300])


def test_one_program_serves_any_segments():
    run = jax.jit(lambda q, k, v, s: segment_attention(q, k, v, segment_starts=s, sm_scale=0.5))
    for lengths in ([64, 0, 0], [10, 20, 30], [0, 0, 64]):
        q, k, v, starts = arrays(lengths, 64)
        np.testing.assert_allclose(run(q, k, v, starts), oracle(q, k, v, lengths, 0.5), atol=2e-5)
    assert run._cache_size() == 1


def test_bfloat16_comes_out_as_bfloat16_near_the_oracle():
    lengths, size = [70, 30], 128
    q, k, v, starts = arrays(lengths, size)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = segment_attention(*half, segment_starts=jnp.asarray(starts), sm_scale=0.5)
    assert out.dtype == jnp.bfloat16
    rounded = [np.asarray(x, np.float32) for x in half]
    wanted = oracle(*rounded, lengths, 0.5)
    # Weights and result are rounded to 8 bits of mantissa each.
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted, atol=3 * 2**-8)


@pytest.mark.parametrize(
    ("shapes", "starts", "message"),
    [
        ([(4, 2, 8), (4, 2, 8), (5, 2, 8)], [0, 4], "all three are"),
        ([(4, 16)] * 3, [0, 4], "all three are"),
        ([(4, 2, 8)] * 3, [0], "segments \\+ 1"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, starts, message):
    q, k, v = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        segment_attention(q, k, v, segment_starts=jnp.asarray(starts), sm_scale=1.0)
