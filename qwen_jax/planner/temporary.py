"""What a step holds besides weights and cache: its large arrays, placed as XLA for TPU places them.

Knows which arrays a layer makes, in the order of the program, and two rules of the compiler, both
read from compiled programs (`scripts/compile_tpu.py` holds every plan against one):

- An array stays in VMEM if there is room for it, as long as it lives, beside the others there and
  what the kernels that run meanwhile ask for. A device of two cores keeps nothing there, and what
  the SparseCores of v7x gather and reorder is in HBM.
- Every other one takes, when its turn comes, the smallest gap between those that are alive, or the
  end. So what dies leaves gaps that a larger array cannot use, and they count.

A sparse layer of T tokens, each with A experts, is widest around its products: M = T A rows

    rows, sorted by expert   |----|                          M D w
    hidden                        |----|                     M F w
    results                            |----|                M D 4
    back in order of tokens                 |----|           M D 4
    their weighed sums                           |----|      T D 4
    stream, angles, routing  |------------------------|      T D w and little more

in w bytes an element, F wide on this device. Other backends are taken to do the same without VMEM.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp

from pallas_kernels.device import Device, tpu_info
from pallas_kernels.ragged_dot import Facts, tpu, tpu_config
from qwen_jax import sharding as sharding_lib
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig

LANES = tpu_config.LANES
_SPARSE_CORES = "TPU7x"  # has some that XLA uses
_OPERATIONS = 6  # of `_sparse`, the longest part
_GATE_UP, _DOWN = 1, 2  # those of them that are kernels


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a program.

    Attributes:
        size: bytes.
        first, last: the operation that writes it, and the last one that reads it.
        hbm: whether it is never in VMEM, as what outlives operations that do not use it.
    """

    size: int
    first: int
    last: int
    hbm: bool = False

    def meets(self, other: "Array") -> bool:
        """Whether both are alive at once."""
        return self.first <= other.last and other.first <= self.last


def arena(arrays: Sequence[Array], *, vmem: int = 0, asked: Mapping[int, int] | None = None) -> int:
    """Bytes of HBM that arrays take, in the order in which they are written.

    Args:
        arrays: of one program.
        vmem: bytes of VMEM, 0 where arrays never stay there.
        asked: operation -> bytes of VMEM that it needs for itself.
    """
    near: list[Array] = []
    placed: list[tuple[int, Array]] = []
    for array in sorted(arrays, key=lambda each: each.first):
        if not array.hbm and _used(near, array, asked or {}) + array.size <= vmem:
            near.append(array)
        else:
            placed.append((_place(placed, array), array))
    return max((start + array.size for start, array in placed), default=0)


def _used(near: Iterable[Array], array: Array, asked: Mapping[int, int]) -> int:
    """The most VMEM that is in use while ``array`` lives."""
    return max(
        asked.get(t, 0) + sum(each.size for each in near if each.first <= t <= each.last)
        for t in range(array.first, array.last + 1)
    )


def _place(placed: Iterable[tuple[int, Array]], array: Array) -> int:
    """Where the smallest gap begins that holds ``array``, or the end."""
    gaps, end = [], 0
    for start, other in sorted(placed, key=lambda each: each[0]):
        if other.meets(array):
            gaps.append((start - end, end))
            end = max(end, start + other.size)
    return min(((room, at) for room, at in gaps if room >= array.size), default=(0, end))[1]


def step_bytes(
    config: ModelConfig,
    runtime: Runtime,
    device: Device,
    kernels: Mapping[str, str],
    *,
    tokens: int,
    rows: int,
) -> int:
    """Bytes of one step on each device besides weights and cache; its result, the logits, included.

    Args:
        config: as the weights are stored.
        runtime: the mesh may be abstract.
        device: one of the mesh's.
        kernels: operation -> implementation.
        tokens, rows: of the batch.
    """
    text = config.text
    sparse = sum(map(text.is_moe, range(text.num_hidden_layers)))
    vmem, spare = _vmem(device)
    own = dict.fromkeys(range(_OPERATIONS), spare)
    parts = [(_attention(config, runtime, tokens), own)]
    parts += [(_logits(config, runtime, rows, device), own)]
    if sparse:
        kernel = {**own, **_asked(config, runtime, device, kernels, tokens)}
        parts += [(_sparse(config, runtime, tokens), kernel)]
    if sparse < text.num_hidden_layers:
        parts += [(_dense(config, runtime, tokens), own)]
    widest = max(arena(part, vmem=vmem, asked=asked) for part, asked in parts)
    return widest + rows * text.vocab_size * 4


