"""The differentiable forms of the three operations: equal to the XLA ones, and so are gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from demo import kernels

from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.ragged_dot import ragged_dot
from pallas_kernels.segment_attention import segment_attention

TOLERANCE = 2e-5  # float32 sums of some hundred terms of size one


@pytest.fixture(autouse=True)
def _registered():
    kernels.register()


def randoms(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "sizes", [(5, 0, 70, 1), (0, 0, 0, 130), (64, 64, 1, 1), (3, 2, 0, 0)], ids=str
)
@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_train_ragged_dot_equals_the_definition(sizes, activation):
    x = randoms(130, 16)  # some cases leave rows behind the last expert's
    w = randoms(4, 2, 16, 8) if activation else randoms(4, 16, 8)
    groups = jnp.asarray(sizes)
    got, wanted = (
        ragged_dot(x, w, groups, activation=activation, impl=impl) for impl in ("train", "xla")
    )
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_train_ragged_dot_refuses_a_shard():
    with pytest.raises(ValueError, match="of all 4 experts, got 2"):
        ragged_dot(randoms(8, 4), randoms(2, 4, 4), jnp.asarray([2, 2, 2, 2]), impl="train")


def test_gradients_of_train_ragged_dot_are_those_of_one_product_per_row():
    x, w, direction = randoms(70, 16), randoms(4, 2, 16, 8), randoms(70, 8, seed=1)
    sizes = np.array([40, 0, 29, 1])
    expert = np.repeat(np.arange(4), sizes)

    def routed(x, w):
        out = ragged_dot(x, w, jnp.asarray(sizes), activation="swiglu", impl="train")
        return jnp.sum(out * direction)

    def plain(x, w):
        gate, up = (jnp.einsum("md,mdf->mf", x, w[expert, p]) for p in range(2))
        return jnp.sum(gate / (1 + jnp.exp(-gate)) * up * direction)

    for got, wanted in zip(
        jax.grad(routed, (0, 1))(x, w), jax.grad(plain, (0, 1))(x, w), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-4)


def test_train_paged_attention_equals_the_definition():
    line, heads, kv_heads, size = kernels.TEXT_LINE, 4, 2, 8
    starts = np.array([0, 1, 100, line, line + 3, 2 * line, 2 * line])
    lengths = np.diff(starts)
    pages = 2 * line // 16 + 6
    table = np.zeros((6, line // 16), np.int32)
    free = iter(range(pages))
    for row, length in enumerate(lengths):
        for page in range(-(-length // 16)):
            table[row, page] = next(free)
    q, k, v = (randoms(2 * line, n, size) for n in (heads, kv_heads, kv_heads))
    got, wanted = (
        paged_attention(
            q,
            3 * k,
            v,
            jnp.zeros((pages, 16, 2 * kv_heads, size)),
            row_starts=jnp.asarray(starts),
            kv_lens=jnp.asarray(lengths),
            page_table=jnp.asarray(table),
            sm_scale=size**-0.5,
            impl=impl,
        ).out_TNH
        for impl in ("train", "xla")
    )
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_train_segment_attention_equals_the_definition():
    line = kernels.PATCH_LINE
    starts = jnp.asarray([0, line, line + 4, line + 8, 2 * line, 2 * line + 30, 2 * line + 30])
    q, k, v = (randoms(3 * line, 2, 8, seed=i) for i in range(3))
    got, wanted = (
        segment_attention(q, k, v, segment_starts=starts, sm_scale=0.5, impl=impl)
        for impl in ("train", "xla")
    )
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    assert not np.asarray(got[2 * line + 30 :]).any()
