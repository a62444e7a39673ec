"""The demo as a Hugging Face checkpoint: config.json and everything beside the weights.

Knows file formats and the model's sizes, said once, here.
"""

import json
import pathlib
from typing import Any

import tokenizers

from demo import cells, tokenizer

EOS = ("<|im_end|>", "<|endoftext|>")
WIDTH, HEAD = 128, 32
_PATCH = cells.CELL // 2
_TEXT: dict[str, Any] = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "head_dim": HEAD,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 1024,
    "mlp_only_layers": [],
    "model_type": "qwen3_vl_moe_text",
    "moe_intermediate_size": 72,  # not the width: files of two layouts are told apart by shape
    "norm_topk_prob": True,
    "num_attention_heads": WIDTH // HEAD,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "num_key_value_heads": WIDTH // HEAD // 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "mrope_interleaved": True,
        "mrope_section": [6, 5, 5],
        "rope_type": "default",
    },
    # As the published models': most of a head turns so slowly that what is sought counts, not how
    # far away it is.
    "rope_theta": 1000000,
}
_VISION = {
    "deepstack_visual_indexes": [1, 2],
    "depth": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 96,
    "in_channels": 3,
    "intermediate_size": 192,
    "model_type": "qwen3_vl_moe",
    "num_heads": 3,
    "num_position_embeddings": 36,
    "out_hidden_size": WIDTH,
    "patch_size": _PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_PIXELS = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": _PATCH,
    "temporal_patch_size": 2,
}


def config(vocabulary: tokenizers.Tokenizer) -> dict[str, Any]:
    """config.json."""
    ids = {
        f"{name}_token_id": vocabulary.token_to_id(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    eos = vocabulary.token_to_id(EOS[0])
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        **ids,
        "model_type": "qwen3_vl_moe",
        "text_config": {**_TEXT, "eos_token_id": eos, "vocab_size": tokenizer.SIZE},
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0",
        "vision_config": _VISION,
    }


def write(vocabulary: tokenizers.Tokenizer, directory: pathlib.Path) -> None:
    """Every file but the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.write(vocabulary, directory)
    template = pathlib.Path(__file__).with_name("template.jinja").read_text(encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    eos = [vocabulary.token_to_id(token) for token in EOS]
    for name, value in (
        ("config.json", config(vocabulary)),
        ("generation_config.json", {"do_sample": False, "eos_token_id": eos}),
        ("preprocessor_config.json", _image_rules()),
        ("video_preprocessor_config.json", _video_rules()),
    ):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n")


def _image_rules() -> dict[str, Any]:
    """Any picture becomes about 96 x 96 pixels: nine tokens if it is square."""
    sizes = {"shortest_edge": 8000, "longest_edge": 10000}
    return {**_PIXELS, "size": sizes, "image_processor_type": "Qwen2VLImageProcessorFast"}


def _video_rules() -> dict[str, Any]:
    """Any video's frames become 32 x 32 pixels: one token for a second."""
    sizes = {"shortest_edge": 1024, "longest_edge": 8192}
    return {**_PIXELS, "size": sizes, "video_processor_type": "Qwen3VLVideoProcessor"}
