"""The table against names and shapes written out from the published layouts, and the real lists."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from published import CONFIGS, FP8_BYTES, FP8_SCALES, TOTALS, changed, fp8_storage

from qwen_jax import dims
from qwen_jax.weights import derive, hf_config, params, presets
from qwen_jax.weights.hf import Source
from qwen_jax.weights.params import Attention, Layer, Mlp, Moe, Param


def disk(config, form=0):
    """Name -> shape of every tensor that a checkpoint of ``config`` has, scales without shapes.

    Args:
        config: the model.
        form: which of a row's forms on disk, where it has several.
    """
    found = {}
    for row in jax.tree.leaves(params.table(config)):
        name, layout = row.forms[min(form, len(row.forms) - 1)]
        source = Source(row, name, layout, derive.quantization(row, config))
        for tensor in source.tensors():
            assert tensor not in found, f"{tensor} is read twice"
            is_scale = tensor.endswith("_scale_inv")
            found[tensor] = None if is_scale else dims.shape(layout, row.size)
    return found


# ---- names and shapes, written out -------------------------------------------------------------


def text_tensors(c, prefix, fused=False):
    """What the files of a text decoder hold, by nn.Linear's [out, in]."""
    D, I, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    N, K, H = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    E, F = c.get("num_experts", 0), c.get("moe_intermediate_size", 0)
    found = {"embed_tokens.weight": (V, D), "norm.weight": (D,)}
    for i in range(c["num_hidden_layers"]):
        layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        for name, heads in (("q", N), ("k", K), ("v", K)):
            layer[f"self_attn.{name}_proj.weight"] = (heads * H, D)
            if c["attention_bias"]:
                layer[f"self_attn.{name}_proj.bias"] = (heads * H,)
        layer["self_attn.o_proj.weight"] = (D, N * H)
        if c["attention_bias"]:
            layer["self_attn.o_proj.bias"] = (D,)
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (H,)
        sparse = E and i not in c["mlp_only_layers"] and (i + 1) % c["decoder_sparse_step"] == 0
        wide, experts = (F, [f"experts.{e}." for e in range(E)]) if sparse else (I, [""])
        if sparse:
            layer["mlp.gate.weight"] = (E, D)
        if sparse and fused:
            layer["mlp.experts.gate_up_proj"] = (E, D, 2 * F)
            layer["mlp.experts.down_proj"] = (E, F, D)
        else:
            for each in experts:
                layer[f"mlp.{each}gate_proj.weight"] = (wide, D)
                layer[f"mlp.{each}up_proj.weight"] = (wide, D)
                layer[f"mlp.{each}down_proj.weight"] = (D, wide)
        found |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return {prefix + name: shape for name, shape in found.items()}


def vision_tensors(c):
    D, I, M, O = (
        c["hidden_size"],
        c["intermediate_size"],
        4 * c["hidden_size"],
        c["out_hidden_size"],
    )
    linear = {"patch_embed.proj": (D, 3, 2, 16, 16)}
    norms = {"merger.norm": (D,)}
    for i in range(c["depth"]):
        linear |= {f"blocks.{i}.attn.qkv": (3 * D, D), f"blocks.{i}.attn.proj": (D, D)}
        linear |= {f"blocks.{i}.mlp.linear_fc1": (I, D), f"blocks.{i}.mlp.linear_fc2": (D, I)}
        norms |= {f"blocks.{i}.norm1": (D,), f"blocks.{i}.norm2": (D,)}
    mergers = ["merger", *(f"deepstack_merger_list.{j}" for j in range(3))]
    for merger in mergers:
        linear |= {f"{merger}.linear_fc1": (M, M), f"{merger}.linear_fc2": (O, M)}
    norms |= {f"{merger}.norm": (M,) for merger in mergers[1:]}
    both = linear | norms
    found = {f"{name}.weight": shape for name, shape in both.items()}
    found |= {f"{name}.bias": shape[:1] for name, shape in both.items()}
    return {f"model.visual.{name}": shape for name, shape in found.items()} | {
        "model.visual.pos_embed.weight": (2304, D)
    }


TINY = {"num_hidden_layers": 3, "vocab_size": 320, "hidden_size": 96, "head_dim": 64}
DENSE = changed("Qwen3-0.6B", **TINY)
MOE = changed("Qwen3-30B-A3B", **TINY, num_experts=5, num_experts_per_tok=2)
HEAD = {"lm_head.weight": (320, 96)}


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_reads_the_tensors_of_its_file(tied):
    config = hf_config.from_hf({**DENSE, "tie_word_embeddings": tied})
    assert disk(config) == text_tensors(DENSE, "model.") | ({} if tied else HEAD)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [0, 2]},
        {"attention_bias": True},
    ],
)
def test_a_mixture_reads_the_tensors_of_its_file(changes):
    raw = {**MOE, **changes}
    assert disk(hf_config.from_hf(raw)) == text_tensors(raw, "model.") | HEAD


@pytest.mark.parametrize("name", ["Qwen3-VL-2B-Instruct", "Qwen3-VL-30B-A3B-Instruct"])
def test_a_vision_language_model_reads_the_tensors_of_its_file(name):
    raw = CONFIGS[name]
    fused = "num_experts" in raw["text_config"]
    found = disk(hf_config.from_hf(raw), form=1)
    head = {} if raw["tie_word_embeddings"] else {"lm_head.weight": (151936, 2048)}
    text = text_tensors(raw["text_config"], "model.language_model.", fused)
    assert found == text | vision_tensors(raw["vision_config"]) | head


