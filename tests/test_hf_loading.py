"""Hugging Face tensors -> leaves, against plain numpy on the tensors themselves."""

import collections
import dataclasses
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny

from qwen_jax.runtime import Runtime
from qwen_jax.weights import hf
from qwen_jax.weights.checkpoint import load
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.hf_config import from_hf
from qwen_jax.weights.load import open_sources
from qwen_jax.weights.params import table
from qwen_jax.weights.quant import dequantize
from qwen_jax.weights.safetensors import Checkpoint

FP8 = ("moe_fp8", "moe_fp8_cut_heads", "dense_fp8")


def one_device(dtype: str = "float32") -> Runtime:
    runtime = Runtime.make(dtype="float32", devices=jax.devices()[:1])
    return runtime if dtype == "float32" else replace_dtype(runtime, dtype)


def replace_dtype(runtime: Runtime, dtype: str) -> Runtime:
    """On CPU `Runtime.make` answers bfloat16 with float32."""
    return dataclasses.replace(runtime, dtype=dtype)


def same_bits(one, other) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return np.array_equal(one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8))


def expected_layer(tensors, config: dict, layer: int) -> dict[str, np.ndarray]:
    """A layer's leaves, each written out by hand from the letters of the glossary."""
    at = f"model.layers.{layer}."
    d, n, k = (config[x] for x in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    h = config.get("head_dim", d // n)
    found = {
        "attn_norm": tensors[f"{at}input_layernorm.weight"],
        "mlp_norm": tensors[f"{at}post_attention_layernorm.weight"],
        "attn.q_norm": tensors[f"{at}self_attn.q_norm.weight"],
        "attn.k_norm": tensors[f"{at}self_attn.k_norm.weight"],
        "attn.o": tensors[f"{at}self_attn.o_proj.weight"].T.reshape(n, h, d),
    }
    for x, heads in (("q", n), ("k", k), ("v", k)):
        w = tensors[f"{at}self_attn.{x}_proj.weight"]
        found[f"attn.{x}"] = np.stack([w[i * h : (i + 1) * h].T for i in range(heads)], axis=1)
    if config.get("attention_bias"):
        found["attn.o_bias"] = tensors[f"{at}self_attn.o_proj.bias"]
        for x, heads in (("q", n), ("k", k), ("v", k)):
            bias = tensors[f"{at}self_attn.{x}_proj.bias"]
            found[f"attn.{x}_bias"] = bias.reshape(heads, h)
    if f"{at}mlp.gate.weight" not in tensors:
        gate, up, down = (tensors[f"{at}mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
        return found | {"mlp.gate_up": np.stack([gate.T, up.T], axis=1), "mlp.down": down.T}
    experts = range(len(tensors[f"{at}mlp.gate.weight"]))
    gate, up, down = (
        [tensors[f"{at}mlp.experts.{e}.{x}_proj.weight"].T for e in experts]
        for x in ("gate", "up", "down")
    )
    return found | {
        "mlp.router": tensors[f"{at}mlp.gate.weight"].T,
        "mlp.gate_up": np.stack([np.stack(pair, axis=1) for pair in zip(gate, up, strict=True)]),
        "mlp.down": np.stack(down),
    }


def leaf(tree, path: str):
    for name in path.split("."):
        tree = tree[int(name)] if name.isdigit() else getattr(tree, name)
    return tree


def plain(variant: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The tensors that `tiny.write` puts into the file."""
    return tiny.tensors(tiny.VARIANTS[variant], tiny.SEED, dtype=dtype)


def check_weights(params, tensors, config: dict, dtype) -> None:
    """Every leaf of a model, and that there are no others."""
    wanted = {
        "embed": tensors["model.embed_tokens.weight"],
        "norm": tensors["model.norm.weight"],
    }
    if not config["tie_word_embeddings"]:
        wanted["head"] = tensors["lm_head.weight"].T
    for i in range(config["num_hidden_layers"]):
        found = expected_layer(tensors, config, i)
        wanted |= {f"layers.{i}.{name}": x for name, x in found.items()}
    for path, x in wanted.items():
        assert same_bits(leaf(params, path), x.astype(dtype)), path
    assert len(jax.tree.leaves(params)) == len(wanted)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [v for v in tiny.VARIANTS if "fp8" not in v])
def test_every_leaf_is_its_tensors_transposed(variant, tmp_path):
    directory = tiny.write(tmp_path, variant)
    loaded = load(directory, runtime=one_device())
    check_weights(loaded.params, plain(variant), tiny.VARIANTS[variant], np.float32)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_weights_are_rounded_once_to_the_dtype_of_the_runtime(stored, wanted, tmp_path):
    directory = tiny.write(tmp_path, "moe", dtype=stored)
    loaded = load(directory, runtime=one_device(wanted))
    dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[wanted]
    check_weights(loaded.params, plain("moe", stored), tiny.VARIANTS["moe"], dtype)
    assert loaded.config.dtype == stored


@pytest.mark.parametrize("variant", FP8)
def test_fp8_times_its_scales_is_the_dequantised_checkpoint(variant, tmp_path):
    directory = tiny.write(tmp_path / "fp8", variant)
    twin = tiny.write(tmp_path / "twin", variant, dequantised=True)
    loaded, exact = (load(x, runtime=one_device()) for x in (directory, twin))
    rows = jax.tree.leaves(table(loaded.config))
    ours = jax.tree.structure(table(loaded.config)).flatten_up_to(loaded.params)
    for row, x, y in zip(rows, ours, jax.tree.leaves(exact.params), strict=True):
        np.testing.assert_array_equal(np.asarray(dequantize(x)), np.asarray(y), err_msg=row.name)
    quantised = [row.name for row, x in zip(rows, ours, strict=True) if hasattr(x, "blocks")]
    skipped = tiny.VARIANTS[variant]["quantization_config"]["modules_to_not_convert"]
    assert quantised
    assert not any(f".{skip}." in f".{name}." for skip in skipped for name in quantised)


def test_fp8_values_keep_their_bits(tmp_path):
    directory = tiny.write(tmp_path, "moe_fp8")
    params = load(directory, runtime=one_device()).params
    w = Checkpoint(directory).tensor("model.layers.1.mlp.experts.3.up_proj.weight")
    assert same_bits(params.layers[1].mlp.gate_up.values[3, :, 1], np.ascontiguousarray(w.T))


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ("bfloat16", "bfloat16"),
        ("float32", "float32"),
        ("float16", "float32"),
        ("mixed", "float32"),
    ],
)
def test_scale_dtype_is_read_from_the_file(scales, expected, tmp_path):
    def change(name, x):
        if not name.endswith("_scale_inv"):
            return x
        mixed = "float32" if ".q_proj" in name else "bfloat16"
        return x.astype(tiny.weights.DTYPES[mixed if scales == "mixed" else scales])

    directory = rewrite(tiny.write(tmp_path, "moe_fp8"), change)
    loaded = load(directory, runtime=one_device())
    assert loaded.config.quantization.scale_dtype == expected
    assert str(loaded.params.layers[0].attn.q.scale.dtype) == expected
    assert str(loaded.params.layers[0].mlp.down.scale.dtype) == expected


# ---- fused experts -------------------------------------------------------------------------------


def write_sized(directory: pathlib.Path, variant: str, **sizes: int) -> pathlib.Path:
    """A variant with other sizes, so that a transposed stack has another shape."""
    config = {**tiny.VARIANTS[variant], **sizes}
    tensors = tiny.tensors(config, 0, dtype="float32")
    if "quantization_config" in config:
        tensors = tiny.quantise(tensors, config["quantization_config"], ml_dtypes.bfloat16)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tiny.save_safetensors(directory / "model.safetensors", tensors)
    return directory


def fuse(directory: pathlib.Path, variant: str, input_first: bool) -> pathlib.Path:
    """Stacks the experts of a tiny checkpoint as vision-language checkpoints have them."""
    old = read_all(directory)
    config = tiny.VARIANTS[variant]
    new = {name: x for name, x in old.items() if ".experts." not in name}
    for i in range(config["num_hidden_layers"]):
        at, experts = f"model.layers.{i}.mlp.experts.", range(config["num_experts"])
        for suffix in ("", "_scale_inv") if "fp8" in variant else ("",):
            gate, up, down = (
                np.stack([old[f"{at}{e}.{x}_proj.weight{suffix}"] for e in experts])
                for x in ("gate", "up", "down")
            )
            both = np.concatenate([gate, up], axis=1)
            turn = (0, 2, 1) if input_first else (0, 1, 2)
            new[f"{at}gate_up_proj{suffix}"] = np.ascontiguousarray(both.transpose(turn))
            new[f"{at}down_proj{suffix}"] = np.ascontiguousarray(down.transpose(turn))
    tiny.save_safetensors(directory / "model.safetensors", new)
    return directory


@pytest.mark.parametrize("input_first", [True, False])
@pytest.mark.parametrize(("variant", "width"), [("moe", 40), ("moe_fp8", 256)])
def test_fused_experts_load_like_single_ones(variant, width, input_first, tmp_path):
    single = write_sized(tmp_path / "single", variant, moe_intermediate_size=width)
    fused = write_sized(tmp_path / "fused", variant, moe_intermediate_size=width)
    fuse(fused, variant, input_first)
    one, other = (load(x, runtime=one_device()) for x in (single, fused))
    assert jax.tree.all(jax.tree.map(same_bits, one.params, other.params))


def test_a_fused_stack_that_fits_both_layouts_is_refused(tmp_path):
    directory = write_sized(tmp_path, "moe", moe_intermediate_size=64)
    fuse(directory, "moe", input_first=True)
    with pytest.raises(ValueError, match=r"down_proj: shape \(8, 64, 64\) fits 2 of the layouts"):
        load(directory, runtime=one_device())


def test_fused_scales_that_cover_gate_and_up_are_refused(tmp_path):
    directory = tiny.write(tmp_path, "moe_fp8")  # experts of 160 are one and a quarter block
    old = read_all(directory)
    new = {name: x for name, x in old.items() if ".experts." not in name}
    for i in range(2):
        at = f"model.layers.{i}.mlp.experts."
        for name, shape, scales in (
            ("gate_up_proj", (4, 192, 320), (4, 2, 3)),
            ("down_proj", (4, 160, 192), (4, 2, 2)),
        ):
            new[at + name] = np.zeros(shape, ml_dtypes.float8_e4m3fn)
            new[f"{at}{name}_scale_inv"] = np.ones(scales, ml_dtypes.bfloat16)
    tiny.save_safetensors(directory / "model.safetensors", new)
    with pytest.raises(ValueError, match=r"gate_up_proj: blocks of .* cut through gate and up"):
        load(directory, runtime=one_device())


# ---- once, and only what is asked for ------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch) -> collections.Counter:
    """Counts how often each tensor is read."""
    counts = collections.Counter()
    original = Checkpoint.tensor

    def counting(self, name):
        counts[name] += 1
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", counting)
    return counts


@pytest.mark.parametrize("variant", ["moe", "moe_dense_mix", "moe_bias", "dense_tied", *FP8])
def test_every_tensor_is_read_exactly_once(variant, tmp_path, reads):
    directory = tiny.write(tmp_path, variant, shards=3)
    load(directory, runtime=one_device())
    assert reads == dict.fromkeys(Checkpoint(directory).names, 1)


def test_replicas_do_not_read_again_and_experts_are_read_by_their_owner(tmp_path, reads):
    directory = tiny.write(tmp_path, "moe")
    load(directory, runtime=Runtime.make(mesh="expert=4,data=2", strategy="ep"))
    assert reads == dict.fromkeys(Checkpoint(directory).names, 1)


def test_a_slice_touches_no_other_expert_and_no_other_column(tmp_path):
    def poison(name, x):
        if ".experts.1." in name:
            return np.full_like(x, np.nan)
        if name.endswith("experts.0.down_proj.weight"):
            x = x.copy()
            x[:, 8:] = np.nan
        return x

    directory = rewrite(tiny.write(tmp_path, "moe"), poison)
    checkpoint = Checkpoint(directory)
    _, sources = open_sources(read_config(directory), checkpoint)
    down = sources.layers[0].mlp.down
    index = (slice(0, 1), slice(0, 8), slice(None))
    part = hf.read_values(down, checkpoint, np.float32, index)
    whole = plain("moe")["model.layers.0.mlp.experts.0.down_proj.weight"]
    assert same_bits(part, np.ascontiguousarray(whole.T[None, :8]))
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj\.weight: .* NaN"):
        hf.read_values(down, checkpoint, np.float32, (slice(0, 1), slice(0, 9), slice(None)))


# ---- what does not fit ---------------------------------------------------------------------------


def read_config(directory: pathlib.Path) -> ModelConfig:
    return from_hf(json.loads((directory / "config.json").read_text()))


def read_all(directory: pathlib.Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint(directory)
    return {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names}


def rewrite(directory: pathlib.Path, change) -> pathlib.Path:
    """Writes the weights again with ``change(name, tensor)`` instead of each; None drops it."""
    changed = {name: change(name, x) for name, x in read_all(directory).items()}
    kept = {name: x for name, x in changed.items() if x is not None}
    tiny.save_safetensors(directory / "model.safetensors", kept)
    return directory


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
