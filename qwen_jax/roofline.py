"""What a step must move and compute, and what this machine can: the bound beside every measurement.

Knows shapes, bytes and clocks. The bytes are those of an ideal program: each weight that is needed
is read once, each key and value once, and nothing else moves.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen_jax import dims as dims_lib
from qwen_jax import sharding as sharding_lib
from qwen_jax.model.cache import page_bytes, row_ways
from qwen_jax.runtime import Runtime
from qwen_jax.weights import derive
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Param, Weights, table

_TRIES = 5


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes read and floating-point operations done, per device."""

    bytes: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """What one device can do: bytes and operations per second, measured."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, work: Work) -> float:
        """The least time that ``work`` can take."""
        return max(work.bytes / self.bytes_per_s, work.flops / self.flops_per_s)

    def limit(self, work: Work) -> str:
        """What limits it: "bandwidth" or "arithmetic"."""
        by_bytes = work.bytes / self.bytes_per_s
        return "bandwidth" if by_bytes >= work.flops / self.flops_per_s else "arithmetic"


def distinct_experts(config: ModelConfig, tokens: int) -> float:
    """Experts of a layer that ``tokens`` tokens use, if the router is uniform."""
    experts, active = config.text.num_experts, config.text.num_experts_per_tok
    return experts * (1 - (1 - active / experts) ** tokens) if experts else 0.0


def decode_work(config: ModelConfig, runtime: Runtime, *, rows: int, context: float) -> Work:
    """One decode step: a token for each of ``rows`` rows, each with ``context`` positions."""
    seen = rows * context
    return _work(config, runtime, tokens=rows, rows=rows, kv_tokens=seen, pairs=seen)


def prefill_work(config: ModelConfig, runtime: Runtime, *, rows: int, length: int) -> Work:
    """Prompts of ``length`` tokens in ``rows`` rows, up to each row's first new token."""
    tokens, pairs = rows * length, rows * length * (length + 1) / 2
    return _work(config, runtime, tokens=tokens, rows=rows, kv_tokens=tokens, pairs=pairs)


def _work(
    config: ModelConfig,
    runtime: Runtime,
    *,
    tokens: int,
    rows: int,
    kv_tokens: float,
    pairs: float,
) -> Work:
    """``pairs``: how many (query, key) pairs attention has, over all rows."""
    text, mesh = config.text, runtime.mesh
    experts, others = _weight_bytes(config, runtime)
    moved = experts * _share_of_experts(config, tokens) + others
    kv_token = page_bytes(text, runtime) / runtime.page_size
    moved += kv_tokens * kv_token / (_ways(runtime, "K") * row_ways(runtime))
    # A token multiplies each weight it uses once; the head sees only the rows' last tokens.
    head = text.vocab_size * text.hidden_size
    products = tokens * (derive.count_active(config) - head) + rows * head
    products += 2 * pairs * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    return Work(moved, 2 * products / mesh.size)


def expert_bytes(config: ModelConfig, runtime: Runtime, tokens: int) -> float:
    """Bytes of expert weights that the average device reads for ``tokens`` tokens."""
    return _weight_bytes(config, runtime)[0] * _share_of_experts(config, tokens)


def _share_of_experts(config: ModelConfig, tokens: int) -> float:
    return distinct_experts(config, tokens) / max(config.text.num_experts, 1)


@functools.lru_cache(maxsize=64)
def _weight_bytes(config: ModelConfig, runtime: Runtime) -> tuple[int, int]:
    """Bytes on each device that text needs: of experts, and of all else."""
    experts = others = 0
    for row, array, place in _used_weights(config, runtime):
        for x, where in zip(jax.tree.leaves(array), jax.tree.leaves(place), strict=True):
            size = math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize
            if "E" in dims_lib.parse(row.dims):
                experts += size
            else:
                others += size
    return experts, others


def _used_weights(config: ModelConfig, runtime: Runtime):
    """(row, arrays, shardings) of the weights that text needs, the embedding's rows left out."""

    def leaves(tree: Weights) -> list:
        parts = (tree.layers, tree.norm, tree.embed if tree.head is None else tree.head)
        return jax.tree.leaves(parts, is_leaf=lambda x: hasattr(x, "blocks"))

    rows = leaves(table(config))
    arrays = leaves(derive.abstract(config, runtime.dtype))
    places = leaves(derive.shardings(config, runtime.mesh, runtime.rules))
    found: list[tuple[Param, object, object]] = list(zip(rows, arrays, places, strict=True))
    return found


def _ways(runtime: Runtime, letter: str) -> int:
    return sharding_lib.ways(runtime.mesh, runtime.rules.axes(letter))


def measure(dtype: str) -> Machine:
    """The first device's memory bandwidth, and its rate of matrix products in ``dtype``.

    The bandwidth is the better one of a copy (which reads and writes) and of a matrix-vector
    product in float32 (which reads).
    """
    on_cpu = jax.devices()[0].platform == "cpu"
    n = 8192 if on_cpu else 32768
    x = jnp.ones((n, n), jnp.float32)
    copied = 2 * x.nbytes / _best(lambda: _plus_one(x))
    read = x.nbytes / _best(lambda: _product(x, x[0]))
    m = jnp.ones((1536, 1536) if on_cpu else (8192, 8192), dtype)
    return Machine(max(copied, read), 2 * m.shape[0] ** 3 / _best(lambda: _product(m, m)))


@jax.jit
def _plus_one(x: jax.Array) -> jax.Array:
    return x + 1


@jax.jit
def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return x @ y


def _best(run: Callable[[], jax.Array]) -> float:
    """The shortest of some runs, in seconds; the first one compiles and does not count."""
    run().block_until_ready()
    times = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)
