"""The TPU kernel of routed expert products, interpreted here with late copies and a race detector.

What it must not read is NaN, and tiles are small, so that every boundary is crossed: several column
tiles and row tiles per expert, groups that share a granule of 16 rows, two cores.
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import routed
from routed import FP8, GATE_UP, product
from tpu_interpret import chip

from pallas_kernels import registry
from pallas_kernels.device import Device, tpu_info
from pallas_kernels.ragged_dot import tpu, tpu_config
from pallas_kernels.ragged_dot.tpu_config import Config
from pallas_kernels.ragged_dot.tpu_groups import Groups

D, F, R = 256, 384, 6
SMALL = Config(rows=32, columns=128)
V6E = Device("tpu", "TPU v6 lite")
# Rows per expert, and where they lie: several groups in one granule, groups of several row tiles,
# starts off alignment, nothing behind the last group or something.
ROUTINGS = {
    "all to the first": [70, 0, 0, 0, 0, 0],
    "all to a middle one": [0, 0, 70, 0, 0, 0],
    "all to the last": [0, 0, 0, 0, 0, 70],
    "one granule for all": [3, 2, 0, 4, 1, 5],
    "empty ones between": [0, 17, 0, 0, 33, 0],
    "tails off alignment": [15, 17, 1, 31, 16, 9],
    "no rows": [0, 0, 0, 0, 0, 0],
    "one row": [0, 0, 0, 1, 0, 0],
    "whole granules": [16, 0, 32, 16, 0, 32],
}


KERNEL = routed.Kernel(tpu.ragged_dot, SMALL, chip, R, D, F)
check = KERNEL.check


@pytest.mark.parametrize("routing", ROUTINGS)
def test_each_row_meets_its_own_expert_only(routing):
    check("bfloat16", ROUTINGS[routing], 100)


@pytest.mark.parametrize("form", ["float32", "fp8", "int8"])
@pytest.mark.parametrize("pair", [True, False])
def test_every_form_of_weights(form, pair):
    check(form, ROUTINGS["tails off alignment"], 96, pair=pair)


@pytest.mark.parametrize("first", [0, 2, 4])
def test_a_shard_computes_its_experts_and_leaves_the_rest_zero(first):
    check("bfloat16", [15, 17, 1, 31, 300, 9], 380, first=first, E=2, pair=False)


@pytest.mark.parametrize("M", [1, 7, 16, 33])
def test_row_counts_that_are_no_granules(M):
    check("bfloat16", [0, M // 2, 0, 0, M - M // 2, 0], M)


@pytest.mark.parametrize("config", [Config(16, 128), Config(16, 384), Config(64, 384)])
def test_tiles_change_nothing(config):
    check("bfloat16", ROUTINGS["tails off alignment"], 96, config=config)
    check("fp8", ROUTINGS["one granule for all"], 32, config=config)


@pytest.mark.parametrize("form", ["bfloat16", "fp8", "int8"])
def test_the_result_is_rounded_once(form):
    check(form, ROUTINGS["one granule for all"], 16, out="bfloat16")


def test_halves_of_lanes_are_no_trouble():
    narrow = dataclasses.replace(KERNEL, inner=192)
    narrow.check("bfloat16", [15, 17, 1, 0, 6, 9], 48, pair=False)


def test_two_cores_do_half_of_the_columns_each():
    two = functools.partial(chip, "TPU v5", cores=2)
    wide = dataclasses.replace(KERNEL, here=two, outer=512)
    wide.check("fp8", [15, 17, 1, 0, 16, 9], 70)


def test_the_operation_takes_it_by_name_and_chooses_tiles():
    KERNEL.check_by_name("tpu", [15, 0, 1, 0, 6, 9])


# ---- rounded rows --------------------------------------------------------------------------------


def rounded(x):
    """Rows in steps of 1/127 of their largest number, float64 of what float32 arithmetic gives."""
    x = np.asarray(x, np.float32)
    top = np.max(np.abs(x), axis=1, keepdims=True)
    whole = np.round(x * (np.float32(127) / np.maximum(top, np.float32(1e-30))))
    return whole.astype(np.float64) * top / 127


W8A8 = dataclasses.replace(
    KERNEL, fn=functools.partial(tpu.ragged_dot, round_rows=True), reads=rounded
)


@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("routing", ["tails off alignment", "one granule for all", "no rows"])
def test_rounded_rows_are_multiplied_exactly(routing, pair):
    W8A8.check("int8", ROUTINGS[routing], 96, pair=pair)


def test_rounding_costs_less_than_a_hundredth():
    """Of a row's norm: each number is off by 1/254 of the largest at most, of 0.3 % on average."""
    x = KERNEL.rows(64)
    assert 1e-3 < routed.oracles.row_error(rounded(x), x) < 1e-2
    x[3] = 0
    assert not rounded(x)[3].any()


