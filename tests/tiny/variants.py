"""The configs of the tiny checkpoints: one variation of the text architecture each.

Knows config.json's keys in both spellings, and no weight. The variants differ in vocabulary, head
counts and ratios too, so that a number taken from the wrong place does not fit by chance.
"""

import itertools
from collections.abc import Sequence
from typing import Any

Config = dict[str, Any]

_SHARED: Config = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 128,
}
_EXPERTS: Config = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def _dense(**changes: Any) -> Config:
    kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "max_window_layers": 2}
    return {**kind, **_SHARED, **changes}


def _moe(*, without: Sequence[str] = (), **changes: Any) -> Config:
    kind = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    whole = {**kind, **_SHARED, **_EXPERTS, **changes}
    return {key: value for key, value in whole.items() if key not in without}


def _fp8(*converted_not: str, layers: int, gate: bool, **extra: Any) -> Config:
    """A `quantization_config` as the published checkpoints have it."""
    parts = ("input_layernorm", *(["mlp.gate"] if gate else []), "post_attention_layernorm")
    kept = [f"model.layers.{i}.{part}" for i, part in itertools.product(range(layers), parts)]
    return {
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head", *kept, *converted_not],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        **extra,
    }


# The new spelling is what transformers 5.23 itself writes: other names, theta inside the rope keys.
_OLD_KEYS = ("num_experts", "rope_theta", "rope_scaling", "torch_dtype")
_YARN_OLD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_YARN_NEW = {
    "attention_factor": 1.5,
    "factor": 2.0,
    "original_max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_type": "yarn",
}
_ROPE_NEW = {"rope_theta": 10000000.0, "rope_type": "default"}

VARIANTS: dict[str, Config] = {
    "moe": _moe(),
    # Neither key present: norm_topk_prob is false then, and head_dim is hidden_size / heads.
    "moe_no_norm": _moe(
        without=("norm_topk_prob", "head_dim"), num_key_value_heads=4, num_experts_per_tok=3
    ),
    # Layer 0 and 2 are dense by the step, layer 1 by the list, layer 3 has experts.
    "moe_dense_mix": _moe(num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[1]),
    "moe_bias": _moe(attention_bias=True, vocab_size=136),
    "dense": _dense(rope_theta=10000),
    "dense_tied": _dense(tie_word_embeddings=True, vocab_size=160),
    "dense_tied_with_head": _dense(tie_word_embeddings=True, vocab_size=160),
    "moe_yarn": _moe(rope_theta=10000.0, rope_scaling=_YARN_OLD, max_position_embeddings=256),
    "moe_yarn_attention_factor": _moe(
        without=_OLD_KEYS,
        dtype="float32",
        num_local_experts=8,
        rope_parameters=_YARN_NEW,
        max_position_embeddings=1024,
    ),
    "moe_new_spelling": _moe(
        without=_OLD_KEYS,
        dtype="float32",
        num_local_experts=8,
        rope_parameters=_ROPE_NEW,
        transformers_version="5.23.0",
        vocab_size=144,
    ),
    # 12 query heads per KV head, width of all heads != hidden_size, an epsilon that shows, and the
    # keys of the 480B model's config.
    "moe_wide_heads": _moe(
        without=("attention_bias", "bos_token_id"),
        num_attention_heads=12,
        num_key_value_heads=1,
        head_dim=24,
        rms_norm_eps=0.001,
        qkv_bias=False,
        use_qk_norm=True,
        shared_expert_intermediate_size=0,
    ),
    "moe_many_experts": _moe(
        num_experts=32,
        num_experts_per_tok=8,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=16,
    ),
    # Every dimension ends in a partial 128-block somewhere: 192 = 128 + 64, 160 = 128 + 32, ….
    "moe_fp8": _moe(
        hidden_size=192,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        moe_intermediate_size=160,
        num_experts=4,
        quantization_config=_fp8(layers=2, gate=True, fmt="e4m3"),
    ),
    # Heads and blocks as in the published checkpoints.
    "moe_fp8_whole_blocks": _moe(
        hidden_size=256,
        head_dim=128,
        moe_intermediate_size=128,
        num_experts=4,
        quantization_config=_fp8(layers=2, gate=True),
    ),
    # A block of 128 rows of q_proj ends inside a head.
    "moe_fp8_cut_heads": _moe(
        hidden_size=192,
        head_dim=48,
        moe_intermediate_size=160,
        num_experts=4,
        quantization_config=_fp8(layers=2, gate=True),
    ),
    "dense_fp8": _dense(
        hidden_size=200,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=128,
        intermediate_size=328,
        quantization_config=_fp8("model.layers.1.mlp.down_proj", layers=2, gate=False),
    ),
}
