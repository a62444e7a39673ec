"""Reads Hugging Face's `config.json`.

Knows both spellings of the keys (transformers 4 and 5), which keys change the result and which do
not. A key that would change the result and is not supported raises; a key nobody knows raises too,
unless it says nothing (null, false, zero, empty).
"""

import dataclasses
import difflib
import math
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

_REQUIRED = object()

# Keys that no forward pass reads: training, bookkeeping, and what generation_config.json decides.
_INERT = """
architectures attention_dropout attn_implementation auto_map bos_token_id chunk_size_feed_forward
do_sample eos_token_id hidden_dropout initializer_range keys_to_ignore_at_inference
max_window_layers model_max_length output_router_logits pad_token_id problem_type
router_aux_loss_coef temperature top_k top_p transformers_version transformers.js_config
use_cache vocab_file id2label label2id return_dict
"""
_INERT_KEYS = frozenset(_INERT.split())


class _Keys:
    """The keys of one JSON object: each is taken once, and what is left is judged at the end."""

    def __init__(self, raw: Any, where: str):
        if not isinstance(raw, Mapping):
            raise ValueError(f"{where}: expected a JSON object, found {raw!r}")
        self.left = dict(raw)
        self.known: set[str] = set()
        self.where = where

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        self.known.add(key)
        value = self.left.pop(key, None)
        if value is None and default is _REQUIRED:
            raise ValueError(f"{self.where}: the key {key!r} is missing")
        return default if value is None else value

    def same(self, key: str, *allowed: Any) -> None:
        """Takes a key that may be absent and must otherwise have one of the allowed values."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            options = " or ".join(repr(a) for a in allowed)
            raise ValueError(f"{self.where}: {key}={value!r} is not supported, only {options}")

    def size(self, key: str, default: Any = _REQUIRED) -> int:
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.where}: {key}={value!r} is not a positive integer")
        return value

    def finish(self) -> None:
        for key, value in self.left.items():
            if key in _INERT_KEYS or key.startswith("_") or not value:
                continue
            near = difflib.get_close_matches(key, self.known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"{self.where}: the key {key!r} (= {value!r}) is unknown and might change the "
                f"result{hint} Remove it from config.json if it does not"
            )


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a parsed `config.json`.

    Raises:
        ValueError: unknown architecture, missing key, or a key that would change the result
            and is not supported.
    """
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type {kind!r} is not supported; this library runs "
            + ", ".join(f"{k} ({v})" for k, v in ARCHITECTURES.items())
        )
    top = _Keys(raw, "config.json")
    top.same("model_type", kind)
    quantization = _quantization(top.take("quantization_config", None))
    ids = {}
    vision = None
    if kind.startswith("qwen3_vl"):
        for key in ("image", "video", "vision_start", "vision_end"):
            ids[f"{key}_token_id"] = int(top.take(f"{key}_token_id"))
        tie = bool(top.take("tie_word_embeddings", False))
        vision = _vision(_Keys(top.take("vision_config"), "config.json: vision_config"))
        keys = _Keys(top.take("text_config"), "config.json: text_config")
        keys.take("tie_word_embeddings", None)  # the top level decides (facts: trap 20)
        dtype = top.take("dtype", top.take("torch_dtype", None))
        top.finish()
    else:
        keys = top
        tie = bool(keys.take("tie_word_embeddings", False))
        dtype = None
    dtype = keys.take("dtype", keys.take("torch_dtype", dtype)) or "float32"
    eos = keys.take("eos_token_id", None)
    text = _text(keys, kind)
    keys.finish()
    return ModelConfig(
        model_type=kind,
        text=text,
        vision=vision,
        quantization=quantization,
        tie_word_embeddings=tie,
        dtype=str(dtype).removeprefix("torch."),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        **ids,
    )


