"""The Hopper kernel of segment attention on CPU, under the interpreter and its race detector."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_segment_attention import oracle

from pallas_kernels import registry
from pallas_kernels.device import Device
from pallas_kernels.segment_attention import Facts, gpu

H200 = Device("gpu", "NVIDIA H200")
# Lengths of the segments, U and H: around tiles and blocks of 128.
CASES = {
    "many in a tile, padding": ([3, 60, 1, 100, 0, 30, 40], 250, 72),
    "borders inside tiles and blocks": ([200, 312, 90], 700, 64),
    "a tile and one": ([129], 129, 72),
    "nothing but padding": ([0], 16, 64),
}
newer = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="refused before jax 0.11")


@functools.cache
def jitted(sm_scale):
    """The kernel as the interpreter runs it."""
    how = {"sm_scale": sm_scale, "interpret": plgpu.InterpretGPUParams(detect_races=True)}
    return jax.jit(functools.partial(gpu.segment_attention, **how))


def run(q, k, v, starts, sm_scale=0.125):
    """The kernel under the race detector, for an H200."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    device = jax.sharding.AbstractDevice(device_kind=H200.kind, platform="gpu", num_cores=132)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        out = jax.block_until_ready(jitted(sm_scale)(q, k, v, jnp.asarray(starts)))
    assert not interpret_pallas_call.get_races().races_found
    return np.asarray(out)


def arrays(lengths, size, H):
    """bfloat16 q (peaked), k and v, NaN behind the last segment, and the segments' starts."""
    rng = np.random.default_rng(size)
    q, k, v = (rng.standard_normal((size, 1, H)) for _ in range(3))
    q *= 4
    for x in (q, k, v):
        x[sum(lengths) :] = np.nan
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    return *(oracles.round_to(x, "bfloat16") for x in (q, k, v)), starts


@newer
@pytest.mark.parametrize("case", CASES)
def test_every_segment_equals_the_oracle_and_padding_is_zero(case):
    lengths, size, H = CASES[case]
    q, k, v, starts = arrays(lengths, size, H)
    out = run(q, k, v, starts)
    want = oracle(*(oracles.exact(x) for x in (q, k, v)), lengths, 0.125)
    assert out.dtype == q.dtype
    assert oracles.row_error(out, want) < oracles.tolerance("bfloat16", size)
    assert not out[sum(lengths) :].any()


@newer
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"head_dim": 64}, None),
        ({"head_dim": 136}, "use 128 at most"),
        ({"dtype": "float32"}, "use bfloat16"),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(changes, reason):
    got = gpu.supports(H200, dataclasses.replace(Facts(16, 72, "bfloat16"), **changes))
    assert (got is None) if reason is None else (reason in got)


@newer
def test_auto_takes_the_kernel_on_hopper_alone():
    facts = [Facts(16, 72, "bfloat16")]
    assert registry.choose("segment_attention", "auto", H200, facts).name == "gpu"
    ampere = registry.choose("segment_attention", "auto", Device("gpu", "NVIDIA A100"), facts)
    assert ampere.name == "xla"
    assert "no Hopper GPU" in ampere.reasons["gpu"]
