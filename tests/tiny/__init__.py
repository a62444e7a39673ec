"""Tiny random checkpoints in Hugging Face's form, the same bytes on every machine.

They test the readers and the model, so they share no code with qwen_jax.

    directory = tiny.write(tmp_path, "moe_fp8")                 config.json, model.safetensors, …
    twin = tiny.write(tmp_path / "twin", "moe_fp8", dequantised=True)      the same model in float32
    directory = tiny.write_text_model(tmp_path, "moe")          with tokenizer and chat template
"""

from tiny.checkpoint import EOS, SEED, digest, prompt, write
from tiny.safetensors import save_safetensors
from tiny.text import TOKENIZER_VOCAB, write_text_model, write_tokenizer
from tiny.variants import VARIANTS
from tiny.vision import VISION_FP8_VARIANTS, VISION_VARIANTS, write_vision_model
from tiny.weights import dequantise, quantise, shapes, tensors

__all__ = [
    "EOS",
    "SEED",
    "TOKENIZER_VOCAB",
    "VARIANTS",
    "VISION_FP8_VARIANTS",
    "VISION_VARIANTS",
    "dequantise",
    "digest",
    "prompt",
    "quantise",
    "save_safetensors",
    "shapes",
    "tensors",
    "write",
    "write_text_model",
    "write_tokenizer",
    "write_vision_model",
]
