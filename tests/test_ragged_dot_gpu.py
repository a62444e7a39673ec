"""The Hopper kernel of routed expert products, interpreted here with barriers and a race detector.

What it must not read is NaN, and tiles, rings and blocks are few and small, so that every boundary
is crossed: several row tiles and column tiles per expert, stages used again, blocks without items.
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import routed
from gpu_interpret import hopper, interpreted
from routed import FP8, GATE_UP, product

from pallas_kernels import hopper as figures
from pallas_kernels import registry
from pallas_kernels.device import Device
from pallas_kernels.ragged_dot import gpu, gpu_config
from pallas_kernels.ragged_dot.gpu_config import Config
from pallas_kernels.ragged_dot.gpu_items import Items

D, F, R = 256, 128, 5
SMALL = Config(rows=8, inner=128, stages=2, blocks=2)
H200 = Device("gpu", "NVIDIA H200")
# Rows per expert: groups within a tile, of several tiles, off alignment, at either end of x.
ROUTINGS = {
    "all to the first": [19, 0, 0, 0, 0],
    "all to the last": [0, 0, 0, 0, 20],
    "several in one tile": [3, 2, 0, 1, 1],
    "tails off alignment": [7, 9, 1, 0, 3],
    "whole tiles": [8, 0, 8, 0, 0],
    "no rows": [0, 0, 0, 0, 0],
}


KERNEL = routed.Kernel(gpu.ragged_dot, SMALL, hopper, R, D, F)
check = KERNEL.check


@interpreted
@pytest.mark.parametrize("routing", ROUTINGS)
def test_each_row_meets_its_own_expert_only(routing):
    check("bfloat16", ROUTINGS[routing], 20)


@interpreted
@pytest.mark.parametrize("form", ["bfloat16", "fp8"])
@pytest.mark.parametrize("pair", [True, False])
def test_every_form_of_weights(form, pair):
    check(form, ROUTINGS["tails off alignment"], 20, pair=pair, out="bfloat16")


@interpreted
def test_float8_weights_and_their_scales_lose_nothing():
    check("fp8", ROUTINGS["several in one tile"], 20, scale_dtype="float32")


@interpreted
@pytest.mark.parametrize("pair", [True, False])
def test_every_block_of_columns_has_its_own_scale(pair):
    dataclasses.replace(KERNEL, outer=256).check("fp8", [3, 2, 0, 1, 1], 8, pair=pair)


@interpreted
@pytest.mark.parametrize("first", [0, 2])
def test_a_shard_computes_its_experts_and_leaves_the_rest_zero(first):
    check("bfloat16", [7, 8, 1, 17, 3], 40, first=first, E=2, pair=False)


@interpreted
@pytest.mark.parametrize("M", [1, 3])
def test_fewer_rows_than_a_tile(M):
    check("bfloat16", [0, 0, 0, M, 0], M)


@interpreted
@pytest.mark.parametrize("form", ["bfloat16", "fp8"])
def test_the_tiles_of_prefill(form):
    config = Config(64, 64 if form == "bfloat16" else 128, 3, 3)
    check(form, [65, 0, 3, 130, 1], 200, pair=False, config=config)


@interpreted
def test_the_operation_takes_it_by_name_and_chooses_tiles(monkeypatch):
    monkeypatch.setitem(figures._MULTIPROCESSORS, "NVIDIA H200", 2)
    KERNEL.check_by_name("gpu", [3, 0, 1, 0, 3])


# ---- the list of row tiles -----------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_items_are_the_tiles_of_held_experts_that_have_rows(routing, first):
    sizes = np.asarray(ROUTINGS[routing], np.int32)
    ends = np.cumsum(sizes)
    want = [
        (e, row, min(row + 8, ends[first + e]))
        for e in range(3)
        for row in range(ends[first + e] - sizes[first + e], ends[first + e], 8)
    ]
    make = functools.partial(Items.of, rows=8, M=20)
    got = jax.jit(make, static_argnums=2)(sizes, np.int32(first), 3)
    count = int(got.until_E[-1])
    assert count <= len(got.expert_I)
    assert list(zip(got.expert_I, got.first_I, got.end_I, strict=True))[:count] == want
    assert (got.start_E[0], got.end_E[-1]) == (ends[first] - sizes[first], ends[first + 2])


# ---- what it supports ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "kind", "reason"),
    [
        (product(), "NVIDIA B200", "'NVIDIA B200' is no Hopper GPU"),
        (product(x_dtype="float32"), "NVIDIA H200", "rows are float32; it takes bfloat16"),
        (product(w_dtype="int8"), "NVIDIA H200", "weights are int8; it takes bfloat16 or float8"),
        (product(out_dtype="float16"), "NVIDIA H200", "results are float16; it gives bfloat16 or"),
        (product(outer=96), "NVIDIA H200", "widths 2048 and 96 are not multiples of 64 and 64"),
        (product(activation=None, outer=192), "NVIDIA H200", "2048 and 192 .* of 64 and 128"),
        (product(w_dtype="float8_e4m3fn"), "NVIDIA H200", "weights are float8 without scales"),
        (product(blocks=(1, 1, 128, 128)), "NVIDIA H200", "weights are bfloat16 with scales"),
        (product(blocks=(1, 1, 2048, 1), **FP8), "NVIDIA H200", "blocks .* takes .1, 1, 128, 128."),
        (
            product(blocks=(1, 1, 128, 128), **{**FP8, "scale_dtype": "float16"}),
            "NVIDIA H200",
            "scal",
        ),
        (
            product(inner=192, blocks=(1, 1, 128, 128), **FP8),
            "NVIDIA H200",
            "width 192 is not a",
        ),
    ],
)
def test_what_it_cannot_run_has_a_reason(facts, kind, reason):
    assert re.search(reason, gpu.supports(Device("gpu", kind), facts) or "runs")


def test_auto_takes_it_on_a_hopper_gpu_and_says_why_not_on_another():
    assert registry.choose("ragged_dot", "auto", H200, [GATE_UP]).name == "gpu"
    other = registry.choose("ragged_dot", "auto", Device("gpu", "NVIDIA L4"), [GATE_UP])
    assert other.name == "xla"
    assert "'NVIDIA L4' is no Hopper GPU" in other.reasons["gpu"]


# ---- tile sizes ----------------------------------------------------------------------------------

PUBLISHED = [(2048, 768, "swiglu"), (768, 2048, None), (6144, 2560, "swiglu"), (2560, 6144, None)]


def test_a_tile_is_as_high_as_most_groups_within_its_limits():
    choose = lambda facts, t: gpu_config.choose(facts, 8 * t, 128, H200).rows
    assert [choose(GATE_UP, t) for t in (1, 32, 128, 256, 512, 8192)] == [8, 8, 16, 32, 64, 128]
    fp8 = product(blocks=(1, 1, 128, 128), **FP8)
    assert [choose(fp8, t) for t in (1, 8192)] == [8, 64]


@pytest.mark.parametrize(("inner", "outer", "pair"), PUBLISHED)
@pytest.mark.parametrize("form", ["bfloat16", "fp8"])
def test_the_published_models_run_and_their_stages_fill_the_shared_memory(inner, outer, pair, form):
    facts = product(inner=inner, outer=outer, activation=pair)
    if form == "fp8":
        blocks = (1, 128, 128) if pair is None else (1, 1, 128, 128)
        facts = product(inner=inner, outer=outer, activation=pair, blocks=blocks, **FP8)
    assert gpu.supports(H200, facts) is None
    for tokens in (1, 256, 8192):
        config = gpu_config.choose(facts, 8 * tokens, 128, H200)
        assert facts.inner % config.inner == 0
        assert gpu_config.shared_bytes(facts, config) <= 232448
        assert config.stages >= 4


def test_a_measured_entry_stands_before_the_rule(monkeypatch):
    key = gpu_config.key(GATE_UP, 64, 128)
    assert key == "bfloat16 bfloat16 2x2048x768 mean<=1"
    tiles = {"rows": 16, "inner": 64, "stages": 4, "blocks": 132}
    table = {H200.kind: {key: {"tiles": tiles}}}
    monkeypatch.setattr(gpu_config.tuning, "_table", lambda op: table)
    assert gpu_config.choose(GATE_UP, 64, 128, H200) == Config(16, 64, 4, 132)
    assert gpu_config.choose(GATE_UP, 640, 128, H200) != Config(16, 64, 4, 132)
    tiles["stages"] = 40
    with pytest.raises(ValueError, match=r"tuned Config.* does not fit NVIDIA H200"):
        gpu_config.choose(GATE_UP, 64, 128, H200)
