"""Tile sizes of the TPU kernel, and the memory they take.

Knows facts, row counts and a chip's figures; knows no array. `choose` takes what was measured
(`tuning.py`) or else follows from four figures of the chip and three rules:

- **rows**: a tile as high as two mean groups, so that most groups are one tile: 16 rows (the least
  that HBM can be cut into) in decode, at most 256, where the matrix unit is 80 % busy.
- **columns, decode**: the fewest whose weights are 2 MiB. Copies of that size reach the full
  bandwidth; smaller ones shorten the only times in which one of copy and arithmetic waits for the
  other: the first copy and the last product of a call.
- **columns, prefill**: as many as fit, because rows are read again for each column tile. At most
  3 Mi weights (a whole pair of the 30B model): the compiler unrolls a tile, and takes its time.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.device import Device, tpu_info
from pallas_kernels.ragged_dot.facts import Facts
from pallas_kernels.ragged_dot.tpu_kernel import GRANULE, WEIGHT_BUFFERS, ZERO_GRANULES

LANES = 128
MOST_ROWS = 256
DECODE_ROWS = 32
DECODE_CHUNK_BYTES = 2 * 2**20
MOST_CHUNK_WEIGHTS = 3 * 2**20
# The rest is the compiler's: values that do not fit into registers, and its own scratch.
VMEM_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes.

    Attributes:
        rows: of a row tile, a multiple of 16.
        columns: of a column tile; it divides the columns of a core.
    """

    rows: int
    columns: int


def cores(facts: Facts, info: pltpu.TpuInfo) -> int:
    """How many cores of a device share the columns: all, where each gets whole tiles of 128."""
    return info.num_cores if facts.outer % (info.num_cores * LANES) == 0 else 1


def key(facts: Facts, rows: int, total: int) -> str:
    """What a tuned entry is found by: dtypes, matrix, and the mean group as a power of two."""
    pair = "2x" if facts.activation else ""
    mean = tuning.bucket(-(-rows // total))
    return f"{facts.x_dtype} {facts.w_dtype} {pair}{facts.inner}x{facts.outer} mean<={mean}"


def choose(facts: Facts, rows: int, total: int, device: Device) -> Config:
    """Tile sizes for ``rows`` rows over ``total`` experts.

    Raises:
        ValueError: a tuned entry does not fit the device; nothing fits.
    """
    info = tpu_info(device.kind)
    tuned = tuning.lookup("ragged_dot", device, key(facts, rows, total))
    if tuned is not None:
        config = Config(**tuned)
        if not fits(facts, config, info):
            raise ValueError(f"ragged_dot: the tuned {config} does not fit {device.kind}")
        return config
    found = _by_rule(facts, rows, total, info)
    if found is None:
        raise ValueError(f"ragged_dot: {facts} does not fit the VMEM of {device.kind}")
    return found


def _by_rule(facts: Facts, rows: int, total: int, info: pltpu.TpuInfo) -> Config | None:
    height = tuning.bucket(-(-2 * rows // total))
    height = min(max(height, GRANULE), MOST_ROWS)
    fitting = [c for c in widths(facts, info) if fits(facts, Config(height, c), info)]
    if not fitting:
        return None
    per_column = math.prod(facts.w_shape[1:-1])
    if height <= DECODE_ROWS:
        enough = [c for c in fitting if _w_bytes(facts, c) >= DECODE_CHUNK_BYTES]
        return Config(height, enough[0] if enough else fitting[-1])
    few = [c for c in fitting if c * per_column <= MOST_CHUNK_WEIGHTS]
    return Config(height, few[-1] if few else fitting[0])


def candidates(facts: Facts, rows: int, total: int, device: Device) -> list[Config]:
    """Sizes worth measuring, the rule's first: other heights around its own, and all widths.

    Raises:
        ValueError: nothing fits.
    """
    info = tpu_info(device.kind)
    rule = _by_rule(facts, rows, total, info)
    if rule is None:
        raise ValueError(f"ragged_dot: {facts} does not fit the VMEM of {device.kind}")
    near = {rule.rows // 2, rule.rows, rule.rows * 2}
    heights = sorted(h for h in near if GRANULE <= h <= MOST_ROWS)
    found = [Config(h, c) for h in heights for c in widths(facts, info)]
    most = MOST_CHUNK_WEIGHTS / math.prod(facts.w_shape[1:-1])
    tried = [c for c in found if fits(facts, c, info) and c.columns <= max(most, rule.columns)]
    return list(dict.fromkeys([rule, *tried]))


def widths(facts: Facts, info: pltpu.TpuInfo) -> list[int]:
    """The possible widths of a column tile, ascending: multiples of 128 that divide a core's."""
    own = facts.outer // cores(facts, info)
    return [c for c in range(LANES, own + 1, LANES) if own % c == 0]


def fits(facts: Facts, config: Config, info: pltpu.TpuInfo) -> bool:
    """Whether the buffers leave the compiler its share of VMEM."""
    return vmem_bytes(facts, config, info) <= VMEM_SHARE * info.vmem_capacity_bytes


def vmem_bytes(facts: Facts, config: Config, info: pltpu.TpuInfo) -> int:
    """What the kernel's buffers take, and the float32 results of one tile."""
    size = lambda dtype: jnp.dtype(dtype).itemsize
    tiles = facts.outer // cores(facts, info) // config.columns
    inner, columns = _padded(facts.inner), _padded(config.columns)
    pair = 2 if facts.activation else 1
    out = size(facts.out_dtype)
    used = WEIGHT_BUFFERS * pair * inner * columns * size(facts.w_dtype)
    used += 2 * config.rows * inner * size(facts.x_dtype)
    used += 2 * config.rows * columns * out
    used += (tiles + ZERO_GRANULES) * GRANULE * columns * out
    used += 2 * pair * config.rows * columns * 4
    if facts.scale_shape is not None:
        rows, across = facts.scale_shape[-2:]
        used += 2 * pair * -(-rows // 8) * 8 * _padded(across) * 4
    return used


def _w_bytes(facts: Facts, columns: int) -> int:
    return math.prod(facts.w_shape[1:-1]) * columns * jnp.dtype(facts.w_dtype).itemsize


def _padded(n: int) -> int:
    return -(-n // LANES) * LANES
