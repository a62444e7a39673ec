"""The TPU kernel of paged attention on CPU: values, writes and races, under Pallas' interpreter.

The interpreter runs copies late and out of order, and its race detector sees two of them touch the
same bytes. It cannot reinterpret arrays, so the register tricks of `tpu_packing` are tested alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import paged_batches as batches
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from paged_batches import DECODE, MIXED, Shape, make

from pallas_kernels.device import Device
from pallas_kernels.paged_attention import Facts, PagedOut, schedule, tpu, tpu_packing, tpu_walk, xla

WIDE = functools.partial(Shape, N=8, K=2, H=128, page=16)
# Contexts that end around pages of 16 and blocks of 128.
LENGTHS = [1, 15, 16, 17, 127, 128, 129, 300]


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks of 128 positions and tall tiles of 16 tokens, so that small cases cross borders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "BLOCK", 128)
        patch.setattr(tpu, "TALL_ROWS", 64)
        yield


def run(q, k, v, pages, scales, row_starts, kv_lens, page_table, sm_scale=0.25, cores=1, eager=False):
    """The kernel under the race detector."""
    interpret = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="eager" if eager else "on_wait"
    )
    call = jax.jit(
        functools.partial(
            tpu.paged_attention, sm_scale=sm_scale, interpret=interpret, cores=cores
        )
    )
    arrays = (None if x is None else jnp.asarray(x) for x in (q, k, v, pages, scales))
    out = call(*arrays, row_starts=row_starts, kv_lens=kv_lens, page_table=page_table)
    out = jax.block_until_ready(out)
    assert not interpret_pallas_call.races.races_found
    return PagedOut(*out)


def check(batch, **how):
    """As `paged_batches.check`; pages and scales are those of the XLA implementation, bit for bit."""
    got = batches.check(batch, functools.partial(run, **how.pop("run", {})), **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_attend", lambda q, *_: q)
        wanted = xla.paged_attention(
            *(None if x is None else jnp.asarray(x) for x in batch.args()[:5]),
            row_starts=jnp.asarray(batch.row_starts),
            kv_lens=jnp.asarray(batch.kv_lens),
            page_table=jnp.asarray(batch.page_table),
            sm_scale=1.0,
        )
    for mine, theirs in zip((got.pages, got.scales), wanted[1:], strict=True):
        assert (mine is None) == (theirs is None)
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()
    return got


CACHES = [
    Shape(N=8, K=2, H=128, page=16),
    Shape(N=8, K=2, H=128, page=32, dtype="bfloat16", cache="bfloat16"),
    Shape(N=4, K=2, H=128, page=16, dtype="bfloat16", cache="float8_e4m3fn"),
    Shape(N=4, K=2, H=128, page=128, dtype="bfloat16", cache="float8_e4m3fn", scaled=True),
    Shape(N=4, K=2, H=128, page=128, cache="int8"),
]


@pytest.mark.parametrize("shape", CACHES, ids=lambda s: f"{s.cache}-{s.scaled or s.cache == 'int8'}")
def test_one_token_of_each_row_over_every_cache(shape):
    check(make([1] * 8, LENGTHS, shape, width=-(-300 // shape.page)))


@pytest.mark.parametrize("shape", CACHES, ids=lambda s: f"{s.cache}-{s.scaled or s.cache == 'int8'}")
def test_prompts_chunks_and_single_tokens_in_one_call_over_every_cache(shape):
    # Rows of one token beside chunks whose ends cross pages, tiles of 16 tokens and a block.
    check(make([1, 0, 20, 1, 33], [130, 5, 141, 1, 33], shape, width=-(-141 // shape.page)))
