"""What the kernels are told of the published models, whole and as one shard."""

import pytest

from pallas_kernels import paged_attention, ragged_dot, segment_attention
from qwen_jax import kernel_facts, sharding
from qwen_jax.runtime import KV_DTYPES
from qwen_jax.weights import presets


def facts(model, mesh="tensor=1", kv="bfloat16"):
    """Facts of a preset under the rules that "auto" takes."""
    return kernel_facts.of(
        presets.preset(model),
        mesh=sharding.make_mesh(mesh),
        rules=sharding.strategy("auto"),
        dtype="bfloat16",
        kv_dtype=KV_DTYPES[kv],
        page_size=64,
    )


def test_a_sparse_layer_has_two_products():
    common = {"x_dtype": "bfloat16", "w_dtype": "bfloat16"}
    assert facts("Qwen3-30B-A3B")["ragged_dot"] == (
        ragged_dot.Facts(128, 2048, 768, "swiglu", out_dtype="bfloat16", **common),
        ragged_dot.Facts(128, 768, 2048, None, out_dtype="float32", **common),
    )


def test_blocks_and_scales_are_told_as_the_checkpoint_has_them():
    gate_up, down = facts("Qwen3-Coder-480B-A35B-Instruct-FP8", "expert=8")["ragged_dot"]
    assert (gate_up.experts, gate_up.w_dtype, gate_up.scale_dtype) == (
        20,
        "float8_e4m3fn",
        "bfloat16",
    )
    assert (gate_up.blocks, gate_up.scale_shape) == ((1, 1, 128, 128), (20, 2, 48, 20))
    assert (down.blocks, down.scale_shape) == ((1, 128, 128), (20, 20, 48))


def test_dense_text_has_no_product_and_no_picture():
    found = facts("Qwen3-0.6B")
    assert found["ragged_dot"] == ()
    assert found["segment_attention"] == ()


@pytest.mark.parametrize(
    ("mesh", "heads", "kv_heads"),
    [("tensor=1", 32, 4), ("tensor=4", 8, 1), ("tensor=8", 4, 1), ("expert=8", 32, 4)],
)
def test_a_shard_has_its_heads_and_one_for_keys_at_least(mesh, heads, kv_heads):
    (found,) = facts("Qwen3-30B-A3B", mesh, "fp8")["paged_attention"]
    assert found == paged_attention.Facts(
        heads, kv_heads, 128, 64, "bfloat16", "float8_e4m3fn", scaled=True
    )


def test_the_towers_heads_are_its_own():
    found = facts("Qwen3-VL-8B-Instruct", "tensor=2")["segment_attention"]
    assert found == (segment_attention.Facts(heads=8, head_dim=72, dtype="bfloat16"),)
