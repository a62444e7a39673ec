"""The machine a model runs on: mesh, sharding rules, kernels, dtypes, page size, shape buckets.

Knows devices; of a model it knows what `kernel_facts` reads from its configuration, and keeps
nothing of it but the choice of kernels. A `Runtime` is made once, is hashable, and is a static
argument of every jitted function, so that no choice is made again while the model runs.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

import pallas_kernels  # noqa: F401  (importing the ops registers their implementations)
from pallas_kernels import registry
from pallas_kernels.device import Device
from qwen_jax import expert_dispatch, kernel_facts
from qwen_jax import sharding as sharding_lib
from qwen_jax.sharding import Rules
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.requantize import requantized

log = logging.getLogger(__name__)

OPS = ("ragged_dot", "paged_attention", "segment_attention")
KV_DTYPES = {
    "bfloat16": jnp.bfloat16,
    "float32": jnp.float32,
    "fp8": jnp.float8_e4m3fn,
    "int8": jnp.int8,
}
ACTIVATION_DTYPES = ("bfloat16", "float32")


def ladder(smallest: int, largest: int) -> tuple[int, ...]:
    """``smallest`` doubled as often as it stays below ``largest``, then ``largest``.

    Raises:
        ValueError: ``smallest`` is not positive.
    """
    if smallest < 1:
        raise ValueError(f"a ladder of buckets cannot start at {smallest}; start at 1 or more")
    steps = []
    while smallest < largest:
        steps.append(smallest)
        smallest *= 2
    return (*steps, largest)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes that reach the compiler: sizes are rounded up to the next bucket.

    Attributes:
        tokens: flat tokens of a prefill step.
        rows: rows of a batch.
        pages: pages of a row's page table.
        new_tokens: tokens that one generate program can hold per row.
        patches: of the pictures that the vision tower takes at once.
        segments: slices in time of those pictures.

    Raises:
        ValueError: a list is empty, or not of increasing positive sizes.
    """

    tokens: tuple[int, ...] = ladder(16, 8192)
    rows: tuple[int, ...] = ladder(1, 256)
    pages: tuple[int, ...] = ladder(4, 65536)
    new_tokens: tuple[int, ...] = ladder(16, 262144)
    patches: tuple[int, ...] = ladder(256, 65536)
    segments: tuple[int, ...] = ladder(8, 4096)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            steps = getattr(self, field.name)
            if not steps or steps[0] < 1 or list(steps) != sorted(set(steps)):
                raise ValueError(f"buckets: {field.name}={steps} must be positive and increasing")

    def pick(self, kind: str, n: int) -> int:
        """The smallest bucket of ``kind`` that holds ``n``.

        Raises:
            ValueError: ``n`` is larger than every bucket.
        """
        steps: tuple[int, ...] = getattr(self, kind)
        for step in steps:
            if n <= step:
                return step
        raise ValueError(f"{kind}={n:,} exceeds the largest bucket {steps[-1]:,}")


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Everything about the machine that a compiled step depends on.

    Attributes:
        mesh: the devices.
        rules: letter -> mesh axes.
        kernels: (op, implementation) pairs.
        dtype: of activations and unquantised weights.
        kv_dtype: of the cache's pages.
        page_size: token positions per page.
        buckets: declared shapes.
        dispatch: how tokens meet their experts: "auto" or one of `expert_dispatch.FORMS`.
    """

    mesh: Mesh
    rules: Rules
    kernels: tuple[tuple[str, str], ...]
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    page_size: int = 64
    buckets: Buckets = Buckets()
    dispatch: str = "auto"

    def kernel(self, op: str) -> str:
        """The name of the implementation chosen for ``op``, one of `OPS`."""
        return dict(self.kernels)[op]

    def dispatch_of(self, tokens: int, width: int) -> str:
        """The form of `expert_dispatch` that a step of ``tokens`` tokens of ``width`` uses."""
        return expert_dispatch.resolve(
            self.dispatch,
            mesh=self.mesh,
            rules=self.rules,
            tokens=tokens,
            width=width,
            dtype=self.dtype,
        )

    def facts(self, config: ModelConfig) -> dict[str, Sequence[Any]]:
        """What the kernels are told of a model on these devices, see `kernel_facts.of`."""
        return kernel_facts.of(
            config,
            mesh=self.mesh,
            rules=self.rules,
            dtype=self.dtype,
            kv_dtype=KV_DTYPES[self.kv_dtype],
            page_size=self.page_size,
        )

    @classmethod
    def make(
        cls,
        *,
        mesh: str | Mapping[str, int] | Mesh = "auto",
        strategy: str | Rules = "auto",
        dtype: str = "bfloat16",
        kv_cache_dtype: str = "auto",
        kernels: str | Mapping[str, str] = "auto",
        page_size: int = 64,
        buckets: Buckets | None = None,
        devices: Sequence | None = None,
        config: ModelConfig | None = None,
        quantization: str | None = None,
        dispatch: str = "auto",
    ) -> "Runtime":
        """Resolves every "auto" once, and logs what was decided and why.

        Args:
            mesh: as `sharding.make_mesh` takes it.
            strategy: a named set of rules, or rules.
            dtype: of activations: "bfloat16" (float32 on CPU, which is logged) or "float32".
            kv_cache_dtype: "auto" (as ``dtype``), "bfloat16", "float32", "fp8" or "int8".
            kernels: "auto", one implementation's name for every op, or op -> name.
            page_size: token positions per page, a power of two.
            buckets: shapes to compile for.
            devices: the devices of the mesh; default all.
            config: of the model that will run; without it "auto" takes the kernels that run
                anything, because the others have sizes they need.
            quantization: how its weights will be requantised on load, None for as they are.
            dispatch: "auto" (by the rule of `expert_dispatch.resolve`) or a form's name.

        Raises:
            ValueError: an unknown name, an impossible mesh, or a kernel that cannot run here.
        """
        mesh = sharding_lib.make_mesh(mesh, devices)
        rules = sharding_lib.strategy(strategy)
        for _, axes in rules.table:
            sharding_lib.ways(mesh, axes)  # raises where the mesh has no such axis
        device = Device.of(mesh.devices.flat[0])
        expert_dispatch.check(dispatch, mesh=mesh, rules=rules, platform=device.platform)
        if mesh.size > 1:
            log.info("dispatch: %s", expert_dispatch.described(dispatch))
        dtype = _activation_dtype(dtype, device.platform)
        if kv_cache_dtype == "auto":
            kv_cache_dtype = dtype
        if kv_cache_dtype not in KV_DTYPES:
            raise ValueError(
                f"kv_cache_dtype={kv_cache_dtype!r} is unknown; use auto, {', '.join(KV_DTYPES)}"
            )
        if page_size < 1 or page_size & (page_size - 1):
            raise ValueError(f"page_size={page_size} is not a power of two; use 16 to 256")
        facts = {}
        if config is not None:
            facts = kernel_facts.of(
                requantized(config, quantization),
                mesh=mesh,
                rules=rules,
                dtype=dtype,
                kv_dtype=KV_DTYPES[kv_cache_dtype],
                page_size=page_size,
            )
        return cls(
            mesh=mesh,
            rules=rules,
            kernels=_choose_kernels(kernels, device, facts),
            dtype=dtype,
            kv_dtype=kv_cache_dtype,
            page_size=page_size,
            buckets=buckets or Buckets(),
            dispatch=dispatch,
        )


def _activation_dtype(dtype: str, platform: str) -> str:
    if dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use one of {', '.join(ACTIVATION_DTYPES)}")
    if platform == "cpu" and dtype == "bfloat16":
        # Measured on two AVX2 cores: a bfloat16 matrix-vector product reads 1.2 GB/s, float32 29.
        log.info("dtype: float32 instead of bfloat16, for which this CPU has no fast matmul")
        return "float32"
    return dtype


def _choose_kernels(
    wanted: str | Mapping[str, str], device: Device, facts: Mapping[str, Sequence[Any]]
) -> tuple[tuple[str, str], ...]:
    table = dict.fromkeys(OPS, wanted) if isinstance(wanted, str) else dict(wanted)
    unknown = sorted(set(table) - set(OPS))
    if unknown:
        raise ValueError(f"kernels: {unknown} are no ops; the ops are {', '.join(OPS)}")
    chosen = []
    for op in OPS:
        choice = registry.choose(op, table.get(op, "auto"), device, facts.get(op))
        for name, reason in choice.reasons.items():
            # What is made for another platform is no news on this one.
            ours = registry.get(op, name).platform in (None, device.platform)
            log.log(logging.INFO if ours else logging.DEBUG, "%s: not %s: %s", op, name, reason)
        chosen.append((op, choice.name))
    log.info("kernels: %s", ", ".join(f"{op} {name}" for op, name in chosen))
    return tuple(chosen)
