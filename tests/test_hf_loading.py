"""Hugging Face tensors -> leaves, against plain numpy on the tensors themselves."""

import collections

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from checkpoint_samples import one_device, rewrite, same

from qwen_jax.runtime import Runtime
from qwen_jax.weights import hf
from qwen_jax.weights.checkpoint import load, read_config, resolve
from qwen_jax.weights.load import open_sources
from qwen_jax.weights.params import table
from qwen_jax.weights.quant import dequantize
from qwen_jax.weights.safetensors import Checkpoint

FP8 = ("moe_fp8", "moe_fp8_cut_heads", "dense_fp8")


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
        "mlp.gate_up": np.stack([np.stack(pair) for pair in zip(gate, up, strict=True)]),
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
        assert same(leaf(params, path), x.astype(dtype)), path
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
    assert same(params.layers[1].mlp.gate_up.values[3, 1], np.ascontiguousarray(w.T))


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
    _, sources = open_sources(read_config(resolve(directory)), checkpoint)
    down = sources.layers[0].mlp.down
    index = (slice(0, 1), slice(0, 8), slice(None))
    part = hf.read_values(down, checkpoint, np.float32, index)
    whole = plain("moe")["model.layers.0.mlp.experts.0.down_proj.weight"]
    assert same(part, np.ascontiguousarray(whole.T[None, :8]))
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj\.weight: .* NaN"):
        hf.read_values(down, checkpoint, np.float32, (slice(0, 1), slice(0, 9), slice(None)))
