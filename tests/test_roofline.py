"""What a step must move and compute, against the published tables and against counting by hand."""

import dataclasses
import json

import pytest
import tiny_llm

from qwen_jax import roofline
from qwen_jax.roofline import Machine, Work
from qwen_jax.runtime import Runtime
from qwen_jax.weights import hf_config
from qwen_jax.weights.presets import preset

# GB of weights per decode step at batch 1, 8, 32, 128, 256, by an independent calculation.
TABLE = {
    "Qwen3-30B-A3B": "6.08 25.8 53.1 60.4 60.4",
    "Qwen3-30B-A3B-FP8": "3.37 13.3 26.9 30.5 30.6",
    "Qwen3-Coder-480B-A35B-Instruct": "69 337 777 957 958",
    "Qwen3-Coder-480B-A35B-Instruct-FP8": "36 170 390 480 480",
}
KV_BYTES = {"Qwen3-30B-A3B": 98_304, "Qwen3-Coder-480B-A35B-Instruct": 253_952}


@pytest.fixture(scope="module")
def accelerator():
    """One device that computes in bfloat16."""
    runtime = Runtime.make(mesh="expert=1")
    return dataclasses.replace(runtime, dtype="bfloat16", kv_dtype="bfloat16")


@pytest.mark.parametrize("name", TABLE)
def test_decode_bytes_are_those_of_the_table(accelerator, name):
    config = preset(name)
    for rows, gigabytes in zip((1, 8, 32, 128, 256), TABLE[name].split(), strict=True):
        moved = roofline.decode_work(config, accelerator, rows=rows, context=0).bytes
        rounding = 0.5 * 10 ** -len(gigabytes.partition(".")[2])
        assert moved / 1e9 == pytest.approx(float(gigabytes), abs=rounding + 0.003 * moved / 1e9)


@pytest.mark.parametrize("name", KV_BYTES)
def test_each_position_of_a_context_is_read_once(accelerator, name):
    none, some = (
        roofline.decode_work(preset(name), accelerator, rows=3, context=n) for n in (0, 100)
    )
    assert some.bytes - none.bytes == 3 * 100 * KV_BYTES[name]


@pytest.mark.parametrize(
    ("tokens", "distinct"), [(1, 8), (8, 51.6), (32, 111.8), (128, 128), (10**6, 128)]
)
def test_distinct_experts_are_those_of_the_table(tokens, distinct):
    assert roofline.distinct_experts(preset("Qwen3-30B-A3B"), tokens) == pytest.approx(
        distinct, abs=0.1
    )
    assert roofline.distinct_experts(preset("Qwen3-0.6B"), tokens) == 0


def test_a_dense_prefill_multiplies_each_weight_once_per_token(accelerator):
    config = preset("Qwen3-0.6B")
    work = roofline.prefill_work(config, accelerator, rows=2, length=10)
    layer = 1024 * (2 * 2048 + 2 * 1024 + 3 * 3072)
    norms = 28 * (2 * 1024 + 2 * 128) + 1024
    products = 20 * (28 * layer + norms) + 2 * 151936 * 1024
    products += 28 * 2 * 16 * 128 * 2 * (10 * 11 // 2)  # scores, and their values
    assert work.flops == 2 * products
    assert work.bytes == 2 * (28 * layer + norms + 151936 * 1024) + 20 * 28 * 2 * 8 * 128 * 2


def test_devices_share_the_work(accelerator):
    config = hf_config.from_hf(tiny_config())
    two = Runtime.make(mesh="tensor=2")
    two = dataclasses.replace(two, dtype="bfloat16", kv_dtype="bfloat16")
    whole, half = (
        roofline.decode_work(config, each, rows=4, context=64) for each in (accelerator, two)
    )
    assert half.flops == whole.flops / 2
    assert whole.bytes / 2 < half.bytes < whole.bytes * 0.52  # norms and router are on both


def tiny_config():
    return json.loads((tiny_llm.directory() / "config.json").read_text())


def test_the_slower_of_bytes_and_products_is_the_limit():
    machine = Machine(bytes_per_s=10.0, flops_per_s=100.0)
    assert machine.seconds(Work(bytes=20.0, flops=100.0)) == 2.0
    assert machine.limit(Work(bytes=20.0, flops=100.0)) == "bandwidth"
    assert machine.seconds(Work(bytes=5.0, flops=100.0)) == 1.0
    assert machine.limit(Work(bytes=5.0, flops=100.0)) == "arithmetic"


def test_a_measurement_leaves_the_first_run_out(monkeypatch):
    times = iter([0.0, 7.0, 10.0, 12.0, 20.0, 21.0, 30.0, 33.0, 40.0, 44.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    runs = []

    class Done:
        def block_until_ready(self):
            runs.append(1)

    assert roofline._best(Done) == 1.0
    assert len(runs) == 6
