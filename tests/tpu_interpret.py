"""Runs TPU kernels on the CPU, with copies, semaphores and a race detector, as one chip or another.

Knows JAX's interpreter; knows no kernel.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh


@contextlib.contextmanager
def chip(kind: str = "TPU v6 lite", cores: int = 1) -> Iterator[None]:
    """Kernels traced inside are for this kind of TPU, and run here; a race fails the test."""
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
    mesh = AbstractMesh((), (), abstract_device=device)
    # "on_wait" lets a copy happen as late as its wait allows: what does not wait reads nothing.
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    with jax.sharding.use_abstract_mesh(mesh), pltpu.force_tpu_interpret_mode(params):
        yield
    assert not interpret_pallas_call.races.races_found
    pltpu.reset_tpu_interpret_mode_state()
