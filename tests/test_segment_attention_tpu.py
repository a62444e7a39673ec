"""The TPU kernel of segment attention on CPU, under Pallas' interpreter with its race detector."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from test_segment_attention import CASES, H, arrays, oracle

from pallas_kernels.device import Device
from pallas_kernels.segment_attention import Facts, tpu, xla


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Tiles and blocks of 128: cases made for 256 and 512 cross every border of these too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "TILE", 128)
        patch.setattr(tpu, "BLOCK", 128)
        yield


@functools.cache
def jitted(sm_scale):
    """The kernel as the interpreter runs it."""
    how = {"sm_scale": sm_scale, "interpret": pltpu.InterpretParams(detect_races=True)}
    return jax.jit(functools.partial(tpu.segment_attention, **how))


def run(q, k, v, starts, sm_scale=H**-0.5):
    """The kernel under the race detector."""
    out = jax.block_until_ready(jitted(sm_scale)(q, k, v, jnp.asarray(starts)))
    assert not interpret_pallas_call.races.races_found
    return np.asarray(out)


@pytest.mark.parametrize("case", CASES)
def test_every_segment_equals_the_oracle_and_padding_is_zero(case):
    lengths, size = CASES[case]
    q, k, v, starts = arrays(lengths, size, 12.0)  # peaked
    out = run(q, k, v, starts)
    np.testing.assert_allclose(out, oracle(q, k, v, lengths, H**-0.5), atol=2e-5)
    assert not out[sum(lengths) :].any()


def test_what_neighbours_hold_changes_no_bit_of_a_segment():
    lengths, size = [100, 200, 50], 400
    q, k, v, starts = arrays(lengths, size)
    whole = run(q, k, v, starts)
    for x in (q, k, v):
        x[:100] = 1e6
        x[300:350] = -1e6
    np.testing.assert_array_equal(run(q, k, v, starts)[100:300], whole[100:300])


def test_bfloat16_comes_out_as_bfloat16_near_the_oracle():
    lengths, size = [70, 30], 128
    q, k, v, starts = arrays(lengths, size)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = run(*half, starts)
    assert out.dtype == jnp.bfloat16
    wanted = oracle(*(np.asarray(x, np.float32) for x in half), lengths, H**-0.5)
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted, atol=3 * 2**-8)


def test_a_walk_is_as_long_as_its_queries_segments():
    low = jnp.asarray([0] * 100 + [100] * 56 + [156] * 100 + [0] * 256, jnp.int32)
    high = jnp.asarray([100] * 100 + [156] * 56 + [256] * 100 + [0] * 256, jnp.int32)
    first, blocks, _, _ = xla.walks(low, high, 128, 64)
    # Tile 0 meets keys 0..156, tile 1 keys 100..256; the last two are padding.
    np.testing.assert_array_equal(first, [0, 1, 0, 0])
    np.testing.assert_array_equal(blocks, [3, 3, 0, 0])


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (Facts(16, 72, "bfloat16"), None),
        (Facts(16, 64, "float32"), None),
        (Facts(16, 60, "bfloat16"), "use a multiple of 8"),
        (Facts(16, 64, "float16"), "use bfloat16 or float32"),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(facts, reason):
    got = tpu.supports(Device("tpu", "TPU v6 lite"), facts)
    assert (got is None) if reason is None else (reason in got)
