"""Routed expert products on a Hopper GPU: weights stream once, past the few rows that need them.

In decode the weights are all that counts: 30B-A3B at 32 tokens reads 112 experts of 9.4 MB for 2.3
rows each. The tensor cores take 64 rows of a left operand at least, so the weights stand on the
left, transposed, and rows of x are the few columns on the right:

                   rows of x                        shared memory of one block
                  |  x^T  |  D                      stages x  weights [2, inner, 64]
          D       +-------+                                   rows    [rows, inner]
    64 | w[e]^T | |   y^T |   -> out [rows, 64]     2 x  results [rows, 64], up [64, rows]

A block per multiprocessor walks the list of row tiles (`gpu_items.py`, made by XLA) times column
tiles (`gpu_kernel.py`): one warpgroup copies, two multiply. Prefill is the same walk with tiles of
up to 128 rows. Experts without rows are never read. Gate and up are one item, and SwiGLU is applied
before anything leaves the block.

float8 weights are multiplied as bfloat16, which holds their values exactly, and the partial sum of
each 128 rows of w is scaled in float32 (`gpu_product.py`), so nothing is rounded before the end.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, registry
from pallas_kernels.device import Device
from pallas_kernels.ragged_dot import gpu_config
from pallas_kernels.ragged_dot.facts import Facts
from pallas_kernels.ragged_dot.gpu_config import COLUMNS, SCALE_BLOCK, WARPGROUPS, Config
from pallas_kernels.ragged_dot.gpu_items import Items
from pallas_kernels.ragged_dot.gpu_kernel import COPIES, kernel
from pallas_kernels.ragged_dot.gpu_refs import Refs

_FIELDS = [field.name for field in dataclasses.fields(Refs)]
_SCALE, _UP = _FIELDS.index("scale"), _FIELDS.index("up")
OUT_DTYPES = ("bfloat16", "float32")


def supports(device: Device, facts: Facts) -> str | None:
    """Why the kernel cannot run these products on this device, or None."""
    try:
        hopper.info(device.kind)
    except ValueError as error:
        return str(error)
    if facts.x_dtype != "bfloat16":
        return f"rows are {facts.x_dtype}; it takes bfloat16"
    if facts.w_dtype not in gpu_config.MOST_ROWS:
        return f"weights are {facts.w_dtype}; it takes {' or '.join(gpu_config.MOST_ROWS)}"
    if facts.out_dtype not in OUT_DTYPES:
        return f"results are {facts.out_dtype}; it gives {' or '.join(OUT_DTYPES)}"
    width = gpu_config.tile_columns(facts)
    if facts.inner % COLUMNS or facts.outer % width:
        return f"widths {facts.inner} and {facts.outer} are not multiples of {COLUMNS} and {width}"
    return _blocks_reason(facts)


def _blocks_reason(facts: Facts) -> str | None:
    if facts.blocks is None:
        return "weights are float8 without scales" if facts.w_dtype != "bfloat16" else None
    if facts.w_dtype == "bfloat16":
        return "weights are bfloat16 with scales; it takes those of float8 alone"
    wanted = (*(1 for _ in facts.w_shape[:-2]), SCALE_BLOCK, SCALE_BLOCK)
    if facts.blocks != wanted:
        return f"blocks {facts.blocks}; it takes {wanted}"
    if facts.scale_dtype not in OUT_DTYPES:
        return f"scales are {facts.scale_dtype}; it takes {' or '.join(OUT_DTYPES)}"
    if facts.inner % SCALE_BLOCK:
        return f"width {facts.inner} is not a multiple of the {SCALE_BLOCK} rows of a scale"
    return None


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
):
    """`pallas_kernels.ragged_dot`, on checked arguments; ``config`` overrides the tile sizes."""
    device = Device.current()
    facts = Facts.of(x_MD, w, scale, blocks, activation, out_dtype)
    M, total = x_MD.shape[0], group_sizes.shape[0]
    if M == 0:
        return jnp.zeros((0, facts.outer), out_dtype)
    config = config or gpu_config.choose(facts, M, total, device)
    items = Items.of(group_sizes, first_expert, facts.experts, rows=config.rows, M=M)
    # No copy may be larger than what it is taken from.
    x_MD = jnp.pad(x_MD, ((0, max(0, config.rows - M)), (0, 0)))
    if activation is None:
        w, scale = w[:, None], None if scale is None else scale[:, None]
    inputs = [items.expert_I, items.first_I, items.end_I]
    inputs += [items.until_E, items.start_E, items.end_E, x_MD, w]
    call = _call(facts, config, M)
    return call(*inputs) if scale is None else call(*inputs, scale)


def _call(facts: Facts, config: Config, M: int):
    def body(*refs: Any):
        # Kernels take no None: scales and SwiGLU's buffers are in the list only where they exist.
        given = list(refs)
        if facts.blocks is None:
            given.insert(_SCALE, None)
        if facts.activation is None:
            given.insert(_UP, None)
            given += [None, None]
        kernel(Refs(*given), config)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((M, facts.outer), facts.out_dtype),
        scratch_types=_scratch(facts, config),
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=f"ragged_dot_{facts.w_dtype}",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def _scratch(facts: Facts, config: Config) -> list:
    rows, inner, stages = config.rows, config.inner, config.stages
    barrier = functools.partial(plgpu.Barrier, num_barriers=stages)
    scratch = [
        plgpu.SMEM((stages, rows, inner), facts.x_dtype, transforms=_swizzled(facts.x_dtype)),
        plgpu.SMEM(
            (stages, WARPGROUPS, inner, COLUMNS),
            facts.w_dtype,
            transforms=_swizzled(facts.w_dtype),
        ),
        plgpu.SMEM((WARPGROUPS, rows, COLUMNS), facts.out_dtype),
    ]
    if facts.activation:
        swizzled = _swizzled("float32", min(rows, 32))
        scratch.append(plgpu.SMEM((COLUMNS, rows), jnp.float32, transforms=swizzled))
    scratch += [barrier(num_arrivals=COPIES), barrier(num_arrivals=WARPGROUPS)]
    if facts.activation:
        scratch += [plgpu.Barrier(num_arrivals=1), plgpu.Barrier(num_arrivals=1)]
    return scratch


def _swizzled(dtype, width: int = COLUMNS) -> tuple:
    """Rows of ``width`` in an order that threads and tensor cores read without bank conflicts."""
    swizzle = width * jnp.dtype(dtype).itemsize
    # The base class declares as abstract what these do not need here.
    tiled = plgpu.TilingTransform((8, width))  # pyright: ignore[reportAbstractUsage]
    return tiled, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


IMPL = registry.Impl("ragged_dot", "gpu", "gpu", supports, ragged_dot)
