"""Named real shapes of `segment_attention`: one list for tests, benchmarks and tuning.

Knows the published towers' heads and sizes of pictures; knows no tower.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.device import Device
from pallas_kernels.program import Program, Refused
from pallas_kernels.segment_attention import gpu, segment_attention, tpu
from pallas_kernels.segment_attention.facts import Facts

KERNELS = {"tpu": tpu.IMPL, "gpu": gpu.IMPL}
# Heads and head dimension of the two published towers.
TOWERS = {"heads-16x64": (16, 64), "heads-16x72": (16, 72)}
# Patches, in segments of equal size.
BATCHES = {"1024": (1024, 1), "4096": (4096, 1), "16384": (16384, 1), "video-16384": (16384, 16)}


def programs(device: Device) -> Iterator[Program]:
    """Every batch through every tower's attention, in bfloat16, that the device's kernel takes."""
    for name, dims, reason in _calls(device):
        if reason is None:
            yield _program(name, device.platform, *dims)


def refused(device: Device) -> Iterator[Refused]:
    """Those that it does not take."""
    for name, _, reason in _calls(device):
        if reason is not None:
            yield Refused(name, reason)


def _calls(device: Device) -> Iterator[tuple[str, tuple[int, int, int, int], str | None]]:
    """Name, (patches, segments, heads, head dimension), and why the kernel does not take it."""
    if device.platform not in KERNELS:
        return
    for batch, (U, segments) in BATCHES.items():
        for tower, (N, H) in TOWERS.items():
            reason = KERNELS[device.platform].supports(device, Facts(N, H, "bfloat16"))
            yield f"segment_attention/{batch}/{tower}", (U, segments, N, H), reason


def _program(name: str, impl: str, U: int, segments: int, N: int, H: int) -> Program:
    part = jax.ShapeDtypeStruct((U, N, H), jnp.bfloat16)
    args = (part, part, part, jax.ShapeDtypeStruct((segments + 1,), jnp.int32))

    def call(impl, q, k, v, starts):
        return segment_attention(q, k, v, segment_starts=starts, sm_scale=H**-0.5, impl=impl)

    def cudnn(q, k, v, _):  # segments of equal size, which is all that is benchmarked
        each = (x.reshape(segments, -1, N, H) for x in (q, k, v))
        return jax.nn.dot_product_attention(*each, scale=H**-0.5, implementation="cudnn")

    baselines = {"xla": functools.partial(call, "xla")}
    baselines |= {"cudnn": cudnn} if impl == "gpu" else {}
    size = 2 * U * N * H
    length = U // segments
    kernel = {"tpu": tpu, "gpu": gpu}[impl]
    walks = -(-U // kernel.TILE)
    blocks = -(-length // kernel.BLOCK)
    return Program(
        name,
        functools.partial(call, impl),
        args,
        make=functools.partial(_make, args, segments),
        moved=4 * size,
        flops=4 * N * U * length * H,
        copied=2 * size + N * walks * blocks * 4 * kernel.BLOCK * H,
        trips=(N * walks * blocks,),
        baselines=baselines,
    )


def _make(args, segments: int, seed: int) -> tuple:
    keys = jax.random.split(jax.random.key(seed), 3)
    parts = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, args, strict=False)]
    starts = np.linspace(0, args[0].shape[0], segments + 1, dtype=np.int32)
    return (*parts, jnp.asarray(starts))
