"""The published models as data typed from their own files, independent of the package's presets.

Knows config.json's keys and the models' published figures; knows nothing of qwen_jax.
"""

import copy
from typing import Any

Config = dict[str, Any]

# name: layers, width, heads, kv heads, dense width, theta, positions, tied
_DENSE = {"Qwen3-0.6B": (28, 1024, 16, 8, 3072, 1000000, 40960, True)}
# name: the same without tied, then experts, active, expert width
_MOE = {
    "Qwen3-30B-A3B": (48, 2048, 32, 4, 6144, 1000000.0, 40960, 128, 8, 768),
    "Qwen3-30B-A3B-Instruct-2507": (48, 2048, 32, 4, 6144, 10000000, 262144, 128, 8, 768),
    "Qwen3-30B-A3B-Thinking-2507": (48, 2048, 32, 4, 6144, 10000000, 262144, 128, 8, 768),
    "Qwen3-Coder-30B-A3B-Instruct": (48, 2048, 32, 4, 6144, 10000000, 262144, 128, 8, 768),
    "Qwen3-Coder-480B-A35B-Instruct": (62, 6144, 96, 8, 8192, 10000000, 262144, 160, 8, 2560),
}
_FP8 = ("Qwen3-30B-A3B", "Qwen3-Coder-30B-A3B-Instruct")
_VL = {
    "Qwen3-VL-2B-Instruct": (28, 2048, 16, 8, 6144, 5000000, 262144, True),
    "Qwen3-VL-4B-Instruct": (36, 2560, 32, 8, 9728, 5000000, 262144, True),
    "Qwen3-VL-8B-Instruct": (36, 4096, 32, 8, 12288, 5000000, 262144, False),
}
_VL_MOE = {
    "Qwen3-VL-30B-A3B-Instruct": (48, 2048, 32, 4, 6144, 5000000, 262144, 128, 8, 768),
    "Qwen3-VL-235B-A22B-Thinking": (94, 4096, 64, 4, 12288, 5000000, 262144, 128, 8, 1536),
}
# Parameters, and tensors in the files; a tied model's lm_head is counted in neither.
TOTALS = {
    "Qwen3-0.6B": (596_049_920, 310),
    "Qwen3-30B-A3B": (30_532_122_624, 18_867),
    "Qwen3-30B-A3B-FP8": (30_532_122_624, 37_491),
    "Qwen3-VL-2B-Instruct": (2_127_532_032, 625),
    "Qwen3-VL-8B-Instruct": (8_767_123_696, 750),
    "Qwen3-VL-30B-A3B-Instruct": (31_070_754_032, 882),
    "Qwen3-VL-235B-A22B-Instruct": (235_670_022_896, 1_388),
    "Qwen3-Coder-480B-A35B-Instruct": (480_154_875_392, 30_321),
}
FP8_SCALES = 30_533_947_392 - 30_532_122_624  # of the 30B models: what their index counts besides
FP8_BYTES = 31_170_895_872  # total_size of Qwen3-Coder-30B-A3B-Instruct-FP8's index


def _text(layers, width, heads, kv_heads, inner, theta, positions) -> Config:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": theta,
        "use_cache": True,
        "vocab_size": 151936,
    }


def _experts(experts, active, width) -> Config:
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "num_experts": experts,
        "num_experts_per_tok": active,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def _text_model(kind: str, class_: str, text: Config, tied: bool) -> Config:
    own = {"architectures": [class_], "model_type": kind, "tie_word_embeddings": tied}
    old = {"max_window_layers": text["num_hidden_layers"], "sliding_window": None}
    version = {"torch_dtype": "bfloat16", "transformers_version": "4.51.0"}
    return {**own, **text, **old, "use_sliding_window": False, **version}


def _vl_model(kind: str, class_: str, text: Config, tied: bool, small: bool) -> Config:
    mrope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    own = {"model_type": f"{kind}_text", "dtype": "bfloat16", "rope_scaling": mrope}
    return {
        "architectures": [class_],
        "image_token_id": 151655,
        "model_type": kind,
        "text_config": {**text, **own},
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17] if small else [8, 16, 24],
            "depth": 24 if small else 27,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1024 if small else 1152,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 4096 if small else 4304,
            "model_type": kind,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


def fp8_storage(layers: int) -> Config:
    """The `quantization_config` of the published text models."""
    parts = ("input_layernorm", "mlp.gate", "post_attention_layernorm")
    kept = [f"model.layers.{i}.{part}" for i in range(layers) for part in parts]
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", *kept],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def _configs() -> dict[str, Config]:
    found = {}
    for name, (*sizes, tied) in _DENSE.items():
        found[name] = _text_model("qwen3", "Qwen3ForCausalLM", _text(*sizes), tied)
    for name, sizes in _MOE.items():
        text = {**_text(*sizes[:7]), **_experts(*sizes[7:])}
        found[name] = _text_model("qwen3_moe", "Qwen3MoeForCausalLM", text, False)
    for name in _FP8:
        layers = found[name]["num_hidden_layers"]
        found[f"{name}-FP8"] = {**found[name], "quantization_config": fp8_storage(layers)}
    for name, (*sizes, tied) in _VL.items():
        small = sizes[1] < 4096
        class_ = "Qwen3VLForConditionalGeneration"
        found[name] = _vl_model("qwen3_vl", class_, _text(*sizes), tied, small)
    for name, sizes in _VL_MOE.items():
        text = {**_text(*sizes[:7]), **_experts(*sizes[7:])}
        class_ = "Qwen3VLMoeForConditionalGeneration"
        found[name] = _vl_model("qwen3_vl_moe", class_, text, False, False)
    odd = found["Qwen3-Coder-480B-A35B-Instruct"]  # its file has some keys more and some less
    odd |= {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
    for key in ("attention_bias", "bos_token_id"):
        del odd[key]
    return found


CONFIGS: dict[str, Config] = _configs()
"""Hub name without its owner -> `config.json`, in the spelling of transformers 4."""


def changed(name: str, part: str | None = None, /, **changes: Any) -> Config:
    """A published configuration with keys changed: of the top level, or of one ``part`` of it.

    A key that is ``...`` is taken away.
    """
    raw = copy.deepcopy(CONFIGS[name])
    inner = raw if part is None else raw[part]
    inner.update(changes)
    for key in [key for key, value in changes.items() if value is ...]:
        del inner[key]
    return raw


def respelled(raw: Config) -> Config:
    """The same configuration as transformers 5.23 saves it."""
    if "text_config" not in raw:
        return _respelled_text(raw)
    vision = raw["vision_config"] | {
        "model_type": f"{raw['model_type']}_vision",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    }
    text = _respelled_text(raw["text_config"])
    if "num_local_experts" in text:
        text["tie_word_embeddings"] = True  # its class's default; the model is not tied
    return raw | {"text_config": text, "vision_config": vision}


def _respelled_text(raw: Config) -> Config:
    new = dict(raw)
    rope = new.pop("rope_scaling") or {"rope_type": "default"}
    new["rope_parameters"] = {**rope, "rope_theta": new.pop("rope_theta")}
    for old, key in (("torch_dtype", "dtype"), ("num_experts", "num_local_experts")):
        if old in new:
            new[key] = new.pop(old)
    if new["model_type"] == "qwen3":
        new["layer_types"] = ["full_attention"] * new["num_hidden_layers"]
    return new | {"pad_token_id": None, "transformers_version": "5.23.0"}
