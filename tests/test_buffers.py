"""Loops over rows that fill one buffer: the same values, and only the memory of a tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.buffers import hidden_zero, map_rows, zeros_after


def centred(x, y):
    """Keeps rows apart; sums of pairs of rows besides."""
    return x - y[:, None], x.reshape(-1, 2, x.shape[1]).sum(1)


@pytest.mark.parametrize("rows", [2, 8, 16, 22, 64])
def test_tiles_and_a_rest_give_what_all_rows_at_once_give(rows):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((rows, 5), np.float32), rng.standard_normal(rows, np.float32)
    found = jax.jit(lambda x, y: map_rows(centred, x, y, tile=8))(x, y)
    for ours, wanted in zip(found, centred(x, y), strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize(
    "value",
    [*np.float32([0.0, -0.0, 1.5, -2.0, np.nan, -np.inf]), jnp.bfloat16(-3), np.int32(-7), True],
)
def test_a_hidden_zero_is_zero_whatever_it_waits_for(value):
    x = jnp.full((3, 2), value)
    assert jax.jit(hidden_zero)(x) == 0
    zeros = jax.jit(lambda x: zeros_after(x, (2, 3), jnp.bfloat16))(x)
    assert zeros.dtype == jnp.bfloat16
    np.testing.assert_array_equal(zeros, np.zeros((2, 3)))


def test_layers_one_behind_the_other_share_their_memory():
    layers, rows, width = 12, 4096, 64

    def model(x):
        for _ in range(layers):
            x = x + map_rows(jnp.sin, x, tile=256)
        return x

    shape = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    memory = jax.jit(model).lower(shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4 * rows * width
