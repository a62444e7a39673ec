"""Routed expert products on a TPU: weights stream once, past the few rows that need them.

In decode the weights are all that counts: 30B-A3B at 32 tokens reads 112 experts of 9.4 MB for 2.3
rows each. So a call walks the experts that have rows, and for each its weights, tile by tile,
while the copies of the next two tiles are under way:

             columns ->                            VMEM   3 x  weights [P, D, columns]
    w[e]   |  0  |  1  |  2  |                            2 x  rows in  [rows, D]
    D      |     |     |     |                            2 x  rows out [rows, columns]
           |     |     |     |                            and zeros, one granule per tile, scales
    rows |x|->| y |   | y |
                                                   SMEM   the list of groups (`tpu_groups.py`)

Gate and up are one tile (P = 2); SwiGLU is applied before anything leaves VMEM. Rows are padded to
granules of 16 and no further (`tpu_kernel.py`); `tpu_config.py` chooses tiles. A device of two
cores (v5p) gives each half of the columns.

Quantised weights are multiplied as they are stored, float8 by the matrix unit itself, and each
partial sum over a block of rows is scaled in float32: what XLA's form for few rows does, and exact,
where dequantising first would round every weight to bfloat16. The price is paid in prefill on v6e
and v7x, whose matrix units are 256 deep and half idle with blocks of 128.

`tpu_w8a8` is the same walk for int8 weights, and rounds each row to int8 as it arrives: v5e, v5p
and v6e multiply int8 by int8 at twice the rate of bfloat16, which shortens prefill. It is another
result, off by up to 1/254 of a row's largest number in each of its numbers, whatever else is in the
batch: so it must be asked for by name, and is what it is in decode, too.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import registry
from pallas_kernels.device import Device, tpu_info
from pallas_kernels.ragged_dot import tpu_config
from pallas_kernels.ragged_dot.facts import Facts
from pallas_kernels.ragged_dot.tpu_config import Config
from pallas_kernels.ragged_dot.tpu_groups import Groups
from pallas_kernels.ragged_dot.tpu_kernel import GRANULE, WEIGHT_BUFFERS, ZERO_GRANULES, kernel

X_DTYPES = ("bfloat16", "float32")
NARROW = ("float8_e4m3fn", "int8")
# Rows are cut into lanes of 128; half of them is the least that is not mostly padding.
INNER_WIDTH = 64


def supports(device: Device, facts: Facts) -> str | None:
    """Why the kernel cannot run these products on this device, or None."""
    try:
        info = tpu_info(device.kind)
    except ValueError as error:
        return str(error)
    if info.generation < 5:
        return f"{device.kind} has too little VMEM; it needs TPU v5e, v5p, v6e or v7x"
    if facts.x_dtype not in X_DTYPES:
        return f"rows are {facts.x_dtype}; it takes {' or '.join(X_DTYPES)}"
    if facts.w_dtype not in (facts.x_dtype, *NARROW):
        return f"weights are {facts.w_dtype}, rows {facts.x_dtype}; use one dtype for both"
    if facts.inner % INNER_WIDTH:
        return f"width {facts.inner} of the rows is not a multiple of {INNER_WIDTH}"
    if facts.outer % tpu_config.LANES:
        return (
            f"width {facts.outer} of the results is not a multiple of {tpu_config.LANES}: XLA "
            "keeps such matrices transposed, and would copy all of them for every call"
        )
    return _blocks_reason(facts) or _memory_reason(facts, info)


def supports_w8a8(device: Device, facts: Facts) -> str | None:
    """Why the kernel cannot multiply rounded rows on this device, or None."""
    reason = supports(device, facts)
    if reason is not None:
        return reason
    if facts.w_dtype != "int8":
        return f"weights are {facts.w_dtype}; it takes int8 (quantization='int8')"
    if not tpu_info(device.kind).int8_ops_per_second:
        return f"{device.kind} has no matrix unit for int8; v5e, v5p and v6e have"
    return None


def _blocks_reason(facts: Facts) -> str | None:
    if facts.w_dtype in NARROW and facts.blocks is None:
        return f"weights are {facts.w_dtype} without scales"
    if facts.blocks is None:
        return None
    rows, columns = facts.blocks[-2:]
    if any(block > 1 for block in facts.blocks[:-2]):
        return f"scales are shared by experts, blocks {facts.blocks}; use one expert per block"
    if rows < facts.inner and (rows % 128 or facts.inner % rows):
        return f"blocks of {rows} rows; use a multiple of 128 that divides {facts.inner}"
    if columns > 1 and columns % 128:
        return f"blocks of {columns} columns; use 1 or a multiple of 128"
    return None


def _memory_reason(facts: Facts, info: pltpu.TpuInfo) -> str | None:
    least = Config(tpu_config.MOST_ROWS, tpu_config.widths(facts, info)[0])
    if tpu_config.fits(facts, least, info):
        return None
    need, have = tpu_config.vmem_bytes(facts, least, info), info.vmem_capacity_bytes
    return f"its smallest tiles take {need / 2**20:.0f} MiB of {have / 2**20:.0f} MiB of VMEM"


def ragged_dot(
    x_MD,
    w,
    group_sizes,
    *,
    scale,
    blocks,
    activation,
    first_expert,
    out_dtype,
    config: Config | None = None,
    round_rows: bool = False,
):
    """`pallas_kernels.ragged_dot`, on checked arguments.

    Args:
        config: overrides the tile sizes.
        round_rows: what `tpu_w8a8` does.
    """
    device = Device.current()
    facts = Facts.of(x_MD, w, scale, blocks, activation, out_dtype)
    M, total = x_MD.shape[0], group_sizes.shape[0]
    if M == 0:
        return jnp.zeros((0, facts.outer), out_dtype)
    config = config or tpu_config.choose(facts, M, total, device)
    groups = Groups.of(group_sizes, first_expert, facts.experts)
    x_MD = jnp.pad(x_MD, ((0, -M % GRANULE), (0, 0)))
    if activation is None:
        w, scale = w[:, None], None if scale is None else scale[:, None]
    x = x_MD.reshape(-1, GRANULE, facts.inner)
    out = _call(facts, config, x.shape[0], tpu_info(device.kind), round_rows)(
        groups.count, groups.expert_E, groups.start_E, groups.end_E, x, w, scale
    )
    return out.reshape(-1, facts.outer)[:M]


def _call(facts: Facts, config: Config, granules: int, info: pltpu.TpuInfo, round_rows: bool):
    cores = tpu_config.cores(facts, info)
    blocks = None
    if facts.blocks is not None:
        blocks = (min(facts.blocks[-2], facts.inner), facts.blocks[-1])
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(kernel, blocks=blocks, round_rows=round_rows),
        name=f"ragged_dot_{facts.w_dtype}{'_w8a8' if round_rows else ''}",
        out_shape=jax.ShapeDtypeStruct((granules, GRANULE, facts.outer), facts.out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(cores,),
            in_specs=[anywhere, anywhere, None if blocks is None else anywhere],
            out_specs=anywhere,
            scratch_shapes=_scratch(facts, config, cores),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit(facts, config, info)
        ),
        cost_estimate=_cost(facts, granules * GRANULE),
    )


def vmem_limit(facts: Facts, config: Config, info: pltpu.TpuInfo) -> int:
    """Bytes of VMEM that a call asks for: its buffers, and the compiler's share."""
    return tpu_config.vmem_bytes(facts, config, info) + spare(info)