def _text(keys: _Keys, kind: str) -> TextConfig:
    keys.same("hidden_act", "silu")
    keys.same("use_sliding_window", False)
    keys.take("sliding_window", None)  # only in force with use_sliding_window
    layers = keys.size("num_hidden_layers")
    if any(t != "full_attention" for t in keys.take("layer_types", [])):
        raise ValueError(f"{keys.where}: layer_types other than 'full_attention' are not supported")
    keys.same("model_type", kind, f"{kind}_text")
    keys.same("use_qk_norm", True)
    keys.same("qkv_bias", False)
    heads = keys.size("num_attention_heads")
    hidden = keys.size("hidden_size")
    moe = {}
    if kind.endswith("moe"):
        moe = _experts(keys, kind, layers)
    kv_heads = keys.size("num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(
            f"{keys.where}: num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    head_dim = keys.size("head_dim", 128 if kind == "qwen3" else hidden // heads)
    max_position = keys.size("max_position_embeddings")
    return TextConfig(
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        # Models whose every layer is sparse need not say it.
        intermediate_size=keys.size("intermediate_size", 1 if moe else _REQUIRED),
        max_position_embeddings=max_position,
        rope=_rope(keys, kind, head_dim, max_position),
        rms_norm_eps=float(keys.take("rms_norm_eps", 1e-6)),
        attention_bias=bool(keys.take("attention_bias", False)),
        **moe,
    )


def _experts(keys: _Keys, kind: str, layers: int) -> dict[str, Any]:
    names = [k for k in ("num_experts", "num_local_experts") if keys.left.get(k) is not None]
    counts = {keys.left[k] for k in names}
    if len(counts) > 1:
        raise ValueError(f"{keys.where}: num_experts and num_local_experts differ: {counts}")
    experts = keys.size(names[0] if names else "num_experts")
    keys.take("num_experts", None)
    keys.take("num_local_experts", None)
    keys.same("shared_expert_intermediate_size", 0)
    active = keys.size("num_experts_per_tok")
    if active > experts:
        raise ValueError(f"{keys.where}: num_experts_per_tok={active} > num_experts={experts}")
    dense = tuple(keys.take("mlp_only_layers", ()))
    if any(not 0 <= layer < layers for layer in dense):
        raise ValueError(f"{keys.where}: mlp_only_layers {dense} are not all in 0..{layers - 1}")
    # Qwen3MoeConfig's default is false; the vision-language code always normalises.
    norm = bool(keys.take("norm_topk_prob", False))
    return {
        "num_experts": experts,
        "num_experts_per_tok": active,
        "moe_intermediate_size": keys.size("moe_intermediate_size"),
        "norm_topk_prob": norm or kind == "qwen3_vl_moe",
        "decoder_sparse_step": keys.size("decoder_sparse_step", 1),
        "mlp_only_layers": dense,
    }


def _rope(keys: _Keys, kind: str, head_dim: int, max_position: int) -> RopeConfig:
    where = keys.where
    theta = keys.take("rope_theta", None)
    scaling = keys.take("rope_scaling", None)
    raw = keys.take("rope_parameters", None)
    if raw is None:
        raw = {**(scaling or {}), "rope_theta": theta}
    keys = _Keys(raw, f"{where}: rope")
    type_ = keys.take("rope_type", keys.take("type", "default"))
    if type_ == "mrope":  # an old name for the default kind with mrope_section
        type_ = "default"
    if type_ not in ("default", "yarn"):
        raise ValueError(f"{keys.where}: rope_type={type_!r} is not supported, only default, yarn")
    keys.take("type", None)
    keys.same("partial_rotary_factor", 1.0)
    section = tuple(keys.take("mrope_section", ()))
    interleaved = keys.take("mrope_interleaved", bool(section))
    if kind.startswith("qwen3_vl"):
        section = section or (24, 20, 20)
        if sum(section) * 2 != head_dim or not interleaved:
            raise ValueError(
                f"{keys.where}: mrope_section {section} must sum to head_dim/2={head_dim // 2}, "
                "interleaved"
            )
    elif section:
        raise ValueError(f"{keys.where}: mrope_section in a text-only model is not supported")
    rope = {"theta": float(keys.take("rope_theta")), "kind": type_, "mrope_section": section}
    if type_ == "yarn":
        rope |= _yarn(keys, max_position)
    keys.finish()
    return RopeConfig(**rope)


def _yarn(keys: _Keys, max_position: int) -> dict[str, Any]:
    original = keys.size("original_max_position_embeddings", max_position)
    factor = float(keys.take("factor", max_position / original))
    attention = keys.take("attention_factor", None)
    mscale, mscale_all = keys.take("mscale", None), keys.take("mscale_all_dim", None)
    if attention is None and mscale and mscale_all and factor > 1:
        log = 0.1 * math.log(factor)
        attention = (mscale * log + 1) / (mscale_all * log + 1)
    return {
        "factor": factor,
        "original_max_position": original,
        "attention_factor": attention,
        "beta_fast": float(keys.take("beta_fast", 32.0)),
        "beta_slow": float(keys.take("beta_slow", 1.0)),
        "truncate": bool(keys.take("truncate", True)),
    }


def _vision(keys: _Keys) -> VisionConfig:
    keys.same("hidden_act", "gelu_pytorch_tanh")
    keys.take("model_type", None)
    keys.take("dtype", keys.take("torch_dtype", None))
    keys.take("rope_parameters", None)  # transformers 5 writes the fixed axial default here
    names = [f.name for f in dataclasses.fields(VisionConfig)]
    sizes = {n: keys.size(n) for n in names if n != "deepstack_visual_indexes"}
    taps = tuple(keys.take("deepstack_visual_indexes"))
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise ValueError(f"{keys.where}: hidden_size is not a multiple of num_heads: {sizes}")
    if any(not 0 <= tap < sizes["depth"] for tap in taps):
        raise ValueError(f"{keys.where}: deepstack_visual_indexes {taps} beyond {sizes['depth']}")
    keys.finish()
    return VisionConfig(**sizes, deepstack_visual_indexes=taps)


def _quantization(raw: Any) -> QuantConfig | None:
    if raw is None:
        return None
    keys = _Keys(raw, "config.json: quantization_config")
    keys.same("quant_method", "fp8")
    keys.same("fmt", "e4m3")
    keys.same("activation_scheme", "dynamic")  # activations stay wide here, which is more exact
    keys.take("scale_fmt", None)
    block = tuple(keys.take("weight_block_size", (128, 128)))
    if len(block) != 2 or any(not isinstance(b, int) or b < 1 for b in block):
        raise ValueError(f"{keys.where}: weight_block_size {block} is not two positive integers")
    skip = tuple(keys.take("modules_to_not_convert", keys.take("ignored_layers", ())))
    keys.take("ignored_layers", None)
    keys.finish()
    return QuantConfig(form="fp8", block=block, skip=skip)
