import dataclasses
import logging

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pallas_kernels import registry
from pallas_kernels.device import Device
from qwen_jax import runtime as runtime_lib
from qwen_jax.runtime import Buckets, Runtime, ladder
from qwen_jax.sharding import Rules
from qwen_jax.weights import presets

MODEL = presets.preset("Qwen3-30B-A3B")
PICKY = registry.Impl(
    "ragged_dot", "picky", "cpu", lambda device, facts: "it never runs", lambda *args: None
)
GOOD = registry.Impl("ragged_dot", "good", None, lambda device, facts: None, lambda *args: None)
ELSEWHERE = registry.Impl("ragged_dot", "far", "tpu", lambda device, facts: None, lambda: None)


@pytest.fixture
def implementations(monkeypatch):
    """Puts implementations of ragged_dot before the real ones, for one test."""

    def put(*impls):
        named = {impl.name: impl for impl in impls} | registry._IMPLS["ragged_dot"]
        monkeypatch.setitem(registry._IMPLS, "ragged_dot", named)

    return put


# ---- kernels ---------------------------------------------------------------------------------


def test_every_op_has_the_reference_implementation_here():
    runtime = Runtime.make()
    assert {op: runtime.kernel(op) for op in runtime_lib.OPS} == dict.fromkeys(
        runtime_lib.OPS, "xla"
    )


def test_auto_takes_the_first_that_runs_and_logs_why_not_the_others(implementations, caplog):
    implementations(PICKY, ELSEWHERE, GOOD)
    with caplog.at_level(logging.DEBUG, "qwen_jax.runtime"):
        runtime = Runtime.make(config=MODEL)
    assert runtime.kernel("ragged_dot") == "good"
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("INFO", "ragged_dot: not picky: it never runs") in said
    assert ("DEBUG", "ragged_dot: not far: it runs on tpu, this is cpu") in said
    kernels = "kernels: ragged_dot good, paged_attention xla, segment_attention xla"
    assert ("INFO", kernels) in said


def test_a_kernel_asked_for_by_name_is_taken_or_raises_with_its_reason(implementations):
    implementations(PICKY, GOOD)
    runtime = Runtime.make(kernels={"ragged_dot": "xla"})
    assert runtime.kernel("ragged_dot") == runtime.kernel("paged_attention") == "xla"
    with pytest.raises(ValueError, match=r"ragged_dot: .*'picky' cannot run here: it never runs"):
        Runtime.make(kernels={"ragged_dot": "picky"}, config=MODEL)


def test_without_a_config_kernels_with_needs_are_passed_over(implementations, caplog):
    implementations(PICKY, GOOD)
    with caplog.at_level(logging.INFO, "qwen_jax.runtime"):
        assert Runtime.make().kernel("ragged_dot") == "good"
    messages = [record.getMessage() for record in caplog.records]
    assert f"ragged_dot: not picky: {registry.UNKNOWN}" in messages


def test_kernels_are_asked_about_this_model_on_this_mesh(implementations):
    asked = []
    curious = lambda device, facts: asked.append((device, facts))
    implementations(registry.Impl("ragged_dot", "curious", "cpu", curious, lambda *args: None))
    kinds = {"mesh": "expert=4,tensor=2", "strategy": "ep+tp", "config": MODEL}
    assert Runtime.make(**kinds).kernel("ragged_dot") == "curious"
    assert {device for device, _ in asked} == {Device("cpu", "cpu")}
    assert [(f.experts, f.inner, f.outer, f.w_dtype) for _, f in asked] == [
        (32, 2048, 384, "float32"),
        (32, 384, 2048, "float32"),
    ]
    asked.clear()
    Runtime.make(**kinds, quantization="int8")
    assert [(f.w_dtype, f.blocks) for _, f in asked] == [
        ("int8", (1, 1, 2048, 1)),
        ("int8", (1, 768, 1)),
    ]


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ({"matmul": "xla"}, r"kernels: \['matmul'\] are no ops; the ops are ragged_dot"),
        ({"ragged_dot": "cuda"}, "ragged_dot has no implementation 'cuda'; use one of .*xla"),
        ("fast", "has no implementation 'fast'"),
    ],
)
def test_an_unknown_kernel_raises(kernels, message):
    with pytest.raises(ValueError, match=message):
        Runtime.make(kernels=kernels)


