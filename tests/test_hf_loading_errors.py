"""Hugging Face checkpoints that do not fit, or are damaged."""

import json

import ml_dtypes
import numpy as np
import pytest
import tiny
from checkpoint_samples import one_device, read_all, rewrite

from qwen_jax.weights.checkpoint import load


def test_misses_extras_shapes_and_dtypes_come_in_one_error(tmp_path):
    def change(name, x):
        if name == "model.layers.1.self_attn.k_norm.weight":
            return None
        if name == "model.layers.0.mlp.gate.weight":
            return np.zeros((7, 64), np.float32)
        if name == "model.norm.weight":
            return x.astype(np.int8)
        return x

    directory = rewrite(tiny.write(tmp_path, "moe"), change)
    tensors = read_all(directory) | {"model.layers.0.mlp.shared.weight": np.zeros(3, np.float32)}
    tiny.save_safetensors(directory / "model.safetensors", tensors)
    with pytest.raises(ValueError) as caught:
        load(directory, runtime=one_device())
    message = str(caught.value)
    assert "missing tensors (1):\n    model.layers.1.self_attn.k_norm.weight" in message
    assert "tensors nobody asked for (1):\n    model.layers.0.mlp.shared.weight" in message
    assert "model.layers.0.mlp.gate.weight: float32[7, 64], expected" in message
    assert "model.norm.weight: int8[64], expected float32 or float16 or bfloat16[64]" in message


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("num_hidden_layers", 1, r"nobody asked for \(33\)"),
        ("num_hidden_layers", 3, r"missing tensors \(33\)(.|\n)* and 21 more"),
        ("num_experts", 9, r"experts\.8\.gate_proj"),
        ("num_experts", 7, r"experts\.7\.down_proj"),
        ("hidden_size", 128, r"embed_tokens\.weight: float32\[128, 64\], expected .*\[128, 128\]"),
        ("tie_word_embeddings", True, r"lm_head\.weight: differs from model\.embed"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(key, value, match, tmp_path):
    directory = tiny.write(tmp_path, "moe")
    config = json.loads((directory / "config.json").read_text()) | {key: value}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        load(directory, runtime=one_device())


def test_an_fp8_file_without_its_quantization_config_is_refused(tmp_path):
    directory = tiny.write(tmp_path, "dense_fp8")
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"q_proj\.weight: float8_e4m3fn.*expected float32"):
        load(directory, runtime=one_device())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_name_their_tensor(dtype, bad, tmp_path):
    def change(name, x):
        if name == "model.layers.1.mlp.experts.5.up_proj.weight":
            x = x.copy()
            x[17, 31] = bad
        return x

    directory = rewrite(tiny.write(tmp_path, "moe", dtype=dtype), change)
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.experts\.5\.up_proj\.weight: at least 1"
    ):
        load(directory, runtime=one_device())


@pytest.mark.parametrize("tensor", ["q_proj.weight", "q_proj.weight_scale_inv"])
def test_nan_in_fp8_values_and_in_scales_is_found(tensor, tmp_path):
    def change(name, x):
        if name.endswith(tensor):
            x = x.copy()
            x[1, 0] = np.nan
        return x

    directory = rewrite(tiny.write(tmp_path, "dense_fp8"), change)
    with pytest.raises(ValueError, match=f"{tensor}: at least 1 values are NaN"):
        load(directory, runtime=one_device())


def test_the_largest_finite_values_are_not_taken_for_infinity(tmp_path):
    def change(name, x):
        return np.full_like(x, ml_dtypes.finfo(x.dtype).max) if name.endswith("gate.weight") else x

    directory = rewrite(tiny.write(tmp_path, "moe", dtype="bfloat16"), change)
    router = load(directory, runtime=one_device()).params.layers[0].mlp.router
    assert np.asarray(router).max() == float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def test_a_tied_checkpoint_may_ship_an_equal_head(tmp_path):
    loaded = load(tiny.write(tmp_path, "dense_tied_with_head"), runtime=one_device())
    assert loaded.params.head is None


def test_a_tied_checkpoint_with_another_head_is_refused(tmp_path):
    def change(name, x):
        return x * np.float32(1.001) if name == "lm_head.weight" else x

    directory = rewrite(tiny.write(tmp_path, "dense_tied_with_head"), change)
    with pytest.raises(ValueError, match=r"lm_head\.weight: differs from model\.embed"):
        load(directory, runtime=one_device())


def test_a_truncated_file_and_a_missing_shard_are_named(tmp_path):
    directory = tiny.write(tmp_path, "moe", shards=3)
    shard = directory / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors: is 10 bytes short"):
        load(directory, runtime=one_device())
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 files .* missing: model-00002"):
        load(directory, runtime=one_device())
