"""Does a model fit on a machine that is not here, and how fast can it be there at best?

Knows shapes, rules and published figures of chips; runs nothing. `make_plan` is arithmetic and
takes milliseconds; `check` replaces its estimates by what the compiler says, where there is one.

    bytes      weights + cache + temporary               against  the memory of a device
    seconds    max(bytes read / bandwidth, operations / rate, bytes sent / link)   per step
"""

import dataclasses
import math
from collections.abc import Mapping

from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import registry
from pallas_kernels.device import Device
from qwen_jax import expert_dispatch, roofline
from qwen_jax import sharding as sharding_lib
from qwen_jax.engine.capacity import weight_bytes
from qwen_jax.model.cache import page_bytes, row_ways
from qwen_jax.planner.chips import Topology
from qwen_jax.planner.collectives import Collective, imbalance, of_step
from qwen_jax.planner.temporary import step_bytes
from qwen_jax.runtime import ACTIVATION_DTYPES, KV_DTYPES, Runtime
from qwen_jax.sharding import Rules
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.requantize import requantized


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked of the machine.

    Attributes:
        batch: rows that decode together.
        context: tokens of each row, prompt and answer.
        chunk: tokens of a prefill step.
        dtype: of activations and unquantised weights.
        kv_dtype: of the cache: "auto" is ``dtype``.
        quantization: to requantise to on load; None: the checkpoint as it is.
        page_size: tokens of a page.
        utilization: share of a device's memory to use.

    Raises:
        ValueError: a number out of range, or an unknown name.
    """

    batch: int = 1
    context: int = 4096
    chunk: int = 2048
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    quantization: str | None = None
    page_size: int = 64
    utilization: float = 0.95

    def __post_init__(self):
        for name in ("batch", "context", "chunk", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name}={getattr(self, name)} must be at least 1")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"plan: utilization={self.utilization} is not in (0, 1]")
        for name, known in (("dtype", ACTIVATION_DTYPES), ("kv_dtype", ("auto", *KV_DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"plan: {name}={getattr(self, name)!r} is unknown; use {', '.join(known)}"
                )

    @property
    def steps(self) -> Mapping[str, tuple[int, int]]:
        """Step -> its tokens and rows."""
        return {"decode": (self.batch, self.batch), "prefill": (self.chunk, 1)}


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time of a step, in seconds per resource; the largest one limits it."""

    memory: float
    arithmetic: float
    links: float

    @property
    def seconds(self) -> float:
        """Of the step, if all three overlap perfectly."""
        return max(self.memory, self.arithmetic, self.links)

    @property
    def limited_by(self) -> str:
        """ "memory bandwidth", "arithmetic" or "interconnect"."""
        names = {
            "memory bandwidth": self.memory,
            "arithmetic": self.arithmetic,
            "interconnect": self.links,
        }
        return max(names, key=lambda name: names[name])


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model on a topology. Bytes are per device.

    Attributes:
        topology, mesh, strategy, rules, load: what was planned.
        limit: bytes that may be used.
        weights, cache: bytes; ``cache`` of this device's share of the rows.
        step_bytes: "decode" and "prefill" -> bytes that the step needs besides.
        kv_tokens: tokens that the cache could hold, if it took all that is left.
        decode, prefill: the bounds of a decode step and of a prefill chunk.
        imbalance: of expert weights read by the busiest device in decode, against the average.
        collectives: of a decode step.
        kernels: operation -> the implementation that would be chosen there.
        dispatch: the form of `expert_dispatch` that was asked for.
        source: "arithmetic", or "compiled" where the compiler gave temporary and collectives.
    """

    topology: Topology
    mesh: Mapping[str, int]
    strategy: str
    rules: Rules
    load: Load
    limit: int
    weights: int
    cache: int
    step_bytes: Mapping[str, int]
    kv_tokens: int
    decode: Bound
    prefill: Bound
    imbalance: float
    collectives: tuple[Collective, ...]
    kernels: Mapping[str, str]
    dispatch: str
    source: str = "arithmetic"

    @property
    def temporary(self) -> int:
        """What the step that needs more needs besides weights and cache."""
        return max(self.step_bytes.values())

    @property
    def peak(self) -> int:
        """Weights, cache and temporaries together."""
        return self.weights + self.cache + self.temporary

    @property
    def fits(self) -> bool:
        """Whether that is within the limit."""
        return self.peak <= self.limit

    @property
    def excess(self) -> int:
        """Bytes by which that exceeds the limit; 0 if it fits."""
        return max(0, self.peak - self.limit)

    @property
    def decode_tokens_per_s(self) -> float:
        """Of the whole batch, at best."""
        return self.load.batch / self.decode.seconds

    @property
    def prefill_tokens_per_s(self) -> float:
        """At best, for chunks in the middle of a prompt."""
        return self.load.chunk / self.prefill.seconds


def make_plan(
    config: ModelConfig,
    topology: Topology,
    load: Load,
    *,
    mesh: Mapping[str, int],
    strategy: str | Rules = "auto",
    dispatch: str = "auto",
) -> Plan:
    """Plans by arithmetic.

    Raises:
        ValueError: the mesh does not have the topology's devices, a size does not divide over it,
            the dispatch cannot run there, or the context is longer than the model's.
    """
    _check_sizes(config, topology, load, mesh)
    stored = requantized(config, load.quantization)
    runtime = abstract_runtime(mesh, strategy, load, dispatch)
    platform = topology.chip.platform
    expert_dispatch.check(dispatch, mesh=runtime.mesh, rules=runtime.rules, platform=platform)
    weights = weight_bytes(stored, runtime)
    token = page_bytes(config.text, runtime) / runtime.page_size
    token /= sharding_lib.ways(runtime.mesh, runtime.rules.axes("K"))
    holders = row_ways(runtime)  # each of which has its own rows
    pages = math.ceil(load.batch / holders) * math.ceil(load.context / load.page_size)
    usable = int(topology.chip.memory * load.utilization)
    device, kernels = Device(platform, topology.chip.kind), _kernels(stored, runtime, topology)
    besides = {
        step: step_bytes(stored, runtime, device, kernels, tokens=tokens, rows=rows)
        for step, (tokens, rows) in load.steps.items()
    }
    uneven = imbalance(config, runtime, load.batch)
    left = usable - weights - max(besides.values())
    return Plan(
        topology=topology,
        mesh=dict(mesh),
        strategy=strategy if isinstance(strategy, str) else "own rules",
        rules=runtime.rules,
        load=load,
        limit=usable,
        weights=weights,
        cache=int(pages * load.page_size * token),
        step_bytes=besides,
        kv_tokens=max(0, int(left / token)) * holders,
        decode=_decode_bound(stored, runtime, topology, load, uneven),
        prefill=_prefill_bound(stored, runtime, topology, load),
        imbalance=uneven,
        collectives=tuple(of_step(config, runtime, tokens=load.batch, rows=load.batch)),
        kernels=kernels,
        dispatch=dispatch,
    )


def _check_sizes(config: ModelConfig, topology: Topology, load: Load, mesh) -> None:
    limit = config.text.max_position_embeddings
    if load.context > limit:
        raise ValueError(
            f"plan: context={load.context:,} exceeds the model's max_position_embeddings {limit:,}"
        )
    if math.prod(mesh.values()) != topology.devices:
        raise ValueError(
            f"plan: mesh {dict(mesh)} has {math.prod(mesh.values())} devices, {topology} has "
            f"{topology.devices}"
        )


def _kernels(config: ModelConfig, runtime: Runtime, topology: Topology) -> Mapping[str, str]:
    """What `Runtime.make` would choose on such a device."""
    device = Device(topology.chip.platform, topology.chip.kind)
    used = {op: found for op, found in runtime.facts(config).items() if found}
    return {op: registry.choose(op, "auto", device, found).name for op, found in used.items()}


def abstract_runtime(
    mesh: Mapping[str, int], strategy: str | Rules, load: Load, dispatch: str = "auto"
) -> Runtime:
    """A runtime of devices that need not exist: for shapes, never to run."""
    unknown = sorted(set(mesh) - set(sharding_lib.AXES))
    if unknown:
        raise ValueError(f"mesh axes {unknown} are unknown; use {', '.join(sharding_lib.AXES)}")
    sizes = tuple(mesh.get(axis, 1) for axis in sharding_lib.AXES)
    grid = AbstractMesh(sizes, sharding_lib.AXES, axis_types=(AxisType.Auto,) * len(sizes))
    return Runtime(
        mesh=grid,  # pyright: ignore[reportArgumentType]
        rules=sharding_lib.strategy(strategy),
        kernels=(),
        dtype=load.dtype,
        kv_dtype=load.dtype if load.kv_dtype == "auto" else load.kv_dtype,
        page_size=load.page_size,
        dispatch=dispatch,
    )


def _decode_bound(config, runtime, topology: Topology, load: Load, uneven: float) -> Bound:
    # Rows are at all stages of their answers: half of the context on average.
    work = roofline.decode_work(config, runtime, rows=load.batch, context=load.context / 2)
    experts = roofline.expert_bytes(config, runtime, load.batch)
    moved = work.bytes + (uneven - 1) * experts
    return _bound(config, runtime, topology, moved, work.flops, load.batch, load.batch)


def _prefill_bound(config, runtime, topology: Topology, load: Load) -> Bound:
    work = roofline.prefill_work(config, runtime, rows=1, length=load.chunk)
    return _bound(config, runtime, topology, work.bytes, work.flops, load.chunk, 1)


def _bound(config, runtime, topology: Topology, moved, flops, tokens: int, rows: int) -> Bound:
    chip = topology.chip
    sent = sum(c.sent for c in of_step(config, runtime, tokens=tokens, rows=rows))
    return Bound(
        memory=moved / chip.bandwidth,
        arithmetic=flops / chip.rate("bfloat16"),
        links=sent / chip.link,
    )