# ---- dtypes, mesh, pages -----------------------------------------------------------------------


def test_a_cpu_computes_in_float32_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, "qwen_jax.runtime"):
        runtime = Runtime.make(dtype="bfloat16")
    assert (runtime.dtype, runtime.kv_dtype) == ("float32", "float32")
    assert [r.getMessage() for r in caplog.records if "bfloat16" in r.getMessage()] == [
        "dtype: float32 instead of bfloat16, for which this CPU has no fast matmul"
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "qwen_jax.runtime"):
        Runtime.make(dtype="float32")
    assert not [r for r in caplog.records if "dtype" in r.getMessage()]


def test_a_cache_dtype_is_kept_as_asked():
    assert Runtime.make(kv_cache_dtype="int8").kv_dtype == "int8"
    assert Runtime.make(kv_cache_dtype="bfloat16").kv_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16' is unknown; use one of bfloat16, float32"),
        ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype='fp4' is unknown; use auto, bfloat16"),
        ({"page_size": 48}, "page_size=48 is not a power of two"),
        ({"page_size": 0}, "page_size=0 is not a power of two"),
        ({"strategy": "pp"}, "strategy 'pp' is unknown"),
        ({"strategy": Rules.of(N="heads")}, r"rules name mesh axes \['heads'\]; this mesh has"),
        ({"mesh": "expert=9"}, "needs 9 devices, 8 are here"),
    ],
)
def test_what_cannot_be_raises_when_the_runtime_is_made(given, message):
    with pytest.raises(ValueError, match=message):
        Runtime.make(**given)


def test_mesh_and_rules_are_as_given():
    devices = jax.devices()[2:4]
    mine = Rules.of(N="tensor", K="tensor")
    runtime = Runtime.make(mesh="tensor=2", strategy=mine, devices=devices)
    assert runtime.mesh.devices.ravel().tolist() == devices
    assert runtime.rules is mine
    mesh = Mesh(np.array(devices), ("tensor",))
    assert Runtime.make(mesh=mesh, strategy=mine).mesh.axis_names == ("tensor",)


def test_equal_runtimes_are_one_static_argument():
    traced = []
    fn = jax.jit(lambda x, runtime: traced.append(runtime) or x, static_argnums=1)
    fn(1.0, Runtime.make(mesh="expert=2"))
    fn(1.0, Runtime.make(mesh="expert=2"))
    assert len(traced) == 1
    fn(1.0, Runtime.make(mesh="expert=2", page_size=32))
    assert len(traced) == 2


# ---- buckets ---------------------------------------------------------------------------------


def test_a_ladder_doubles_up_to_its_end():
    assert ladder(4, 32) == (4, 8, 16, 32)
    assert ladder(4, 40) == (4, 8, 16, 32, 40)
    assert ladder(4, 3) == (3,)
    with pytest.raises(ValueError, match="cannot start at 0"):
        ladder(0, 8)


def test_a_size_is_rounded_up_to_the_next_bucket():
    buckets = Buckets(rows=(1, 4, 6))
    assert [buckets.pick("rows", n) for n in (1, 2, 4, 5, 6)] == [1, 4, 4, 6, 6]
    with pytest.raises(ValueError, match="rows=7 exceeds the largest bucket 6"):
        buckets.pick("rows", 7)


@pytest.mark.parametrize("steps", [(), (0, 1), (4, 2), (2, 2)])
def test_buckets_that_are_no_ladder_raise(steps):
    with pytest.raises(ValueError, match="buckets: tokens="):
        dataclasses.replace(Buckets(), tokens=steps)