def _vmem(device: Device) -> tuple[int, int]:
    """Bytes of VMEM in which arrays stay, and those that an operation of XLA's own asks for."""
    if device.platform != "tpu":
        return 0, 0
    info = tpu_info(device.kind)
    return (0, 0) if info.num_cores > 1 else (info.vmem_capacity_bytes, tpu.spare(info))


def _asked(config, runtime: Runtime, device: Device, kernels, tokens: int) -> dict[int, int]:
    """Bytes of VMEM that the kernels of `_sparse` ask for."""
    if kernels.get("ragged_dot") not in (tpu.IMPL.name, tpu.W8A8.name):
        return {}
    info, found = tpu_info(device.kind), {}
    rows, experts = tokens * config.text.num_experts_per_tok, config.text.num_experts
    for facts in _products(config, runtime):
        tiles = tpu_config.choose(facts, rows, experts, device)
        which = _GATE_UP if facts.activation else _DOWN
        found[which] = max(found.get(which, 0), tpu.vmem_limit(facts, tiles, info))
    return found


def _sparse(config: ModelConfig, runtime: Runtime, tokens: int) -> list[Array]:
    """The picture above."""
    text, width = config.text, jnp.dtype(runtime.dtype).itemsize
    rows = tokens * text.num_experts_per_tok
    hidden = _lanes(text.moe_intermediate_size // _part(runtime, "F"))
    routing = tokens * (text.num_experts + LANES) * 4
    return [
        *_held(config, runtime, tokens, last=5),
        Array(routing, 0, 4, hbm=True),
        Array(rows * text.hidden_size * width, 0, _GATE_UP),
        Array(rows * hidden * width, _GATE_UP, _DOWN),
        Array(rows * text.hidden_size * 4, _DOWN, 3),
        Array(rows * text.hidden_size * 4, 3, 4),
        Array(tokens * text.hidden_size * 4, 4, 5),
    ]


def _dense(config: ModelConfig, runtime: Runtime, tokens: int) -> list[Array]:
    """Gate and up, hidden, result."""
    text, width = config.text, jnp.dtype(runtime.dtype).itemsize
    hidden = tokens * _lanes(text.intermediate_size // _part(runtime, "I")) * width
    return [
        *_held(config, runtime, tokens, last=3),
        Array(2 * hidden, 0, 1),
        Array(hidden, 1, 2),
        Array(tokens * text.hidden_size * width, 2, 3),
    ]


def _attention(config: ModelConfig, runtime: Runtime, tokens: int) -> list[Array]:
    """Queries, keys and values; what the heads make of them; the result."""
    text, width = config.text, jnp.dtype(runtime.dtype).itemsize
    head = tokens * text.head_dim * width
    queries = head * text.num_attention_heads // _part(runtime, "N")
    keys = head * max(1, text.num_key_value_heads // _part(runtime, "K"))
    return [
        *_held(config, runtime, tokens, last=3),
        Array(queries + 2 * keys, 0, 1),
        Array(queries, 1, 2),
        Array(tokens * text.hidden_size * width, 2, 3),
    ]


def _logits(config: ModelConfig, runtime: Runtime, rows: int, device: Device) -> list[Array]:
    """Those of this device, all of them, and in the order of the result, where they are split."""
    whole, ways = rows * config.text.vocab_size * 4, _part(runtime, "V")
    if ways == 1:
        return []
    hbm = device.kind == _SPARSE_CORES
    return [Array(whole // ways, 0, 1), Array(whole, 1, 2, hbm), Array(whole, 2, 3, hbm)]


def _held(config: ModelConfig, runtime: Runtime, tokens: int, *, last: int) -> list[Array]:
    """What waits while a part of a layer runs: the stream, and cosine and sine of the positions."""
    rules = sharding_lib.for_tokens(runtime.rules, runtime.mesh, tokens)
    own = tokens // sharding_lib.ways(runtime.mesh, rules.axes("T"))
    stream = own * config.text.hidden_size * jnp.dtype(runtime.dtype).itemsize
    angles = 2 * tokens * _lanes(config.text.head_dim // 2) * 4
    return [Array(stream + angles, 0, last, hbm=True)]


@functools.lru_cache(maxsize=64)
def _products(config: ModelConfig, runtime: Runtime) -> tuple[Facts, ...]:
    """Both products of every kind of sparse layer."""
    return tuple(runtime.facts(config)["ragged_dot"])


def _part(runtime: Runtime, letter: str) -> int:
    return sharding_lib.ways(runtime.mesh, runtime.rules.axes(letter))


def _lanes(n: int) -> int:
    return -(-n // LANES) * LANES
