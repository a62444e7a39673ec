"""Tiny Qwen3-VL checkpoints: a vision tower before a text model, with preprocessor files.

Knows config.json's nested form, the tower's tensors and the two layouts of fused experts; the
values come from `weights`, the tokenizer from `text`.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from tiny.checkpoint import SEED, _save_json
from tiny.safetensors import save_safetensors
from tiny.text import TOKENIZER_VOCAB, write_tokenizer
from tiny.weights import Tensors, dequantise, quantise, stack_experts, tensors, unit

VISION_VARIANTS = ("vl_moe", "vl_moe_by_transformers_5", "vl_dense")
VISION_FP8_VARIANTS = ("vl_moe_fp8", "vl_moe_fp8_by_expert")

_VISION = {
    "deepstack_visual_indexes": [0, 1, 2],
    "depth": 4,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 32,
    "in_channels": 3,
    "intermediate_size": 48,
    "num_heads": 2,
    "num_position_embeddings": 36,
    "out_hidden_size": 64,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_TEXT = {
    "attention_bias": False,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "mrope_interleaved": True,
        "mrope_section": [6, 5, 5],
        "rope_type": "default",
    },
    "rope_theta": 5000000,
    "vocab_size": TOKENIZER_VOCAB,
}
_EXPERTS = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
_PIXELS = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
IMAGE_RULES = {
    **_PIXELS,
    "size": {"shortest_edge": 1024, "longest_edge": 65536},
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
VIDEO_RULES = {
    **_PIXELS,
    "size": {"shortest_edge": 1024, "longest_edge": 98304},
    "video_processor_type": "Qwen3VLVideoProcessor",
}
VISION_TEMPLATE = r"""{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for content in message.content %}
            {%- if content.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif content.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}
                {{- content.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""


def vision_config(variant: str) -> dict[str, Any]:
    """config.json, less the ids that come from the tokenizer."""
    dense = variant == "vl_dense"
    kind = "qwen3_vl" if dense else "qwen3_vl_moe"
    text = {**_TEXT, **({} if dense else _EXPERTS), "model_type": f"{kind}_text"}
    name = "Qwen3VL" if dense else "Qwen3VLMoe"
    more = {}
    if variant in VISION_FP8_VARIANTS:
        text["moe_intermediate_size"] = 128  # a block of fused scales is of gate or of up alone
        more["quantization_config"] = _fp8(text["num_hidden_layers"])
    return {
        **more,
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": kind,
        "text_config": text,
        "tie_word_embeddings": dense,
        "vision_config": {**_VISION, "model_type": kind},
        "transformers_version": "4.57.0",
    }


def _fp8(layers: int) -> dict[str, Any]:
    tower = [name for name, _ in _vision_shapes(_VISION) if "linear" in name or ".attn." in name]
    kept = [f"model.visual.{name.removesuffix('.weight')}" for name in tower if "weight" in name]
    kept += [f"model.language_model.layers.{i}.mlp.gate" for i in range(layers)]
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", *kept],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def write_vision_model(
    directory: str | pathlib.Path,
    variant: str,
    *,
    dequantised: bool = False,
    seed: int = SEED,
) -> pathlib.Path:
    """Writes a whole checkpoint: weights, tokenizer, template, preprocessor files.

    Args:
        directory: made where missing.
        variant: one of `VISION_VARIANTS`, of which the two with experts hold the same values, or
            of `VISION_FP8_VARIANTS`, which do too.
        dequantised: an FP8 variant as float32 of exactly the same values.
        seed: of the weights.
    """
    directory = pathlib.Path(directory)
    tokenizer = write_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(VISION_TEMPLATE)
    (directory / "preprocessor_config.json").write_text(json.dumps(IMAGE_RULES))
    (directory / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_RULES))
    config = vision_config(variant)
    for name in ("image", "video"):
        config[f"{name}_token_id"] = tokenizer.token_to_id(f"<|{name}_pad|>")
    for name in ("vision_start", "vision_end"):
        config[f"{name}_token_id"] = tokenizer.token_to_id(f"<|{name}|>")
    config["text_config"]["dtype"] = "float32"
    eos = [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    config["text_config"]["eos_token_id"] = eos[0]
    weights = _all_tensors(config, variant, dequantised, seed)
    if dequantised:
        del config["quantization_config"]
    _save_json(directory / "config.json", config)
    _save_json(directory / "generation_config.json", {"eos_token_id": eos, "do_sample": False})
    save_safetensors(directory / "model.safetensors", weights)
    return directory


def _all_tensors(config: dict[str, Any], variant: str, dequantised: bool, seed: int) -> Tensors:
    tied = config["tie_word_embeddings"]
    kind = "qwen3" if tied else "qwen3_moe"
    flat = {**config["text_config"], "model_type": kind, "tie_word_embeddings": tied}
    text = tensors(flat, seed, dtype="float32")
    if variant in VISION_FP8_VARIANTS:
        text = quantise(text, config["quantization_config"], ml_dtypes.bfloat16)
        text = dequantise(text) if dequantised else text
    if not tied and variant != "vl_moe_fp8_by_expert":
        text = stack_experts(text, by_hub=variant != "vl_moe_by_transformers_5")
    found = {
        name
        if name.startswith("lm_head")
        else name.replace("model.", "model.language_model.", 1): w
        for name, w in text.items()
    }
    for name, shape in _vision_shapes(config["vision_config"]):
        found[f"model.visual.{name}"] = _vision_values(name, shape, seed).astype(np.float32)
    return found


def _vision_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, i, merged = config["hidden_size"], config["intermediate_size"], 4 * config["hidden_size"]
    side = config["patch_size"]
    yield "patch_embed.proj.weight", (d, 3, config["temporal_patch_size"], side, side)
    yield "patch_embed.proj.bias", (d,)
    yield "pos_embed.weight", (config["num_position_embeddings"], d)

    def linear(at: str, out: int, into: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{at}.weight", (out, into)
        yield f"{at}.bias", (out,)

    def norm(at: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{at}.weight", (size,)
        yield f"{at}.bias", (size,)

    for block in range(config["depth"]):
        at = f"blocks.{block}."
        yield from norm(f"{at}norm1", d)
        yield from linear(f"{at}attn.qkv", 3 * d, d)
        yield from linear(f"{at}attn.proj", d, d)
        yield from norm(f"{at}norm2", d)
        yield from linear(f"{at}mlp.linear_fc1", i, d)
        yield from linear(f"{at}mlp.linear_fc2", d, i)
    levels = len(config["deepstack_visual_indexes"])
    mergers = [("merger", d), *((f"deepstack_merger_list.{j}", merged) for j in range(levels))]
    for at, normed in mergers:
        yield from norm(f"{at}.norm", normed)
        yield from linear(f"{at}.linear_fc1", merged, merged)
        yield from linear(f"{at}.linear_fc2", config["out_hidden_size"], merged)


def _vision_values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    z = unit(seed, f"visual.{name}", shape)
    if name.endswith(".bias"):
        return 0.3 * z
    if "norm" in name:
        return 1 + 0.25 * z
    gain = 2.0 if "attn.qkv" in name else 1.0  # a peaked softmax
    return z * (gain if name.startswith("pos_embed") else gain * np.prod(shape[1:]) ** -0.5)
