"""The same figures from the compiled program of a TPU topology; no TPU is needed, libtpu is.

Knows how a step is lowered for devices that are not here; `program_text` reads what comes of it.
"""

import dataclasses
import importlib.util
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from qwen_jax.model.cache import RaggedBatch, abstract_cache
from qwen_jax.model.step import jit_step
from qwen_jax.planner.program_text import calls_of, collectives_of, copies_of
from qwen_jax.runtime import Runtime
from qwen_jax.weights import derive
from qwen_jax.weights.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one step, per device.

    Attributes:
        arguments: bytes of what goes in: weights, cache, batch.
        temporary: bytes besides, results included that take over no argument (`_besides`).
        donated: bytes of arguments that the results take over (the cache).
        collectives: (op, bytes of its result) -> how often.
        copies: bytes of each array of at least a megabyte that is copied.
        calls: Pallas kernel -> how often it is called.
        seconds: of compiling.
    """

    arguments: int
    temporary: int
    donated: int
    collectives: dict[tuple[str, int], int]
    copies: list[int]
    calls: dict[str, int]
    seconds: float

    @property
    def peak(self) -> int:
        """Arguments and what comes besides."""
        return self.arguments + self.temporary


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU topology, for example "v6e:4x4".

    Raises:
        ModuleNotFoundError: libtpu is missing.
        ValueError: there is no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "programs for TPU are compiled by libtpu: install the extra 'tpu' (no TPU is needed), "
            "or plan by arithmetic with --fast"
        )
    # There is no TPU to ask, and libtpu complains where nobody names one.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Compiling takes no TPU, so several programs may do it at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {name!r}: {str(error).splitlines()[0]}") from error


def lower_step(
    config: ModelConfig, runtime: Runtime, *, tokens: int, rows: int, pages: int, table_width: int
) -> Any:
    """`jit_step` for the devices of ``runtime``, made from shapes alone and not compiled yet.

    Args:
        config, runtime: the model; the mesh may be of devices that are not here.
        tokens, rows: of the batch; as many tokens as rows is a decode step.
        pages: of the cache.
        table_width: pages of a row's page table.
    """
    mesh = runtime.mesh
    whole = NamedSharding(mesh, PartitionSpec())

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)

    weights = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        derive.abstract(config, runtime.dtype),
        derive.shardings(config, mesh, runtime.rules),
    )
    batch = RaggedBatch(
        tokens=array(tokens),
        positions=array(3, tokens),
        row_starts=array(rows + 1),
        kv_lens=array(rows),
        page_table=array(rows, table_width),
    )
    cache = abstract_cache(config.text, runtime, pages)
    with jax.set_mesh(mesh):
        return jit_step.lower(weights, config, runtime, batch, cache)


def compile_step(config: ModelConfig, runtime: Runtime, **sizes: int) -> Compiled:
    """Compiles a step for the devices of ``runtime``; arguments as in `lower_step`."""
    begun = time.perf_counter()
    program = lower_step(config, runtime, **sizes).compile()
    seconds = time.perf_counter() - begun
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None
    assert text is not None
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporary=_besides(memory),
        donated=memory.alias_size_in_bytes,
        collectives=collectives_of(text),
        copies=copies_of(text),
        calls=calls_of(text),
        seconds=seconds,
    )


def _besides(memory: Any) -> int:
    """Bytes of a compiled program's buffers besides its arguments.

    libtpu's ``temp_size_in_bytes`` counts what its arena leaves unused a second time: for 30B-A3B
    cut to two layers on v5e:2x4 a chunk's arrays take 281.6 MB at most, in an arena of 309.5 MB,
    and it says 337.4 MB. Newer JAX has the sum of all allocations; older JAX has only this.
    """
    total = getattr(memory, "total_allocation_bytes", 0)
    if total:
        return total - memory.argument_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return results + memory.temp_size_in_bytes
