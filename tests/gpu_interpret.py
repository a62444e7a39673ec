"""Runs Mosaic GPU kernels on the CPU, with barriers, copies and a race detector, as a Hopper GPU.

Knows JAX's interpreter; knows no kernel. What it does not have, a left operand of a matrix product
in registers, is added here. Products are done at once there: that a kernel waits for its own is for
the assembler and for real hardware to show.
"""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"),
    reason=f"JAX {jax.__version__} interprets no Mosaic GPU kernel with layouts; 0.11 does",
)


@contextlib.contextmanager
def hopper(kind: str = "NVIDIA H200") -> Iterator[None]:
    """Kernels traced inside are for this kind of GPU, and run here; a race fails the test."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call

    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=device)
    params = plgpu.InterpretGPUParams(detect_races=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_callbacks, "wgmma", _wgmma(gpu_callbacks, gpu_callbacks.wgmma))
        gpu_callbacks.reset_gpu_interpret_mode_state()
        with jax.sharding.use_abstract_mesh(mesh), plgpu.force_gpu_interpret_mode(params):
            yield
        assert not interpret_pallas_call.get_races().races_found
    gpu_callbacks.reset_gpu_interpret_mode_state()


def _wgmma(callbacks, of_shared):
    """The interpreter's matrix product, and the same with a left operand in registers."""

    def run(**call):
        left = call["a_allocation_key_as_array"]
        if np.ndim(left) == 1:
            return of_shared(**call)
        memory, thread = callbacks._get_shared_memory(), call["thread"]
        places = []
        for name in ("b", "acc"):
            key = callbacks.HostAllocationKey.from_array(call[f"{name}_allocation_key_as_array"])
            kept = callbacks._remove_noop_transforms(call[f"{name}_transforms"])
            places.append((key, memory.access(key, jax.tree.map(int, kept))))
        right, sums = (memory.get_buffer_content(*place, thread)[0] for place in places)
        sums = sums + np.matmul(np.asarray(left), right, dtype=sums.dtype)
        memory.store_buffer_content(*places[1], sums, thread)
        return call["token"]

    return run
