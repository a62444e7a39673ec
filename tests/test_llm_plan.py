"""What fits: the plan that is made, and refused, before anything is read."""

import dataclasses
import logging
import math

import jax
import pytest
import tiny_llm

from qwen_jax import functional
from qwen_jax.engine import capacity
from qwen_jax.runtime import Runtime
from qwen_jax.weights import presets

GB = 10**9


@pytest.fixture
def runtime():
    """One device of 16 GB."""
    return Runtime.make(mesh="expert=1", dtype="float32", page_size=64)


@pytest.fixture
def free(monkeypatch):
    def free(gigabytes):
        monkeypatch.setattr(capacity, "free_host_memory", lambda: int(gigabytes * GB))

    return free


def test_weights_come_first_and_the_cache_gets_a_quarter_of_the_rest(runtime, free):
    free(16)
    plan = capacity.make_plan(presets.preset("Qwen3-0.6B"), runtime, max_num_seqs=2)
    assert plan.weights == 596_049_920 * 4
    assert plan.cache == int((16 * GB - plan.weights) * 0.25)
    page = 64 * 28 * 2 * 8 * 128 * 4  # tokens, layers, k and v, heads, head_dim, bytes
    assert plan.page == page
    assert plan.kv_tokens == plan.cache // page * 64
    assert plan.max_model_len == plan.kv_tokens < plan.model_limit == 40960
    assert plan.pages == plan.cache // page


def test_no_more_pages_than_rows_can_fill(runtime, free):
    free(200)
    plan = capacity.make_plan(
        presets.preset("Qwen3-0.6B"), runtime, max_model_len=130, max_num_seqs=2
    )
    assert (plan.max_model_len, plan.pages) == (130, 2 * 3)


def test_devices_share_what_they_split(free):
    free(64)
    config = presets.preset("Qwen3-0.6B")
    one, two = (
        capacity.make_plan(config, Runtime.make(mesh=f"tensor={n}", dtype="float32"))
        for n in (1, 2)
    )
    assert two.memory == one.memory // 2  # of one host
    norms = (28 * 2 + 1) * 1024 + 28 * 2 * 128  # on every device
    assert two.weights == (596_049_920 - norms) * 2 + norms * 4
    assert two.page == one.page // 2


def test_a_mesh_axis_that_does_not_split_heads_repeats_the_cache(free):
    free(64)
    config = presets.preset("Qwen3-0.6B")
    one = capacity.make_plan(config, Runtime.make(mesh="tensor=1", dtype="float32"))
    eight = capacity.make_plan(config, Runtime.make(mesh="expert=8", dtype="float32"))
    assert eight.page == one.page


def test_weights_that_do_not_fit_are_refused_with_what_does(runtime, free):
    free(25)
    with pytest.raises(ValueError) as error:
        capacity.make_plan(presets.preset("Qwen3-30B-A3B"), runtime)
    text = str(error.value)
    assert "the weights need 122.13 GB per device, 25.00 GB are free on 1 cpu device" in text
    assert "such devices hold them with mesh='expert=8', or mesh='expert=2', quant" in text


def test_what_is_proposed_leaves_room_and_half_of_it_is_too_small():
    config = presets.preset("Qwen3-30B-A3B")
    four, eight = (
        capacity.weight_bytes(config, Runtime.make(mesh=f"expert={n}", dtype="float32"))
        for n in (4, 8)
    )
    assert eight < 0.9 * 25 * GB < 25 * GB < four


def test_weights_that_no_mesh_holds_are_refused(runtime, free):
    free(0.1)
    with pytest.raises(ValueError, match="no mesh of one axis and up to 256 such devices"):
        capacity.make_plan(presets.preset("Qwen3-30B-A3B"), runtime)


def test_a_context_that_does_not_fit_is_refused_with_what_does(runtime, free):
    free(4)
    config = presets.preset("Qwen3-0.6B")
    fits = capacity.make_plan(config, runtime).max_model_len
    with pytest.raises(ValueError, match=rf"max_model_len=40,000 needs .*KV for {fits:,} tokens"):
        capacity.make_plan(config, runtime, max_model_len=40000)


def test_requantised_weights_are_planned_as_such(runtime, free):
    free(64)
    config = presets.preset("Qwen3-0.6B")
    plain = capacity.make_plan(config, runtime).weights
    linear = 28 * 1024 * (2 * 2048 + 2 * 1024 + 3 * 3072)
    scales = 28 * 4 * (2048 + 1024 + 1024 + 1024 + 2 * 3072 + 1024)
    found = capacity.make_plan(config, runtime, quantization="int8").weights
    assert found == plain - 3 * linear + scales


def test_the_plan_is_said_before_weights_are_read(caplog):
    caplog.set_level(logging.INFO, logger="qwen_jax")
    said = []
    model = tiny_llm.open_llm(progress=lambda _: said.append(caplog.text))
    assert str(model.plan) in said[0]
    assert "contexts up to 256 (the model's limit is 2,048)" in str(model.plan)
    assert "paged_attention xla" in said[0]


def test_free_memory_is_less_than_there_is():
    assert 0 < capacity.free_host_memory() < 2**50


@pytest.mark.parametrize(("experts", "axis"), [(128, "expert"), (0, "tensor"), (100, "tensor")])
def test_every_device_goes_to_the_experts_where_they_divide_them(experts, axis):
    config = presets.preset("Qwen3-30B-A3B")
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_experts=experts))
    assert functional.auto_mesh(config) == {axis: len(jax.devices())} == {axis: 8}
    assert math.prod(functional.auto_mesh(config, 32).values()) == 32
