"""The published models by hub name, so that planning and dummy weights need no file.

Sources: the `config.json` files of the models on the Hugging Face hub.
"""

import dataclasses
import difflib

from qwen_jax.weights.config import (
    ModelConfig,
    QuantConfig,
    RopeConfig,
    TextConfig,
    VisionConfig,
)

_KINDS = {
    # name: layers, width, heads, kv heads, experts, active, expert width, dense width
    "0.6B": (28, 1024, 16, 8, 0, 0, 0, 3072),
    "30B": (48, 2048, 32, 4, 128, 8, 768, 6144),
    "480B": (62, 6144, 96, 8, 160, 8, 2560, 8192),
    "VL-2B": (28, 2048, 16, 8, 0, 0, 0, 6144),
    "VL-4B": (36, 2560, 32, 8, 0, 0, 0, 9728),
    "VL-8B": (36, 4096, 32, 8, 0, 0, 0, 12288),
    "235B": (94, 4096, 64, 4, 128, 8, 1536, 12288),
}
_SMALL_TOWER = (24, 1024, 4096, (5, 11, 17))
_LARGE_TOWER = (27, 1152, 4304, (8, 16, 24))


def _text(kind: str, theta: float, positions: int, *, mrope: bool = False) -> TextConfig:
    layers, width, heads, kv_heads, experts, active, expert_width, dense_width = _KINDS[kind]
    return TextConfig(
        vocab_size=151936,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=dense_width,
        max_position_embeddings=positions,
        rope=RopeConfig(theta=theta, mrope_section=(24, 20, 20) if mrope else ()),
        num_experts=experts,
        num_experts_per_tok=active,
        moe_intermediate_size=expert_width,
    )


def _config(kind: str, theta: float, positions: int, *, tie: bool = False) -> ModelConfig:
    text = _text(kind, theta, positions)
    return ModelConfig(
        model_type="qwen3_moe" if text.num_experts else "qwen3",
        text=text,
        tie_word_embeddings=tie,
        eos_token_ids=(151645,),
    )


def _vl(kind: str, tower: tuple, *, tie: bool = False) -> ModelConfig:
    text = _text(kind, 5e6, 262144, mrope=True)
    depth, width, inner, taps = tower
    return ModelConfig(
        model_type="qwen3_vl_moe" if text.num_experts else "qwen3_vl",
        text=text,
        vision=VisionConfig(
            depth=depth,
            hidden_size=width,
            intermediate_size=inner,
            num_heads=16,
            out_hidden_size=text.hidden_size,
            deepstack_visual_indexes=taps,
        ),
        tie_word_embeddings=tie,
        eos_token_ids=(151645,),
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


def _fp8(config: ModelConfig) -> ModelConfig:
    """Blocks of 128x128; three names for what the published lists name module by module."""
    skip = ("lm_head", "mlp.gate", "visual")
    return dataclasses.replace(config, quantization=QuantConfig(skip=skip))


_BASE = {
    "Qwen/Qwen3-0.6B": _config("0.6B", 1e6, 40960, tie=True),
    "Qwen/Qwen3-30B-A3B": _config("30B", 1e6, 40960),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _config("30B", 1e7, 262144),
    "Qwen/Qwen3-30B-A3B-Thinking-2507": _config("30B", 1e7, 262144),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": _config("30B", 1e7, 262144),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": _config("480B", 1e7, 262144),
    "Qwen/Qwen3-VL-2B-Instruct": _vl("VL-2B", _SMALL_TOWER, tie=True),
    "Qwen/Qwen3-VL-4B-Instruct": _vl("VL-4B", _SMALL_TOWER, tie=True),
    "Qwen/Qwen3-VL-8B-Instruct": _vl("VL-8B", _LARGE_TOWER),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": _vl("30B", _LARGE_TOWER),
    "Qwen/Qwen3-VL-30B-A3B-Thinking": _vl("30B", _LARGE_TOWER),
    "Qwen/Qwen3-VL-235B-A22B-Instruct": _vl("235B", _LARGE_TOWER),
    "Qwen/Qwen3-VL-235B-A22B-Thinking": _vl("235B", _LARGE_TOWER),
}

PRESETS: dict[str, ModelConfig] = _BASE | {
    f"{name}-FP8": _fp8(config) for name, config in _BASE.items() if config.text.num_experts
}


def preset(name: str) -> ModelConfig:
    """The configuration of a published model; the owner "Qwen/" may be left out.

    Raises:
        ValueError: the name is unknown; the message has the nearest ones.
    """
    full = name if "/" in name else f"Qwen/{name}"
    if full in PRESETS:
        return PRESETS[full]
    near = difflib.get_close_matches(full, PRESETS, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(PRESETS)}"
    raise ValueError(f"no preset is named {name!r}; {hint}")
