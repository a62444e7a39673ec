"""Reads Hugging Face's `config.json`.

Knows both spellings of the keys (transformers 4 and 5), which keys change the result and which do
not. A key that would change the result and is not supported raises; a key nobody knows raises too,
unless it says nothing (null, false, zero, empty).
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from qwen_jax.weights.config import (
    ARCHITECTURES,
    ModelConfig,
    QuantConfig,
    RopeConfig,
    TextConfig,
    VisionConfig,
)
from qwen_jax.weights.json_keys import Keys

_CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
# Keys that no forward pass reads: training, bookkeeping, and what generation_config.json decides.
_INERT_KEYS = """
attention_dropout attn_implementation auto_map bos_token_id chunk_size_feed_forward do_sample
hidden_dropout id2label initializer_range keys_to_ignore_at_inference label2id max_length
max_window_layers model_max_length name_or_path output_attentions output_hidden_states
output_router_logits pad_token_id problem_type repetition_penalty return_dict router_aux_loss_coef
temperature tokenizer_class top_k top_p transformers.js_config transformers_version unsloth_fixed
unsloth_version use_cache vocab_file
"""
_INERT = frozenset(_INERT_KEYS.split())
_DTYPES = ("float32", "bfloat16", "float16")
_TOWER_THETA = 10000.0  # of the vision tower's rotary embedding, fixed in its code
_DEFAULT_SECTION = (24, 20, 20)  # of Qwen3VLTextRotaryEmbedding
_MODULE = re.compile(r"[\w.]+")  # a module's dotted name, and no pattern of names


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a parsed `config.json`.

    Raises:
        ValueError: unknown architecture, missing key, or a key that would change the result
            and is not supported.
    """
    top = Keys(raw, "config.json")
    kind = top.take("model_type", None)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type {kind!r} is not supported; this library runs "
            + ", ".join(f"{k} ({v})" for k, v in ARCHITECTURES.items())
        )
    top.same("architectures", [_CLASSES[kind]])
    tie = top.flag("tie_word_embeddings", False)
    quantization = _quantization(top.take("quantization_config", None))
    keys, vision, ids = top, None, {}
    if kind.startswith("qwen3_vl"):
        for name in ("image", "video", "vision_start", "vision_end"):
            ids[f"{name}_token_id"] = top.integer(f"{name}_token_id", least=0)
        vision = _vision(Keys(top.take("vision_config"), "config.json: vision_config"), kind)
        keys = Keys(top.take("text_config"), "config.json: text_config")
        keys.same("model_type", kind, f"{kind}_text")
        # transformers 5 saves its class default here; the model is tied by the top level alone.
        keys.take("tie_word_embeddings", None)
    # The decoder's own, else the top level's (which in a text model is the same object).
    dtype = _dtype(keys, _dtype(top, "float32"))
    eos = keys.integers("eos_token_id", top.integers("eos_token_id", ()))
    text = _text(keys, kind)
    keys.finish(_INERT)
    top.finish(_INERT)
    if vision and vision.out_hidden_size != text.hidden_size:
        raise ValueError(
            f"config.json: vision_config.out_hidden_size={vision.out_hidden_size} is not "
            f"text_config.hidden_size={text.hidden_size}"
        )
    return ModelConfig(
        model_type=kind,
        text=text,
        vision=vision,
        quantization=quantization,
        tie_word_embeddings=tie,
        dtype=dtype,
        eos_token_ids=eos,
        **ids,
    )


def _dtype(keys: Keys, default: str) -> str:
    dtype = str(keys.take("dtype", default, also="torch_dtype")).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"{keys.where}: dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    return dtype


