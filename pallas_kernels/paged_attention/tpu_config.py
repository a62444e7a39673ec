"""Sizes of the TPU kernel's steps and tiles.

Knows facts; knows no array. `choose` takes what was measured (`tuning.py`) or else `RULE`.
"""

import dataclasses

from pallas_kernels import tuning
from pallas_kernels.device import Device
from pallas_kernels.paged_attention.facts import Facts


@dataclasses.dataclass(frozen=True)
class Config:
    """Powers of two.

    Attributes:
        block: key positions of an item: one lane of scores each, so a multiple of 128.
        longest: of short tiles of few heads, which take longer items than ``block``, because
            starting the copies of an item costs the same whatever it brings.
        step: key positions times kv heads that a step of short tiles attends. Items side by side
            hide each other's reductions, so more is better until registers run out.
        tall_rows: query rows of a kv head in a tall tile.
    """

    block: int
    longest: int
    step: int
    tall_rows: int


RULE = Config(block=512, longest=1024, step=4096, tall_rows=512)


def key(facts: Facts, decode: bool) -> str:
    """What a tuned entry is found by."""
    heads = f"{facts.query_heads}/{facts.kv_heads}x{facts.head_dim}"
    what = "decode" if decode else "mixed"
    return f"{facts.dtype} {facts.kv_dtype} {heads} page {facts.page_size} {what}"


def choose(facts: Facts, decode: bool, device: Device) -> Config:
    """Sizes for rows of one token each (``decode``) or of any length."""
    tuned = tuning.lookup("paged_attention", device, key(facts, decode))
    return RULE if tuned is None else Config(**tuned)


def candidates(facts: Facts, decode: bool) -> list[Config]:
    """Sizes worth measuring, the rule's first: what decode uses, or what longer rows use."""
    if decode:
        found = [
            dataclasses.replace(RULE, longest=longest, step=step)
            for longest in (512, 1024)
            for step in (2048, 4096, 8192)
        ]
    else:
        found = [
            dataclasses.replace(RULE, block=block, tall_rows=rows)
            for block in (256, 512, 1024)
            for rows in (256, 512, 1024)
            if block >= facts.page_size
        ]
    return list(dict.fromkeys([RULE, *found]))
