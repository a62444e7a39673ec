"""Hopper GPUs: the figures that tile sizes follow, and an H200 to compile for that is not here.

Knows chips and the text in which XLA takes a description of one; knows no kernel. Compiling for the
description goes all the way to machine code (extra "gpu" for the compiler, no GPU and no driver):

    mesh = Mesh(np.array(hopper.h200().devices[:1]), ("one",))
    with jax.set_mesh(mesh): jax.jit(fn).lower(*args).compile()

XLA neither times anything there nor refuses what does not fit the memory.
"""

import dataclasses
from typing import Any

# Device kinds start with these; the longest that fits counts. Multiprocessors of each.
_MULTIPROCESSORS = {
    "NVIDIA H200": 132,
    "NVIDIA H100": 132,
    "NVIDIA H100 PCIe": 114,
    "NVIDIA H800": 132,
    "NVIDIA H800 PCIe": 114,
    "NVIDIA GH200": 132,
    "NVIDIA H20": 78,
}
# Shared memory that a block may ask for, of the 228 KiB that a multiprocessor has.
_SHARED_BYTES = 227 * 1024


@dataclasses.dataclass(frozen=True)
class Info:
    """One GPU.

    Attributes:
        multiprocessors: how many blocks of a full shared memory run at once.
        shared_bytes: shared memory of one block at most.
    """

    multiprocessors: int
    shared_bytes: int


def info(kind: str) -> Info:
    """The figures of a Hopper GPU of this kind, as JAX names it.

    Raises:
        ValueError: it is none.
    """
    names = [name for name in _MULTIPROCESSORS if kind.startswith(name)]
    if not names:
        raise ValueError(f"device kind {kind!r} is no Hopper GPU; known: {list(_MULTIPROCESSORS)}")
    return Info(_MULTIPROCESSORS[max(names, key=len)], _SHARED_BYTES)


def h200(count: int = 1) -> Any:
    """The topology of ``count`` H200 in one machine, as `jax.experimental.topologies` has them.

    Raises:
        RuntimeError: JAX's CUDA plugin is not installed.
    """
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=_H200
    )


_H200 = f"""
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
gpu_device_info {{
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  core_count: {_MULTIPROCESSORS["NVIDIA H200"]}
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: {4_800_000_000_000}
  device_memory_size: {141 * 1024**3}
  l2_cache_size: {50 * 1024**2}
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {_SHARED_BYTES}
  shared_memory_per_core: {228 * 1024}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""
