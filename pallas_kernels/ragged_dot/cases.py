"""Named real shapes of `ragged_dot`: one list for tests, benchmarks and tuning.

Knows the published models' expert sizes, how strategies cut them and how weights are stored; knows
no checkpoint and no weights.
"""

import dataclasses
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import registry
from pallas_kernels.device import Device, tpu_info
from pallas_kernels.program import Program, Refused, Tunable
from pallas_kernels.ragged_dot import gpu, gpu_config, ragged_dot, tpu, tpu_config
from pallas_kernels.ragged_dot.facts import Facts
from pallas_kernels.ragged_dot.tpu_kernel import GRANULE

# Model: width D, hidden width F of an expert, experts R, experts per token A.
MODELS = {
    "30B-A3B": (2048, 768, 128, 8),
    "235B-A22B": (4096, 1536, 128, 8),
    "480B-A35B": (6144, 2560, 160, 8),
    # The random model that the CPU benchmark times beside transformers.
    "cpu-bench": (1024, 256, 64, 8),
}
DECODE_TOKENS = (1, 8, 32, 128, 256)
PREFILL_TOKENS = (512, 2048, 8192)
# Shard: ways the experts are split, ways each expert's F is split.
SHARDS = {
    "whole": (1, 1),
    "ep4": (4, 1),
    "ep8": (8, 1),
    "ep16": (16, 1),
    "tp2": (1, 2),
    "tp4": (1, 4),
    "tp8": (1, 8),
    "ep2tp4": (2, 4),
    "ep8tp4": (8, 4),
}
# The published models, and the shards in which slices hold them: the large ones are never whole.
PUBLISHED = {
    "30B-A3B": ("whole", "ep4", "ep8", "tp2", "tp4", "ep2tp4"),
    "235B-A22B": ("ep4", "ep8", "ep16", "tp4", "ep8tp4"),
    "480B-A35B": ("ep8", "ep16", "tp8", "ep8tp4"),
}
# Of the weights; in "w8a8" the rows are rounded to 8 bits, too, which is for prefill.
FORMS = ("bf16", "fp8", "int8", "w8a8")
KERNELS = {"tpu": tpu, "gpu": gpu}
CONFIGS = {"tpu": tpu_config, "gpu": gpu_config}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: x [rows, inner] times w [experts, (2,) inner, outer], routed over ``total``."""

    name: str
    rows: int
    inner: int
    outer: int
    experts: int
    total: int
    activation: str | None

    @property
    def w_shape(self) -> tuple[int, ...]:
        """Shape of w."""
        return self.facts("bf16").w_shape

    @property
    def active(self) -> float:
        """Experts held here that have rows, if the router is uniform: the mean."""
        return self.experts * (1 - (1 - 1 / self.total) ** self.rows)

    def facts(self, form: str) -> Facts:
        """As one device would be told; weights in one of `FORMS`, bfloat16 rows.

        "fp8" has the published checkpoints' blocks of 128x128, the int8 ones a scale per channel.
        """
        own = Facts(
            self.experts,
            self.inner,
            self.outer,
            self.activation,
            x_dtype="bfloat16",
            w_dtype={"bf16": "bfloat16", "fp8": "float8_e4m3fn"}.get(form, "int8"),
            out_dtype="bfloat16" if self.activation else "float32",
        )
        if form == "bf16":
            return own
        last = (128, 128) if form == "fp8" else (self.inner, 1)
        blocks = (1, *((1,) if self.activation else ()), *last)
        scale = "bfloat16" if form == "fp8" else "float32"
        return dataclasses.replace(own, blocks=blocks, scale_dtype=scale)


def cases(model: str, shard: str = "whole") -> Iterator[Case]:
    """Every decode and prefill size of a model's two expert products, as one shard sees them.

    Args:
        model: a key of `MODELS`.
        shard: a key of `SHARDS`.
    """
    D, F, R, A = MODELS[model]
    expert_ways, hidden_ways = SHARDS[shard]
    E, F = R // expert_ways, F // hidden_ways
    kinds = [("decode", t) for t in DECODE_TOKENS] + [("prefill", t) for t in PREFILL_TOKENS]
    for kind, tokens in kinds:
        name = f"{model}/{shard}/{kind}-{tokens}"
        yield Case(f"{name}/gate_up", tokens * A, D, F, E, R, "swiglu")
        yield Case(f"{name}/down", tokens * A, F, D, E, R, None)


def programs(device: Device) -> Iterator[Program]:
    """Every case of the published models that the device's kernel supports, in every form."""
    for case, form, reason in _calls(device):
        if reason is None:
            yield _program(case, form, device)


def refused(device: Device) -> Iterator[Refused]:
    """Those that it does not support."""
    for case, form, reason in _calls(device):
        if reason is not None:
            yield Refused(_name(case, form), reason)


def _calls(device: Device) -> Iterator[tuple[Case, str, str | None]]:
    """Every case in every form, and why the device's kernel does not take it."""
    for model, shards in PUBLISHED.items():
        for case in (case for shard in shards for case in cases(model, shard)):
            for form in FORMS:
                impl = _impl(form, device)
                if impl is not None and (form != "w8a8" or "/prefill-" in case.name):
                    yield case, form, impl.supports(device, case.facts(form))