def spare(info: pltpu.TpuInfo) -> int:
    """Bytes of VMEM that are left to the compiler."""
    return int((1 - tpu_config.VMEM_SHARE) * info.vmem_capacity_bytes)


def _scratch(facts: Facts, config: Config, cores: int) -> list:
    pair = 2 if facts.activation else 1
    height, columns = config.rows // GRANULE, config.columns
    tiles = facts.outer // cores // columns
    scale = None
    if facts.scale_shape is not None and facts.scale_dtype is not None:
        scale = pltpu.VMEM((2, pair, *facts.scale_shape[-2:]), facts.scale_dtype)
    return [
        pltpu.VMEM((2, height, GRANULE, facts.inner), facts.x_dtype),
        pltpu.VMEM((WEIGHT_BUFFERS, pair, facts.inner, columns), facts.w_dtype),
        scale,
        pltpu.VMEM((2, height, GRANULE, columns), facts.out_dtype),
        pltpu.VMEM((tiles, GRANULE, columns), facts.out_dtype),
        pltpu.VMEM((ZERO_GRANULES, GRANULE, columns), facts.out_dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((WEIGHT_BUFFERS,)),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA,
        pltpu.SMEM((2,), jnp.int32),
    ]


def _cost(facts: Facts, rows: int) -> pl.CostEstimate:
    """If rows spread over as many experts as they can."""
    weights = facts.inner * facts.outer * (2 if facts.activation else 1)
    moved = min(facts.experts, rows) * weights * jnp.dtype(facts.w_dtype).itemsize
    moved += rows * facts.inner * jnp.dtype(facts.x_dtype).itemsize
    moved += rows * facts.outer * jnp.dtype(facts.out_dtype).itemsize
    return pl.CostEstimate(
        flops=2 * rows * weights,
        bytes_accessed=moved,
        transcendentals=rows * facts.outer if facts.activation else 0,
    )


IMPL = registry.Impl("ragged_dot", "tpu", "tpu", supports, ragged_dot)
W8A8 = registry.Impl(
    "ragged_dot",
    "tpu_w8a8",
    "tpu",
    supports_w8a8,
    functools.partial(ragged_dot, round_rows=True),
)
