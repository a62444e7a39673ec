"""Meshes and strategies, ranked, and what is proposed where nothing fits."""

import dataclasses
import math

import pytest

from qwen_jax.planner.chips import Topology
from qwen_jax.planner.plan import Load
from qwen_jax.planner.search import meshes, propose, rank, search
from qwen_jax.sharding import Rules
from qwen_jax.weights import presets

CODER = "Qwen3-Coder-480B-A35B-Instruct-FP8"


def test_meshes_are_all_ways_to_write_the_devices():
    found = list(meshes(8))
    assert all(math.prod(mesh.values()) == 8 for mesh in found)
    assert len(found) == 4
    assert list(meshes(1)) == [{"tensor": 1}]
    wide = [tuple(mesh.items()) for mesh in meshes(8, ("data", "expert", "tensor"))]
    assert all(math.prod(dict(mesh).values()) == 8 for mesh in wide)
    assert len(set(wide)) == len(wide) == 10


def test_a_search_ranks_what_fits_and_is_fast_first():
    plans = search(presets.preset("Qwen3-30B-A3B"), Topology.parse("v5e:2x4"), Load(batch=8))
    assert plans == sorted(plans, key=rank)
    assert plans[0].fits
    assert not plans[-1].fits  # replicated
    assert set(plans[0].kernels.values()) == {"tpu"}
    rates = [p.decode_tokens_per_s for p in plans if p.fits and p.kernels == plans[0].kernels]
    assert rates[0] > 0.98 * max(rates)


def test_rows_split_over_data_alone_where_that_is_faster():
    load = Load(batch=64, context=32768)
    best, *others = search(presets.preset(CODER), Topology.parse("v6e:8x8"), load)
    assert set(best.mesh) == {"data", "expert", "tensor"}
    assert best.rules.axes("B") == ("data",)
    assert best.rules.axes("E") == ("data", "expert")
    two = max(p.decode_tokens_per_s for p in others if p.fits and len(p.mesh) < 3)
    assert best.decode_tokens_per_s > 1.1 * two


def test_an_axis_that_rules_use_as_another_is_not_searched():
    config, topology = presets.preset("Qwen3-30B-A3B"), Topology.parse("v5e:2x4")
    alike = Rules.of(B=("data", "expert"), E=("data", "expert"))
    assert all("data" not in p.mesh for p in search(config, topology, Load(), strategy=alike))
    apart = Rules.of(B="data", E=("data", "expert"))
    assert any("data" in p.mesh for p in search(config, topology, Load(), strategy=apart))


def test_plans_that_differ_in_prefill_alone_are_both_kept():
    found = search(presets.preset("Qwen3-30B-A3B"), Topology.parse("v5e:2x4"), Load(batch=1))
    by_name = {p.strategy: p for p in found if p.mesh == {"expert": 8}}
    rows, tokens = by_name["dp-attention+ep"], by_name["sp+ep"]
    assert rows.collectives == tokens.collectives  # one row's decode is the same
    assert rows.prefill != tokens.prefill


# ---- proposals ---------------------------------------------------------------------------------


def test_what_does_not_fit_gets_the_smallest_that_does():
    config, topology = presets.preset("Qwen3-30B-A3B"), Topology.parse("v5e:1x1")
    assert not search(config, topology, Load())[0].fits
    better = propose(config, topology, Load())
    assert better is not None
    assert better.fits
    assert str(better.topology) == "v5e:2x2"  # 61 GB on 4 x 16.3; no slice has two chips
    assert better.load.quantization is None
    assert better.excess == 0


def test_what_no_slice_holds_has_no_proposal():
    config = presets.preset("Qwen3-30B-A3B")
    load = Load(batch=10**9)
    assert propose(config, Topology.parse("l4:1"), load) is None


def test_an_excess_is_what_is_above_the_limit():
    config, topology = presets.preset("Qwen3-30B-A3B"), Topology.parse("v5e:1x1")
    plan = search(config, topology, Load())[0]
    assert plan.excess == plan.peak - int(0.95 * 16 * 2**30) > 0
    roomy = dataclasses.replace(plan, limit=plan.peak)
    assert roomy.fits
    assert roomy.excess == 0


def test_a_strategy_of_no_name_is_refused():
    with pytest.raises(ValueError, match="strategy 'px' is unknown"):
        search(presets.preset("Qwen3-30B-A3B"), Topology.parse("v5e:2x4"), Load(), strategy="px")
