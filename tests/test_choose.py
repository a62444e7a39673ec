"""Mesh and strategy where nobody named them."""

import dataclasses
import logging

import jax
import pytest

from qwen_jax.planner.chips import Topology
from qwen_jax.planner.choose import choose
from qwen_jax.planner.plan import Load
from qwen_jax.planner.search import search
from qwen_jax.sharding import Rules
from qwen_jax.weights import presets

CONFIG = presets.preset("Qwen3-30B-A3B")
LOAD = Load(batch=8)


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as is looked at."""

    device_kind: str
    id: int
    platform: str = "tpu"


def chips(kind: str, count: int) -> list[Chip]:
    return [Chip(kind, i) for i in range(count)]


@pytest.mark.parametrize(("kind", "name"), [("TPU v5 lite", "v5e:8"), ("TPU v5", "v5p:8")])
def test_chips_with_figures_get_the_best_plan_and_it_is_said(kind, name, caplog):
    caplog.set_level(logging.INFO, logger="qwen_jax")
    best = search(CONFIG, Topology.parse(name), LOAD)[0]
    found = choose(CONFIG, LOAD, devices=chips(kind, 8))
    assert found == (best.mesh, best.strategy)
    assert f"strategy {best.strategy}: best of" in caplog.text
    assert f"at most {best.decode_tokens_per_s:.0f} tokens/s" in caplog.text  # of this very chip


def test_a_mesh_or_a_strategy_that_is_given_stays():
    mesh, strategy = choose(CONFIG, LOAD, strategy="tp-attention+ep", devices=chips("TPU v5p", 8))
    assert strategy == "tp-attention+ep"
    best = search(CONFIG, Topology.parse("v5p:8"), LOAD, strategy="tp-attention+ep")[0]
    assert mesh == best.mesh
    rules = Rules.of(E="expert")
    assert choose(CONFIG, LOAD, mesh="expert=2", strategy=rules) == ("expert=2", rules)


def test_devices_without_figures_get_the_stated_rule():
    assert choose(CONFIG, LOAD) == ({"expert": len(jax.devices())}, "auto")
    assert choose(CONFIG, LOAD, mesh="tensor=2") == ("tensor=2", "auto")