def _impl(form: str, device: Device) -> registry.Impl | None:
    """What a form runs by on a device."""
    if form == "w8a8":
        return tpu.W8A8 if device.platform == "tpu" else None
    return KERNELS[device.platform].IMPL if device.platform in KERNELS else None


def _name(case: Case, form: str) -> str:
    return f"ragged_dot/{case.name}/{form}"


def _program(case: Case, form: str, device: Device) -> Program:
    facts, impl = case.facts(form), _impl(form, device)
    assert impl is not None
    spec = jax.ShapeDtypeStruct
    scale = None if facts.scale_shape is None else spec(facts.scale_shape, facts.scale_dtype)
    args = (
        spec((case.rows, case.inner), jnp.bfloat16),
        spec(facts.w_shape, facts.w_dtype),
        spec((case.total,), jnp.int32),
        scale,
    )
    call = functools.partial(
        ragged_dot, blocks=facts.blocks, activation=case.activation, out_dtype=facts.out_dtype
    )
    weights = case.active * math.prod(facts.w_shape[1:]) * jnp.dtype(facts.w_dtype).itemsize
    own = math.ceil(case.rows * case.experts / case.total)
    # Rows of other shards are written too, as zeros.
    written = case.rows * case.outer * jnp.dtype(facts.out_dtype).itemsize
    # Only a TPU's compiler tells a schedule, which needs trips; elsewhere every row is read once.
    trips, read = _walk(case, facts, device) if device.platform == "tpu" else ((), float(own))
    baselines = {"xla": lambda x, w, sizes, scale: call(x, w, sizes, scale=scale, impl="xla")}
    # They know no scales and no shards, and gate and up would have to be copied apart for them.
    if facts.blocks is None and case.activation is None and case.experts == case.total:
        baselines |= _libraries()
    return Program(
        _name(case, form),
        lambda x, w, sizes, scale: call(x, w, sizes, scale=scale, impl=impl.name),
        args,
        make=functools.partial(_make, case, args),
        moved=weights + own * case.inner * 2 + written,
        # Every chip that multiplies int8 does two such products in the time of one in bfloat16.
        flops=(1 if form == "w8a8" else 2) * own * math.prod(facts.w_shape[1:]),
        copied=weights + read * case.inner * 2 + written,
        trips=trips,
        baselines=baselines,
        tunable=_tunable(case, facts, device) if form != "w8a8" else None,
    )


def _tunable(case: Case, facts: Facts, device: Device) -> Tunable:
    kernel, sizes = KERNELS[device.platform], CONFIGS[device.platform]

    def with_tiles(tiles):
        return lambda x, w, groups, scale: kernel.ragged_dot(
            x,
            w,
            groups,
            scale=scale,
            blocks=facts.blocks,
            activation=facts.activation,
            first_expert=jnp.int32(0),
            out_dtype=facts.out_dtype,
            config=sizes.Config(**tiles),
        )

    return Tunable(
        sizes.key(facts, case.rows, case.total),
        tuple(map(dataclasses.asdict, sizes.candidates(facts, case.rows, case.total, device))),
        with_tiles,
    )


def _libraries() -> dict[str, Callable[..., jax.Array]]:
    """The plain product by others: JAX itself, and tokamax if it is installed."""
    products: dict[str, Callable[..., jax.Array]] = {"lax": lax.ragged_dot}
    if importlib.util.find_spec("tokamax") is not None:
        products["tokamax"] = importlib.import_module("tokamax").ragged_dot

    def call(product, x, w, sizes, scale):
        return product(x, w, sizes, preferred_element_type=jnp.float32)

    return {name: functools.partial(call, product) for name, product in products.items()}


def _walk(case: Case, facts: Facts, device: Device) -> tuple[tuple[float, ...], float]:
    """How often the kernel's loops run under uniform routing, and how many rows it reads."""
    config = tpu_config.choose(facts, case.rows, case.total, device)
    tiles = case.outer // tpu_config.cores(facts, tpu_info(device.kind)) // config.columns
    group = case.rows * case.experts / case.total / case.active
    # A group of n rows that starts anywhere touches (n - 1) / 16 + 1 granules on average.
    read = (group - 1) + GRANULE
    # The last row tile of a group is half full on average.
    row_tiles = max(1.0, read / config.rows + (1 - GRANULE / config.rows) / 2)
    if row_tiles > 1:
        read *= tiles
    return (case.active, *((tiles,) if tiles > 1 else ()), row_tiles), case.active * read


def _make(case: Case, args, seed: int) -> tuple:
    """Random rows, weights and scales, and groups as a uniform router fills them."""
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(case.rows, [1 / case.total] * case.total).astype(np.int32)
    keys = iter(jax.random.split(jax.random.key(seed), len(args)))

    def one(spec):
        drawn = jax.random.normal(next(keys), spec.shape, jnp.bfloat16)
        return (drawn * (32 if spec.dtype == jnp.int8 else 1)).astype(spec.dtype)

    x, w, _, scale = args
    return one(x), one(w), jnp.asarray(sizes), None if scale is None else one(scale)
