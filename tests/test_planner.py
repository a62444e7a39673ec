"""Plans by arithmetic, against arrays that were made, programs that were compiled, and figures."""

import functools
import math
import tempfile

import jax
import pytest
import tiny

from qwen_jax.model.cache import abstract_cache, make_cache
from qwen_jax.planner.chips import CHIPS, Topology
from qwen_jax.planner.collectives import imbalance, of_step
from qwen_jax.planner.compiled import compile_step
from qwen_jax.planner.plan import Load, abstract_runtime, make_plan
from qwen_jax.planner.program_text import calls_of, collectives_of, copies_of
from qwen_jax.planner.search import rank
from qwen_jax.runtime import Runtime
from qwen_jax.weights import checkpoint, derive, presets
from qwen_jax.weights.config import ModelConfig

LOAD = Load(batch=4, context=64, chunk=32, dtype="float32", page_size=16)


@functools.cache
def small(variant: str) -> ModelConfig:
    with tempfile.TemporaryDirectory() as directory:
        tiny.write(directory, variant)
        return checkpoint.read_config(checkpoint.resolve(directory))


# ---- topologies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "devices", "jax_name"),
    [("v6e:8x8", 64, "v6e:8x8"), ("v7x:2x2x1", 8, "tpu7x:2x2x1"), (" V5p:4x4x4", 64, "v5p:4x4x4")],
)
def test_a_topology_has_the_devices_that_jax_counts(text, devices, jax_name):
    topology = Topology.parse(text)
    assert (topology.devices, topology.jax_name) == (devices, jax_name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v6:4x4", "no chip 'v6'; did you mean v6e"),
        ("v6e", "write KIND:AxB"),
        ("v6e:0x4", "write KIND:AxB"),
        ("h200:8y", "write KIND:AxB"),
    ],
)
def test_what_is_no_topology_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Topology.parse(text)


def test_gpus_are_planned_by_arithmetic_alone():
    with pytest.raises(ValueError, match="use --fast"):
        _ = Topology.parse("h200:8").jax_name


def test_two_devices_share_a_chip_of_v7x():
    assert CHIPS["v7x"].memory * 2 == 192 << 30
    assert CHIPS["v7x"].bandwidth * 2 == 7.38e12


# ---- bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["moe", "moe_fp8_whole_blocks", "dense"])
@pytest.mark.parametrize("mesh", [{"expert": 4, "tensor": 2}, {"tensor": 2, "expert": 4}])
def test_weights_and_cache_take_the_bytes_that_arrays_take(variant, mesh):
    config = small(variant)
    plan = make_plan(config, Topology.parse("v6e:8"), LOAD, mesh=mesh)
    runtime = Runtime.make(mesh=mesh, dtype="float32", page_size=16)
    weights = derive.init(config, 0, "float32", runtime.mesh, runtime.rules)
    cache = make_cache(config.text, runtime, 4 * 64 // 16)
    first = jax.devices()[0]
    for tree, planned in ((weights, plan.weights), (cache, plan.cache)):
        shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
        assert planned == sum(s.data.nbytes for s in shards if s.device == first)


def test_kv_tokens_are_what_is_left():
    config = presets.preset("Qwen3-30B-A3B")
    plan = make_plan(config, Topology.parse("h200:1"), Load(), mesh={"tensor": 1})
    assert plan.limit == int(0.95 * 141e9)
    left = plan.limit - plan.weights - plan.temporary
    assert plan.kv_tokens == left // 98_304  # bytes of a token in bfloat16
    assert plan.fits


def pages_of_a_device(config: ModelConfig, runtime: Runtime) -> int:
    """Bytes of one layer's 16 pages of 16 float32 positions, on each device."""
    (shape,) = {
        x.sharding.shard_shape(x.shape) for x in abstract_cache(config.text, runtime, 16).pages
    }
    return 4 * math.prod(shape)


# ---- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "mesh", "strategy"),
    [
        ("moe", {"expert": 4, "tensor": 2}, "ep+tp"),
        ("moe_dense_mix", {"expert": 2, "tensor": 2}, "tp-attention+ep"),
        ("dense", {"tensor": 2}, "tp"),
        ("moe", {"data": 2, "expert": 2, "tensor": 2}, "dp-attention+ep"),
    ],
)
def test_messages_are_those_of_the_compiled_program(variant, mesh, strategy):
    config = small(variant)
    runtime = Runtime.make(mesh=mesh, strategy=strategy, dtype="float32", page_size=16)
    program = compile_step(config, runtime, tokens=24, rows=4, pages=16, table_width=4)
    counted: dict[tuple[str, int], int] = {}
    for c in of_step(config, runtime, tokens=24, rows=4):
        counted[c.op, c.bytes] = counted.get((c.op, c.bytes), 0) + c.count
    assert counted == program.collectives
    assert counted
    assert program.donated == config.text.num_hidden_layers * pages_of_a_device(config, runtime)


