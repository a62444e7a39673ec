"""What fits: weights and cache against the memory of the devices, before anything is read.

Knows shapes, shardings and bytes; allocates nothing.
"""

import dataclasses
import logging
import math
import os
import pathlib
import socket

import jax
from jax.sharding import AbstractMesh, AxisType

from qwen_jax import distributed
from qwen_jax import sharding as sharding_lib
from qwen_jax.functional import auto_mesh
from qwen_jax.model.cache import page_bytes, row_ways
from qwen_jax.runtime import Runtime
from qwen_jax.weights import derive
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.quant import FORMATS
from qwen_jax.weights.requantize import requantized

log = logging.getLogger(__name__)

_CPU_SHARE = 0.25  # of the host memory that weights leave: others use the machine too
_MOST_DEVICES = 256  # of a mesh to propose
_ROOM = 0.9  # of a device that a proposal fills with weights: the rest is for the cache


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model takes of its devices. Bytes are per device.

    Attributes:
        devices: how many, of which kind, on which axes.
        memory: bytes that may be used; devices of a CPU have equal shares of what is free.
        weights: bytes.
        cache: bytes that the cache may take.
        page: bytes of one page of the cache.
        page_size: tokens of a page.
        pages: of the cache.
        max_model_len: the longest context in tokens.
        model_limit: the longest context that the model knows.
        holders: pieces of the cache, on different devices, each with rows of its own.
    """

    devices: str
    memory: int
    weights: int
    cache: int
    page: int
    page_size: int
    pages: int
    max_model_len: int
    model_limit: int
    holders: int = 1

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit in the cache."""
        return self.holders * (self.cache // self.page) * self.page_size

    def __str__(self) -> str:
        shorter = ""
        if self.max_model_len < self.model_limit:
            shorter = f" (the model's limit is {self.model_limit:,})"
        return (
            f"{self.devices}: {_gb(self.memory)} each free, weights {_gb(self.weights)} each, "
            f"cache for {self.kv_tokens:,} tokens; contexts up to {self.max_model_len:,}{shorter}"
        )


def make_plan(
    config: ModelConfig,
    runtime: Runtime,
    *,
    quantization: str | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    hbm_utilization: float = 0.9,
) -> Plan:
    """Decides the longest context and the pages of the cache.

    Args:
        config: the checkpoint.
        runtime: where it will run.
        quantization: how it will be requantised on load, None for as it is.
        max_model_len: the longest context; None: the model's, or what fits.
        max_num_seqs: most rows at once.
        hbm_utilization: share of an accelerator's memory to use.

    Raises:
        ValueError: a limit out of range, or weights or cache that do not fit; it says what would.
    """
    limit = _model_limit(config, max_model_len)
    most_rows = runtime.buckets.rows[-1]
    if not 1 <= max_num_seqs <= most_rows:
        raise ValueError(f"max_num_seqs={max_num_seqs} is not in 1 .. {most_rows}")
    if not 0 < hbm_utilization <= 1:
        raise ValueError(f"hbm_utilization={hbm_utilization} is not in (0, 1]")
    stored = requantized(config, quantization)
    memory = _device_memory(runtime, hbm_utilization)
    weights = weight_bytes(stored, runtime)
    if weights >= memory:
        raise ValueError(
            f"the weights need {_gb(weights)} per device, {_gb(memory)} are free on "
            f"{_devices(runtime)}: {_what_fits(config, runtime, memory)}"
        )
    left = memory - weights
    cache = int(left * _CPU_SHARE) if _on_cpu(runtime) else left
    page = page_bytes(config.text, runtime) // _kv_ways(runtime)
    wanted = _longest(max_model_len or limit, cache, page, runtime, asked=max_model_len is not None)
    holders = row_ways(runtime)
    rows = -(-max_num_seqs // holders)
    return Plan(
        devices=_devices(runtime),
        memory=memory,
        weights=weights,
        cache=cache,
        page=page,
        page_size=runtime.page_size,
        pages=holders * min(cache // page, -(-wanted // runtime.page_size) * rows),
        max_model_len=wanted,
        model_limit=limit,
        holders=holders,
    )


def _longest(wanted: int, cache: int, page: int, runtime: Runtime, *, asked: bool) -> int:
    """The longest context; shorter than ``wanted`` only where the user did not ask for it."""
    fits = cache // page * runtime.page_size
    if wanted > fits and (asked or fits < 2):
        raise ValueError(
            f"max_model_len={wanted:,} needs {_gb(math.ceil(wanted / runtime.page_size) * page)} "
            f"of cache on each device, {_gb(cache)} are free (KV for {fits:,} tokens fits): lower "
            "max_model_len, or use kv_cache_dtype='int8' or more devices"
        )
    return min(wanted, fits)


def _model_limit(config: ModelConfig, max_model_len: int | None) -> int:
    limit = config.text.max_position_embeddings
    if max_model_len is not None and not 1 < max_model_len <= limit:
        raise ValueError(
            f"max_model_len={max_model_len:,} is not in 2 .. {limit:,}, the model's "
            "max_position_embeddings (YaRN in config.json's rope_scaling extends it)"
        )
    return limit


def prefill_limit(runtime: Runtime, wanted: int | None) -> int:
    """The most tokens of a prefill chunk, where ``wanted`` may be None.

    Raises:
        ValueError: it exceeds the largest bucket.
    """
    most_tokens = runtime.buckets.tokens[-1]
    if wanted is not None and not 1 <= wanted <= most_tokens:
        raise ValueError(f"max_num_batched_tokens={wanted:,} is not in 1 .. {most_tokens:,}")
    return wanted or most_tokens


def weight_bytes(config: ModelConfig, runtime: Runtime) -> int:
    """Bytes of the weights on each device.

    Raises:
        ValueError: a dimension does not split over the mesh.
    """
    return _weight_bytes(config, runtime, runtime.mesh)


def _weight_bytes(config: ModelConfig, runtime: Runtime, mesh) -> int:
    arrays = jax.tree.leaves(derive.abstract(config, runtime.dtype))
    places = jax.tree.leaves(derive.shardings(config, mesh, runtime.rules))
    return sum(
        math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
        for x, place in zip(arrays, places, strict=True)
    )


def _what_fits(config: ModelConfig, runtime: Runtime, memory: int) -> str:
    """The smallest mesh, for each way to store the weights, on which they fit."""
    found = []
    forms = [None] if config.quantization else [None, *FORMATS]
    for form in forms:
        stored = requantized(config, form)
        for n in (1 << i for i in range(_MOST_DEVICES.bit_length())):
            mesh = auto_mesh(config, n)
            if _fits(stored, runtime, mesh, memory):
                axis = next(iter(mesh))
                how = f", quantization={form!r}" if form else ""
                found.append(f"mesh='{axis}={n}'{how}")
                break
    if not found:
        return f"no mesh of one axis and up to {_MOST_DEVICES} such devices holds them"
    return f"such devices hold them with {', or '.join(found)}"


def _fits(config: ModelConfig, runtime: Runtime, mesh: dict[str, int], memory: int) -> bool:
    sizes = tuple(mesh.get(axis, 1) for axis in sharding_lib.AXES)
    grid = AbstractMesh(sizes, sharding_lib.AXES, axis_types=(AxisType.Auto,) * len(sizes))
    try:
        return _weight_bytes(config, runtime, grid) < _ROOM * memory
    except ValueError:  # it does not split over so many
        return False


def _kv_ways(runtime: Runtime) -> int:
    return sharding_lib.ways(runtime.mesh, runtime.rules.axes("K"))


def _on_cpu(runtime: Runtime) -> bool:
    return runtime.mesh.devices.flat[0].platform == "cpu"


def _devices(runtime: Runtime) -> str:
    mesh = runtime.mesh
    axes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1)
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} {kind} device{'s' * (mesh.size > 1)}{f' ({axes})' if axes else ''}"


def _device_memory(runtime: Runtime, utilization: float) -> int:
    """Bytes that may be used on each device; the least that a process of the job has."""
    distributed.check_met()
    local = runtime.mesh.local_devices
    if _on_cpu(runtime):
        sharers = distributed.gather("hosts", socket.gethostname())
        here = sharers.count(socket.gethostname()) * len(local)
        found = free_host_memory() // here
    else:
        stats = local[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            raise ValueError(f"{_devices(runtime)}: the memory is not known; use another backend")
        found = int(stats["bytes_limit"] * utilization) - stats["bytes_in_use"]
    return min(map(int, distributed.gather("memory", str(found))))


def free_host_memory() -> int:
    """Bytes that this process can still take, caches of files included that can be dropped."""
    free = _meminfo().get("MemAvailable")
    if free is None:  # not Linux: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    group = pathlib.Path("/sys/fs/cgroup")
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is None or used is None:
        return free
    cached = _pairs(group / "memory.stat")  # files, which are dropped when memory is short
    return min(free, limit - used + cached.get("inactive_file", 0) + cached.get("active_file", 0))


def _meminfo() -> dict[str, int]:
    kib = _pairs(pathlib.Path("/proc/meminfo"))
    return {name.rstrip(":"): value * 1024 for name, value in kib.items()}


def _pairs(path: pathlib.Path) -> dict[str, int]:
    """The lines "name number …" of a file of the kernel's; empty where there is no such file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: int(value) for name, value, *_ in (line.split() for line in lines)}


def _number(path: pathlib.Path) -> int | None:
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None


def _gb(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
