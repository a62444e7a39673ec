"""Tile sizes of the Hopper kernel, and the shared memory they take.

Knows facts, row counts and a chip's figures; knows no array. `choose` takes what was measured
(`tuning.py`) or else follows from the shared memory and these rules:

- **rows**: a tile as high as one and a half mean groups, so that most groups are one tile: 8 rows
  (the least that a matrix product of the tensor cores has columns for) in decode. At most 128 for
  bfloat16 weights; at most 64 for float8, whose sums are held twice in registers.
- **inner**, rows of the weights in one stage: 128 while tiles are low, because longer copies need
  fewer of them; 64 when rows take as much room as weights. For float8 128 always: the rows that
  share a scale.
- **blocks**: one per multiprocessor, because each takes its whole shared memory.
- **stages**: as many as fit. The bytes under way are what hides the latency of memory: to read
  4.3 TB/s at a latency of 1 us takes 33 KB in each of 132 multiprocessors; a ring has 130 to 220.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import hopper, tuning
from pallas_kernels.device import Device
from pallas_kernels.ragged_dot.facts import Facts

# Columns of one warpgroup: the height of a product, which has the weights on its left.
COLUMNS = 64
WARPGROUPS = 2
LEAST_ROWS = 8
MOST_ROWS = {"bfloat16": 128, "float8_e4m3fn": 64}
LOW_ROWS = 32
SCALE_BLOCK = 128
MOST_STAGES = 16
# Barriers, and alignment of each buffer.
SPARE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes.

    Attributes:
        rows: of a row tile: a power of two, from 8 on.
        inner: rows of the weights in one stage: 64 or 128, a divisor of D.
        stages: of the ring.
        blocks: that share the items.
    """

    rows: int
    inner: int
    stages: int
    blocks: int


def tile_columns(facts: Facts) -> int:
    """Columns of the result in one item: gate and up have a warpgroup each, or two halves have."""
    return COLUMNS if facts.activation else COLUMNS * WARPGROUPS


def key(facts: Facts, rows: int, total: int) -> str:
    """What a tuned entry is found by: dtypes, matrix, and the mean group as a power of two."""
    pair = "2x" if facts.activation else ""
    mean = tuning.bucket(-(-rows // total))
    return f"{facts.x_dtype} {facts.w_dtype} {pair}{facts.inner}x{facts.outer} mean<={mean}"


def choose(facts: Facts, rows: int, total: int, device: Device) -> Config:
    """Tile sizes for ``rows`` rows over ``total`` experts.

    Raises:
        ValueError: a tuned entry does not fit the device.
    """
    info = hopper.info(device.kind)
    tuned = tuning.lookup("ragged_dot", device, key(facts, rows, total))
    if tuned is None:
        return _by_rule(facts, rows, total, info)
    config = Config(**tuned)
    if shared_bytes(facts, config) > info.shared_bytes:
        raise ValueError(f"ragged_dot: the tuned {config} does not fit {device.kind}")
    return config


def _by_rule(facts: Facts, rows: int, total: int, info: hopper.Info) -> Config:
    height = tuning.bucket(-(-3 * rows // (2 * total)))
    height = min(max(height, LEAST_ROWS), MOST_ROWS[facts.w_dtype])
    scaled = facts.blocks is not None
    inner = 128 if scaled or (height <= LOW_ROWS and facts.inner % 128 == 0) else 64
    one, two = (Config(height, inner, n, info.multiprocessors) for n in (1, 2))
    used = shared_bytes(facts, one)
    stages = 1 + (info.shared_bytes - used) // (shared_bytes(facts, two) - used)
    return dataclasses.replace(one, stages=min(stages, MOST_STAGES))


def candidates(facts: Facts, rows: int, total: int, device: Device) -> list[Config]:
    """Sizes worth measuring, the rule's first: other heights, other depths, fewer stages."""
    info = hopper.info(device.kind)
    rule = _by_rule(facts, rows, total, info)
    heights = {h for h in (rule.rows // 2, rule.rows, rule.rows * 2) if h >= LEAST_ROWS}
    inners = [SCALE_BLOCK] if facts.blocks else [n for n in (64, 128) if facts.inner % n == 0]
    stages = sorted({max(2, rule.stages // 2), max(2, rule.stages * 3 // 4), rule.stages})
    found = [
        Config(height, inner, n, rule.blocks)
        for height in sorted(heights)
        if height <= MOST_ROWS[facts.w_dtype]
        for inner in inners
        for n in stages
    ]
    fitting = [each for each in found if shared_bytes(facts, each) <= info.shared_bytes]
    return list(dict.fromkeys([rule, *fitting]))


def shared_bytes(facts: Facts, config: Config) -> int:
    """What the kernel's buffers take."""
    size = lambda dtype: jnp.dtype(dtype).itemsize
    weights = WARPGROUPS * config.inner * COLUMNS * size(facts.w_dtype)
    used = config.stages * (weights + config.rows * config.inner * size(facts.x_dtype))
    used += WARPGROUPS * config.rows * COLUMNS * size(facts.out_dtype)
    if facts.activation:
        used += config.rows * COLUMNS * 4
    return used + SPARE_BYTES