def test_messages_of_split_tokens_are_about_those_of_the_compiled_program():
    config = small("moe")
    mesh = {"data": 2, "expert": 2, "tensor": 2}
    runtime = Runtime.make(mesh=mesh, strategy="sp+ep", dtype="float32", page_size=16)
    program = compile_step(config, runtime, tokens=24, rows=4, pages=16, table_width=4)
    compiled = sum(size * count for (_, size), count in program.collectives.items())
    planned = sum(c.bytes * c.count for c in of_step(config, runtime, tokens=24, rows=4))
    assert planned == pytest.approx(compiled, rel=0.25)  # XLA chooses what it gathers


def test_one_device_sends_nothing():
    runtime = abstract_runtime({"tensor": 1}, "auto", LOAD)
    assert of_step(small("moe"), runtime, tokens=8, rows=8) == []


def test_sent_bytes_are_those_of_a_ring():
    runtime = abstract_runtime({"expert": 8}, "ep", LOAD)
    (experts,) = of_step(small("moe"), runtime, tokens=8, rows=8)
    size = 8 * 64 * 4
    assert experts.bytes == size
    assert experts.sent == experts.count * 2 * size * 7 / 8


def test_text_of_a_program_is_read():
    text = """
ENTRY %main (x: bf16[64,2048]) -> f32[4] {
  %a = bf16[64,2048]{1,0:T(8,128)} all-reduce(%x), channel_id=1
  %b = (bf16[8,4]{1,0}, bf16[64,4]{1,0}) all-gather-start(%y), channel_id=2
  %c = (f32[16]{0}, f32[16]{0}) all-reduce(%z, %w)
  %d = bf16[64,4]{1,0} all-gather-done(%b)
  %k.2 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
}
"""
    assert collectives_of(text) == {
        ("all-reduce", 64 * 2048 * 2): 1,
        ("all-gather", 64 * 4 * 2): 1,
        ("all-reduce", 2 * 16 * 4): 1,
    }
    assert calls_of(text) == {"k": 1}


def test_a_copy_is_what_writes_to_memory_again_and_nothing_else():
    text = """
%order (p: bf16[1024,3072]) -> bf16[1024,3072] {
  %p = bf16[1024,3072]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[1024,3072]{0,1:T(8,128)(2,1)} copy(%p)
}
%product (q: bf16[1024,3072]) -> bf16[1024,3072] {
  %q = bf16[1024,3072]{1,0:T(8,128)(2,1)} parameter(0)
  %h = bf16[1024,3072]{0,1:T(8,128)(2,1)} fusion(%q), kind=kLoop, calls=%order
  ROOT %i = bf16[1024,3072]{0,1:T(8,128)(2,1)} multiply(%h, %h)
}
%moved (r: bf16[1024,5120]) -> bf16[5120,1024] {
  %r = bf16[1024,5120]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %j = bf16[5120,1024]{1,0:T(8,128)(2,1)} transpose(%r), dimensions={1,0}
}
ENTRY %main (w: bf16[1024,3072], x: bf16[1024,5120], y: f8e4m3fn[1024,2048]) -> f32[4] {
  %a = f8e4m3fn[1024,2048]{1,0} copy(%y)
  %b = f32[4]{0} copy(%z)
  %c = bf16[1024,3072]{0,1:T(8,128)(2,1)} fusion(%w), kind=kOutput, calls=%product
  %d = bf16[5120,1024]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%moved
  %e = (bf16[1024,3072]{1,0:T(8,128)S(1)}, bf16[1024,3072]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %k = (bf16[1024,7168]{1,0}, bf16[1024,7168]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%u)
  ROOT %f = (bf16[1024,4096]{1,0:T(8,128)}, bf16[1024,4096]{1,0}, u32[]{:S(2)}) copy-start(%v)
}
"""
    assert copies_of(text) == [1024 * 5120 * 2, 1024 * 4096 * 2, 1024 * 2048]