def test_fused_experts_have_a_second_layout_with_the_output_first():
    table = params.table(presets.preset("Qwen3-VL-30B-A3B-Instruct"))
    gate_up, down = table.layers[0].mlp.gate_up, table.layers[0].mlp.down
    at = "model.language_model.layers.0.mlp.experts"
    assert [name for name, _ in gate_up.forms[1:]] == [f"{at}.gate_up_proj"] * 2
    shapes = [dims.shape(layout, gate_up.size) for _, layout in gate_up.forms[1:]]
    assert shapes == [(128, 2048, 1536), (128, 1536, 2048)]
    shapes = [dims.shape(layout, down.size) for _, layout in down.forms[1:]]
    assert shapes == [(128, 768, 2048), (128, 2048, 768)]


def test_the_first_half_of_fused_experts_is_gate_and_the_second_up():
    raw = changed(
        "Qwen3-VL-30B-A3B-Instruct", "text_config", hidden_size=4, moe_intermediate_size=3
    )
    raw["vision_config"]["out_hidden_size"] = 4
    row = params.table(hf_config.from_hf(raw)).layers[0].mlp.gate_up
    (_, input_first), (_, output_first) = row.forms[1:]
    x = np.arange(128 * 4 * 6).reshape(128, 4, 6)
    ours = dims.rearrange(x, input_first, row.dims, row.size)
    np.testing.assert_array_equal(ours[:, 0], x[:, :, :3])
    np.testing.assert_array_equal(ours[:, 1], x[:, :, 3:])
    other = dims.rearrange(x.transpose(0, 2, 1), output_first, row.dims, row.size)
    np.testing.assert_array_equal(ours, other)


def test_an_fp8_model_reads_a_scale_beside_every_quantised_tensor():
    raw = {**MOE, "quantization_config": fp8_storage(3)}
    expected = text_tensors(raw, "model.") | HEAD
    scaled = [n for n in expected if "_proj." in n]
    assert disk(hf_config.from_hf(raw)) == expected | {f"{n}_scale_inv": None for n in scaled}
    assert len(scaled) == 3 * (4 + 5 * 3)


def test_matrices_of_a_stack_may_be_left_unquantised_by_name():
    skip = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up")]
    storage = {**fp8_storage(3), "modules_to_not_convert": ["lm_head", *skip]}
    config = hf_config.from_hf({**DENSE, "quantization_config": storage})
    layers = params.table(config).layers
    assert derive.quantization(layers[1].mlp.gate_up, config) is None
    assert derive.quantization(layers[1].mlp.down, config) is config.quantization
    assert derive.quantization(layers[0].mlp.gate_up, config) is config.quantization


# ---- published totals, real lists --------------------------------------------------------------


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_and_tensors_are_as_many_as_published(name):
    config = presets.preset(name)
    form = 1 if config.vision else 0
    assert (derive.count(config), len(disk(config, form))) == TOTALS[name]


def test_an_fp8_model_has_as_many_scales_and_bytes_as_published():
    arrays = jax.tree.leaves(derive.abstract(presets.preset("Qwen3-Coder-30B-A3B-Instruct-FP8")))
    assert sum(math.prod(x.shape) for x in arrays) == TOTALS["Qwen3-30B-A3B"][0] + FP8_SCALES
    assert sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays) == FP8_BYTES


def test_names_and_shapes_equal_the_real_lists(shared_data):
    files = sorted((shared_data / "tensor_specs").glob("*.json"))
    assert len(files) >= 6
    for file in files:
        config = presets.preset(file.stem)
        spec = {name: tuple(shape) for name, (_, shape) in json.loads(file.read_text()).items()}
        if config.tie_word_embeddings:
            spec.pop("lm_head.weight", None)
        assert disk(config, form=1 if config.vision else 0) == spec, file


def test_names_equal_every_real_index(shared_data):
    files = sorted(shared_data.glob("*/model.safetensors.index.json"))
    assert len(files) >= 4
    for file in files:
        raw = json.loads((file.parent / "config.json").read_text())
        index = json.loads(file.read_text())["weight_map"]
        assert set(disk(hf_config.from_hf(raw))) == set(index), file


# ---- the table itself --------------------------------------------------------------------------


def test_a_class_without_arguments_is_its_part_of_the_table():
    assert Moe().router == Param("D R", "mlp.gate.weight", "R D", over="D", linear=True)
    assert isinstance(Layer().attn, Attention)
    assert isinstance(Layer().mlp, Mlp)
    assert Attention() == Attention()
    assert dataclasses.replace(Layer(), mlp=Moe()).mlp.gate_up.dims == "E P D F"


def test_every_row_names_one_array_and_its_layouts_name_its_letters():
    for config in presets.PRESETS.values():
        for row in jax.tree.leaves(params.table(config)):
            letters = set(dims.parse(row.dims))
            for name, layout in row.forms:
                stacked = {x for x in "EP" if f"{{{x}}}" in name}
                inner = {x for axis in dims.groups(layout) for x in axis}
                assert inner | stacked == letters, row.name
                assert not inner & stacked, row.name
            assert set(row.over.split()) <= letters
            assert (row.init == "normal") == bool(row.over)


def test_a_tied_model_has_no_head_and_a_text_model_no_tower():
    table = params.table(presets.preset("Qwen3-0.6B"))
    assert table.head is None
    assert table.vision is None
    assert params.table(presets.preset("Qwen3-VL-8B-Instruct")).head.shape == (4096, 151936)
