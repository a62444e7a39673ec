"""Scales of fused axes on disk, such as (heads, head size), as blocks along our letters."""

import dataclasses

import numpy as np
import pytest

from qwen_jax import dims
from qwen_jax.weights import derive, params, presets, quant
from qwen_jax.weights.config import QuantConfig
from qwen_jax.weights.params import Param

FP8 = QuantConfig()
PER_CHANNEL = QuantConfig(form="int8", block=None)


def block_ids(row, block):
    """Which scale of its 128x128 grid on disk each element of our array has, as one number."""
    shape = dims.shape(row.layout, row.size)
    over = row.over.split()
    steps = [block[1 if axis[-1] in over else 0] for axis in dims.groups(row.layout)]
    index = np.meshgrid(
        *(np.arange(n) // b for n, b in zip(shape, steps, strict=True)), indexing="ij"
    )
    ids = np.zeros(shape, np.int64)
    for each in index:
        ids = ids * 1000 + each
    return dims.rearrange(ids, row.layout, row.dims, row.size)


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("block", [(128, 128), (64, 128), (96, 32)])
def test_a_block_of_ours_lies_in_one_block_on_disk(heads, head_dim, block):
    sizes = {"N": heads, "K": heads, "H": head_dim, "D": 320, "P": 2, "I": 200}
    quantised = dataclasses.replace(FP8, block=block)
    for row in (params.Attention().q, params.Attention().o, params.Mlp().down):
        row = dataclasses.replace(row, sizes=tuple(sizes.items()))
        ours, ids = derive.blocks(row, quantised), block_ids(row, block)
        first = ids[tuple(slice(None, None, b) for b in ours)]
        assert first.shape == quant.scale_shape(row.shape, ours)
        np.testing.assert_array_equal(
            np.broadcast_to(quant.spread(first, row.shape, ours), row.shape), ids
        )


@pytest.mark.parametrize(
    ("head_dim", "heads_and_elements"),
    [(64, (2, 64)), (96, (1, 1)), (128, (1, 128)), (256, (1, 128)), (32, (4, 32))],
)
def test_a_block_of_128_is_whole_heads_or_parts_of_one(head_dim, heads_and_elements):
    row = dataclasses.replace(params.Attention().q, sizes=(("N", 16), ("H", head_dim), ("D", 256)))
    assert derive.blocks(row, FP8) == (128, *heads_and_elements)


def test_separate_tensors_share_no_scale():
    row = params.table(presets.preset("Qwen3-30B-A3B-FP8")).layers[0].mlp.gate_up
    assert derive.blocks(row, FP8) == (1, 1, 128, 128)
    assert derive.blocks(row, dataclasses.replace(FP8, block=(64, 32))) == (1, 1, 32, 64)


def test_a_block_may_not_run_over_the_edge_between_fused_letters():
    # 3 heads of 64 each: a block of two would hold the last head of q and the first of k.
    row = Param("D Q N H", "qkv", "(Q N H) D", over="D")
    row = dataclasses.replace(row, sizes=(("Q", 3), ("N", 3), ("H", 64), ("D", 128)))
    assert derive.blocks(row, FP8) == (128, 1, 1, 1)
    row = dataclasses.replace(row, sizes=(("Q", 3), ("N", 4), ("H", 64), ("D", 128)))
    assert derive.blocks(row, FP8) == (128, 1, 2, 64)


def test_per_channel_blocks_span_what_is_summed_over():
    layer = params.table(presets.preset("Qwen3-30B-A3B")).layers[0]
    assert derive.blocks(layer.attn.q, PER_CHANNEL) == (2048, 1, 1)
    assert derive.blocks(layer.attn.o, PER_CHANNEL) == (32, 128, 1)
    assert derive.blocks(layer.mlp.gate_up, PER_CHANNEL) == (1, 1, 2048, 1)
    assert derive.blocks(layer.mlp.down, PER_CHANNEL) == (1, 768, 1)