def test_one_token_reads_its_experts_from_few_devices():
    config = presets.preset("Qwen3-30B-A3B")
    whole = abstract_runtime({"expert": 128}, "ep", Load())
    # Eight of 128 devices have an expert to read, and 8 / 128 is the average.
    assert imbalance(config, whole, 1) == pytest.approx(16)
    assert imbalance(config, whole, 4096) == pytest.approx(1, abs=1e-3)
    assert imbalance(config, abstract_runtime({"tensor": 4}, "tp", Load()), 1) == 1


# ---- bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batch", "weight_gb"),
    [("Qwen3-30B-A3B", 1, 6.08), ("Qwen3-30B-A3B", 32, 53.1), ("Qwen3-30B-A3B-FP8", 8, 13.3)],
)
def test_decode_is_bound_by_the_bytes_that_must_be_read(name, batch, weight_gb):
    config = presets.preset(name)
    plan = make_plan(
        config, Topology.parse("h200:1"), Load(batch=batch, context=2048), mesh={"tensor": 1}
    )
    seconds = (weight_gb * 1e9 + batch * 1024 * 98_304) / 4.8e12
    assert plan.decode_tokens_per_s == pytest.approx(batch / seconds, rel=0.01)
    assert plan.decode.limited_by == "memory bandwidth"


def test_prefill_is_bound_by_arithmetic():
    config = presets.preset("Qwen3-30B-A3B")
    plan = make_plan(config, Topology.parse("h200:1"), Load(chunk=8192), mesh={"tensor": 1})
    # 2 operations for each of the weights of a token less the head, and for each pair of positions
    # twice per head dimension.
    pairs = 8192 * 8193 / 2 * 48 * 32 * 128 * 2
    products = 8192 * (3_040_000_000 - 311_164_928) + pairs
    assert plan.prefill.limited_by == "arithmetic"
    assert plan.prefill.seconds == pytest.approx(2 * products / 989e12, rel=0.02)


def test_hidden_widths_that_no_kernel_takes_are_ranked_below():
    config, topology = presets.preset("Qwen3-30B-A3B"), Topology.parse("v5e:2x4")
    narrow = make_plan(config, topology, Load(), mesh={"tensor": 8}, strategy="tp")
    wide = make_plan(config, topology, Load(), mesh={"expert": 8}, strategy="dp-attention+ep")
    assert narrow.kernels["ragged_dot"] == "xla"  # 768 / 8 columns are no whole lanes
    assert wide.kernels["ragged_dot"] == "tpu"
    assert rank(wide) < rank(narrow)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": {"expert": 4}}, "has 4 devices, v6e:8 has 8"),
        ({"mesh": {"experts": 8}}, "axes \\['experts'\\] are unknown"),
        ({"mesh": {"tensor": 8}, "strategy": "px"}, "strategy 'px' is unknown"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(small("moe"), Topology.parse("v6e:8"), LOAD, **options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"batch": 0}, "batch=0"), ({"dtype": "f16"}, "dtype='f16'"), ({"utilization": 2}, "utiliz")],
)
def test_a_load_out_of_range_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Load(**changed)
