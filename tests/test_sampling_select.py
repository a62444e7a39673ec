"""Selection without sorting equals what a sort says, ties, infinities and odd lengths included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import sampling_select as select

ARGMAX = jax.jit(select.argmax)
THRESHOLD = jax.jit(select.threshold)
KTH = jax.jit(lambda x, k: select.threshold(x, jnp.ones_like(x), k))
LENGTHS = [1, 31, 33, 64, 5000]


def rows(length: int, *, ties: bool = False, seed: int = 0) -> np.ndarray:
    """Zero-mean rows; with ties, values on a coarse grid as bfloat16 logits have them."""
    x = np.random.default_rng(seed).normal(size=(4, length)) * 3
    return (np.round(x * 2) / 2 if ties else x).astype(np.float32)


def stable_order(x: np.ndarray) -> np.ndarray:
    """Indices from the largest to the smallest value, ties by index."""
    return np.argsort(-x, axis=-1, kind="stable")


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_argmax_is_the_first_of_the_largest(length, ties):
    x = rows(length, ties=ties)
    value, index = ARGMAX(x)
    np.testing.assert_array_equal(index, x.argmax(-1))
    np.testing.assert_array_equal(value, x.max(-1))


@pytest.mark.parametrize("length", [100, 6000])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_the_maximum_shows_nan_and_infinity_anywhere_in_the_row(length, poison):
    for place in (0, 31, 32, 63, length - 1):
        x = rows(length)
        x[2, place] = poison
        value, index = ARGMAX(x)
        np.testing.assert_array_equal(value, [*x[:2].max(-1), np.inf, x[3].max()])
        assert index[2] == place


def test_argmax_of_a_row_of_minus_infinity_is_its_first_place():
    value, index = select.argmax(jnp.full((1, 77), -jnp.inf))
    assert (float(value[0]), int(index[0])) == (-np.inf, 0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("length", "k"), [(1, 1), (33, 2), (100, 3), (1000, 20), (5000, 150)])
def test_top_k_is_the_front_of_a_stable_sort(length, k, ties):
    x = rows(length, ties=ties)
    values, indices = jax.jit(select.top_k, static_argnums=1)(x, k)
    wanted = stable_order(x)[:, :k]
    np.testing.assert_array_equal(indices, wanted)
    np.testing.assert_array_equal(values, np.take_along_axis(x, wanted, -1))


def test_top_k_of_the_whole_row_and_of_nothing():
    x = rows(77, ties=True)
    np.testing.assert_array_equal(select.top_k(jnp.asarray(x), 77)[1], stable_order(x))
    assert select.top_k(jnp.asarray(x), 0)[1].shape == (4, 0)


def test_zeros_of_either_sign_tie_across_blocks():
    x = np.full((1, 3 * select.BLOCK), -1, np.float32)
    x[0, [5, 40, 70]] = -0.0, 0.0, -0.0
    assert np.asarray(select.top_k(jnp.asarray(x), 1)[1]).tolist() == [[5]]
    assert np.asarray(select.top_k(jnp.asarray(x), 2)[1]).tolist() == [[5, 40]]
    assert int(select.argmax(jnp.asarray(x))[1][0]) == 5


def test_top_k_never_returns_a_place_beyond_the_row():
    x = np.full((1, 70), -np.inf, np.float32)
    x[0, 69] = 1
    np.testing.assert_array_equal(select.top_k(jnp.asarray(x), 3)[1], [[69, 0, 1]])


def test_nothing_outside_the_top_blocks_exceeds_their_floor():
    x = rows(3000)
    near = select.top_blocks(jnp.asarray(x), 7)
    assert near.values.shape == (4, 7 * select.BLOCK)
    indices = np.asarray(near.indices)
    np.testing.assert_array_equal(near.values, np.take_along_axis(x, indices, -1))
    for row, inside, floor in zip(x, indices, near.floor, strict=True):
        assert np.all(np.diff(inside) > 0)
        outside = np.delete(row, inside)
        assert outside.max() <= floor
        assert np.sum(row[inside] >= floor) >= 7


def test_blocks_that_hold_the_whole_row_have_no_floor():
    x = rows(100)
    near = select.top_blocks(jnp.asarray(x), 4)
    np.testing.assert_array_equal(near.values, x)
    np.testing.assert_array_equal(near.indices, np.tile(np.arange(100), (4, 1)))
    assert np.all(np.asarray(near.floor) == -np.inf)


@pytest.mark.parametrize("length", [1, 33, 1000, 20_000])  # the last with one bit per pass
@pytest.mark.parametrize("ties", [False, True])
def test_threshold_of_ones_is_the_kth_largest(length, ties):
    x = rows(length, ties=ties)
    for k in (1, 2, 17, 1000):
        wanted = np.sort(x, -1)[:, -k] if k <= length else np.full(4, -np.inf)
        np.testing.assert_array_equal(KTH(x, np.full(4, k, np.float32)), wanted)


@pytest.mark.parametrize("length", [10, 1000, 20_000])
def test_threshold_of_weights_is_the_edge_of_that_mass(length):
    x = rows(length, ties=True, seed=3)
    weights = np.random.default_rng(1).integers(0, 8, x.shape).astype(np.float32)  # exact sums
    for share in (0.01, 0.3, 0.9, 1.0):
        target = np.ceil(weights.sum(-1) * share)
        found = np.asarray(THRESHOLD(x, weights, target.astype(np.float32)))
        for row, weight, goal, t in zip(x, weights, target, found, strict=True):
            assert t in row
            assert weight[row >= t].sum() >= goal
            assert weight[row > t].sum() < goal


def test_threshold_is_minus_infinity_when_the_row_weighs_too_little():
    x = rows(100)
    found = select.threshold(jnp.asarray(x), jnp.ones_like(x), jnp.full(4, 101.0))
    assert np.all(np.asarray(found) == -np.inf)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.floats(width=32, allow_nan=False, allow_subnormal=False),
            st.sampled_from([0.0, -0.0, -np.inf, 1.0, -1.0]),
        ),
        min_size=12,
        max_size=12,
    ),
    st.integers(1, 12),
)
def test_threshold_holds_for_any_floats(values, k):
    x = np.array([values], np.float32)
    t = np.asarray(KTH(x, np.array([k], np.float32)))[0]
    wanted = np.sort(x[0])[-k]
    np.testing.assert_array_equal(x[0] >= t, x[0] >= wanted)


def test_the_total_of_a_whole_vocabulary_keeps_its_digits():
    x = np.random.default_rng(0).random((2, 151_936)).astype(np.float32)
    wanted = x.astype(np.float64).sum(-1)
    np.testing.assert_allclose(jax.jit(select.total)(x), wanted, rtol=3e-7)
    np.testing.assert_allclose(select.total(jnp.ones((2, 3, 45))), np.full((2, 3), 45.0))