def test_rounded_rows_are_taken_by_name_only():
    facts = [product(w_dtype="int8", scale_dtype="float32", blocks=(1, 1, 2048, 1))]
    assert registry.choose("ragged_dot", "auto", V6E, facts).name == "tpu"
    assert registry.choose("ragged_dot", "tpu_w8a8", V6E, facts).name == "tpu_w8a8"
    for given, device, reason in (
        (facts, Device("tpu", "TPU7x"), "TPU7x has no matrix unit for int8; v5e, v5p and v6e have"),
        ([product()], V6E, "weights are bfloat16; it takes int8"),
        ([product(w_dtype="int8")], V6E, "weights are int8 without scales"),
        (facts, Device("cpu", "cpu"), "it runs on tpu, this is cpu"),
    ):
        with pytest.raises(ValueError, match=reason):
            registry.choose("ragged_dot", "tpu_w8a8", device, given)


# ---- the list of groups --------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_groups_are_the_held_experts_that_have_rows(routing, first):
    sizes = np.asarray(ROUTINGS[routing], np.int32)
    ends = np.cumsum(sizes)
    want = [(e, ends[first + e] - sizes[first + e], ends[first + e]) for e in range(3)]
    want = [group for group in want if group[2] > group[1]]
    got = jax.jit(Groups.of, static_argnums=2)(sizes, np.int32(first), 3)
    count = int(got.count[0])
    assert list(zip(got.expert_E, got.start_E, got.end_E, strict=True))[:count] == want


# ---- what it supports ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "device", "reason"),
    [
        (product(), Device("tpu", "TPU v99"), "device kind 'TPU v99' is unknown"),
        (product(), Device("tpu", "TPU v4"), "too little VMEM"),
        (product(x_dtype="float16"), V6E, "rows are float16; it takes bfloat16 or float32"),
        (product(x_dtype="float32"), V6E, "weights are bfloat16, rows float32"),
        (product(inner=96), V6E, "width 96 of the rows is not a multiple of 64"),
        (product(outer=192), V6E, "width 192 of the results is not a multiple of 128"),
        (product(w_dtype="int8"), V6E, "weights are int8 without scales"),
        (product(blocks=(2, 1, 128, 128), **FP8), V6E, "shared by experts"),
        (product(blocks=(1, 1, 192, 128), **FP8), V6E, "blocks of 192 rows"),
        (product(blocks=(1, 1, 128, 64), **FP8), V6E, "blocks of 64 columns"),
        (product(inner=2**17), V6E, r"its smallest tiles take \d+ MiB of 128 MiB of VMEM"),
    ],
)
def test_what_it_cannot_run_has_a_reason(facts, device, reason):
    assert re.search(reason, tpu.supports(device, facts) or "runs")


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_the_published_models_run_on_every_chip(kind):
    device = Device("tpu", kind)
    for inner, outer, pair in ((2048, 768, "swiglu"), (2560, 6144, None), (6144, 2560, "swiglu")):
        facts = product(inner=inner, outer=outer, activation=pair)
        assert tpu.supports(device, facts) is None
        blocks = (1, 128, 128) if pair is None else (1, 1, 128, 128)
        facts = product(inner=inner, outer=outer, activation=pair, blocks=blocks, **FP8)
        assert tpu.supports(device, facts) is None


# ---- tile sizes ----------------------------------------------------------------------------------


def test_a_tile_is_two_mean_groups_high_within_its_limits():
    heights = [tpu_config.choose(GATE_UP, 8 * t, 128, V6E).rows for t in (1, 128, 256, 512, 8192)]
    assert heights == [16, 16, 32, 64, 256]


def test_tiles_fit_every_chip_and_divide_the_columns_of_a_core():
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"):
        info = tpu_info(kind)
        for inner, outer, pair in (
            (2048, 768, "swiglu"),
            (6144, 2560, "swiglu"),
            (2560, 6144, None),
        ):
            facts = product(inner=inner, outer=outer, activation=pair)
            for tokens in (1, 256, 8192):
                config = tpu_config.choose(facts, 8 * tokens, 128, Device("tpu", kind))
                assert outer // info.num_cores % config.columns == 0
                assert tpu_config.fits(facts, config, info)


def test_two_cores_share_the_columns_only_where_each_gets_whole_tiles():
    info = tpu_info("TPU v5")
    assert tpu_config.cores(product(outer=768), info) == 2
    assert tpu_config.cores(product(outer=384), info) == 1


def test_a_measured_entry_stands_before_the_rule(monkeypatch):
    key = tpu_config.key(GATE_UP, 64, 128)
    assert key == "bfloat16 bfloat16 2x2048x768 mean<=1"
    table = {V6E.kind: {key: {"tiles": {"rows": 48, "columns": 384}}}}
    monkeypatch.setattr(tpu_config.tuning, "_table", lambda op: table)
    assert tpu_config.choose(GATE_UP, 64, 128, V6E) == Config(48, 384)
    assert tpu_config.choose(GATE_UP, 640, 128, V6E) != Config(48, 384)
    table[V6E.kind][key]["tiles"]["rows"] = 2**20
    with pytest.raises(ValueError, match=r"tuned Config.* does not fit TPU v6 lite"):
        tpu_config.choose(GATE_UP, 64, 128, V6E)