def _text(keys: Keys, kind: str) -> TextConfig:
    keys.same("hidden_act", "silu")
    keys.same("is_causal", True)
    keys.same("use_sliding_window", False)
    keys.take("sliding_window", None)  # only in force with use_sliding_window
    keys.same("use_qk_norm", True)
    keys.same("qkv_bias", False)
    layer_types = keys.take("layer_types", [])
    if set(layer_types) - {"full_attention"}:
        raise ValueError(f"{keys.where}: layer_types other than 'full_attention' are not supported")
    layers = keys.integer("num_hidden_layers")
    hidden = keys.integer("hidden_size")
    heads = keys.integer("num_attention_heads")
    kv_heads = keys.integer("num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(
            f"{keys.where}: num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    moe = _experts(keys, kind, layers) if kind.endswith("moe") else {}
    # The dense configs default to 128, the others to what the attention code falls back to.
    head_dim = keys.integer("head_dim", hidden // heads if moe else 128)
    if head_dim % 2:
        raise ValueError(f"{keys.where}: head_dim={head_dim} is odd; rotary embedding takes pairs")
    max_position = keys.integer("max_position_embeddings")
    return TextConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=keys.integer("intermediate_size"),
        max_position_embeddings=max_position,
        rope=_rope(keys, kind, head_dim, max_position),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        attention_bias=keys.flag("attention_bias", False),
        **moe,
    )


def _experts(keys: Keys, kind: str, layers: int) -> dict[str, Any]:
    experts = keys.integer("num_experts", also="num_local_experts")
    keys.same("shared_expert_intermediate_size", 0)
    active = keys.integer("num_experts_per_tok")
    if active > experts:
        raise ValueError(f"{keys.where}: num_experts_per_tok={active} > num_experts={experts}")
    dense = keys.integers("mlp_only_layers", ())
    if any(layer >= layers for layer in dense):
        raise ValueError(f"{keys.where}: mlp_only_layers {dense} are not all in 0..{layers - 1}")
    # Qwen3MoeConfig's default is false; the vision-language code always normalises.
    norm = keys.flag("norm_topk_prob", False)
    return {
        "num_experts": experts,
        "num_experts_per_tok": active,
        "moe_intermediate_size": keys.integer("moe_intermediate_size"),
        "norm_topk_prob": norm or kind == "qwen3_vl_moe",
        "decoder_sparse_step": keys.integer("decoder_sparse_step", 1),
        "mlp_only_layers": dense,
    }


def _rope(keys: Keys, kind: str, head_dim: int, max_position: int) -> RopeConfig:
    keys.same("partial_rotary_factor", 1.0)
    keys = Keys(_rope_keys(keys), f"{keys.where}: rope")
    type_ = keys.take("rope_type", "default", also="type")
    if type_ not in ("default", "yarn"):
        raise ValueError(f"{keys.where}: rope_type={type_!r} is not supported, only default, yarn")
    keys.same("partial_rotary_factor", 1.0)
    section: tuple[int, ...] = ()
    if kind.startswith("qwen3_vl"):
        keys.same("mrope_interleaved", True)
        section = keys.integers("mrope_section", _DEFAULT_SECTION)
        if len(section) != 3 or sum(section) * 2 != head_dim:
            raise ValueError(
                f"{keys.where}: mrope_section {section} is not three integers (time, height, "
                f"width) whose sum is head_dim/2={head_dim // 2}"
            )
    rope = RopeConfig(theta=keys.number("rope_theta"), kind=type_, mrope_section=section)
    if type_ == "yarn":
        rope = dataclasses.replace(rope, **_yarn(keys, max_position))
    keys.finish()
    return rope


def _rope_keys(keys: Keys) -> dict[str, Any]:
    """Both spellings as one object: rope_parameters, or rope_theta beside rope_scaling."""
    merged: dict[str, Any] = {}
    theta = {"rope_theta": keys.take("rope_theta", None)}
    for part in (keys.take("rope_parameters", {}), keys.take("rope_scaling", {}), theta):
        for key, value in Keys(part, f"{keys.where}: rope").items():
            if merged.setdefault(key, value) != value:
                raise ValueError(f"{keys.where}: two values of {key}: {merged[key]!r}, {value!r}")
    return merged


def _yarn(keys: Keys, max_position: int) -> dict[str, Any]:
    """Source: transformers modeling_rope_utils.py, _compute_yarn_parameters."""
    original = keys.integer("original_max_position_embeddings", max_position)
    factor = keys.number("factor", max_position / original)
    if factor < 1:
        raise ValueError(f"{keys.where}: factor={factor} shortens the context; use 1 or more")
    attention = keys.number_or_none("attention_factor")
    mscale, mscale_all = keys.number_or_none("mscale"), keys.number_or_none("mscale_all_dim")
    if attention is None and mscale and mscale_all:
        log = 0.1 * math.log(factor)
        attention = (mscale * log + 1) / (mscale_all * log + 1)
    return {
        "factor": factor,
        "original_max_position": original,
        "attention_factor": attention,
        "beta_fast": keys.number("beta_fast", 32.0),
        "beta_slow": keys.number("beta_slow", 1.0),
        "truncate": keys.flag("truncate", True),
    }


def _vision(keys: Keys, kind: str) -> VisionConfig:
    keys.same("model_type", kind, f"{kind}_vision")
    keys.same("hidden_act", "gelu_pytorch_tanh")
    keys.take("dtype", None, also="torch_dtype")  # every tensor says its own
    rope = Keys(keys.take("rope_parameters", {}), f"{keys.where}: rope_parameters")
    rope.same("rope_type", "axial", "default")
    rope.same("rope_theta", _TOWER_THETA)
    rope.finish()
    names = [f.name for f in dataclasses.fields(VisionConfig)]
    sizes = {n: keys.integer(n) for n in names if n != "deepstack_visual_indexes"}
    taps = keys.integers("deepstack_visual_indexes")
    keys.finish(_INERT)
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise ValueError(f"{keys.where}: hidden_size is not a multiple of num_heads: {sizes}")
    if math.isqrt(sizes["num_position_embeddings"]) ** 2 != sizes["num_position_embeddings"]:
        raise ValueError(f"{keys.where}: num_position_embeddings is no square: {sizes}")
    if any(tap >= sizes["depth"] for tap in taps):
        raise ValueError(
            f"{keys.where}: deepstack_visual_indexes {taps} are not all in 0..{sizes['depth'] - 1}"
        )
    return VisionConfig(**sizes, deepstack_visual_indexes=taps)


def _quantization(raw: Any) -> QuantConfig | None:
    """Block FP8. Source: transformers utils/quantization_config.py, FineGrainedFP8Config."""
    if raw is None:
        return None
    keys = Keys(raw, "config.json: quantization_config")
    keys.same("quant_method", "fp8")
    keys.same("fmt", "e4m3")
    keys.same("scale_fmt", "float")
    keys.same("expert_dtype", "fp8")
    keys.same("activation_scheme", "dynamic")  # activations stay wide here, which is more exact
    keys.take("dequantize", None)  # how transformers would hold it in memory
    block = keys.integers("weight_block_size", least=1)
    skip = keys.take("modules_to_not_convert", [], also="ignored_layers")
    keys.finish()
    if len(block) != 2:
        raise ValueError(f"{keys.where}: weight_block_size {block} is not two positive integers")
    patterns = [name for name in skip if not _MODULE.fullmatch(str(name))]
    if patterns or not isinstance(skip, list):
        raise ValueError(
            f"{keys.where}: modules_to_not_convert must be a list of module names, not patterns: "
            f"{patterns[:3] or skip!r}"
        )
    return QuantConfig(block=(block[0], block[1]), skip=tuple(skip))
