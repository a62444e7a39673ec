"""Writes a variant as a directory like those on the hub. Knows files, not values."""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tiny.safetensors import save_safetensors
from tiny.variants import VARIANTS
from tiny.weights import Tensors, dequantise, quantise, stream, tensors

# Of the seeds 0 to 11 the one whose routing is farthest from a tie: in all variants, for prompts of
# 1 to 1,000 tokens, the last chosen expert is 1.3e-4 ahead of the next in log probability. Float32
# noise is some 1e-6, and an expert chosen otherwise would change logits by tenths.
SEED = 11
EOS = (1, 0)  # the end of a turn, the end of a text: in this order, as in the published files
_F32_SCALES = ("dense_fp8",)  # the published files have bfloat16
_SHIPS_HEAD = ("dense_tied_with_head",)


def write(
    directory: str | pathlib.Path,
    variant: str,
    *,
    dtype: str = "float32",
    shards: int = 1,
    dequantised: bool = False,
    vocab_size: int | None = None,
    eos: tuple[int, int] = EOS,
    seed: int = SEED,
) -> pathlib.Path:
    """Writes config.json, generation_config.json and the weights; returns the directory.

    Args:
        directory: made where missing.
        variant: a key of `VARIANTS`.
        dtype: of everything but FP8 values and scales: "float32", "bfloat16" or "float16".
        shards: files of the checkpoint; more than one come with an index.
        dequantised: an FP8 variant as a plain float32 checkpoint of exactly the same values.
        vocab_size: instead of the variant's own.
        eos: ids that end a text; config.json says the first, generation_config.json both.
        seed: of the weights; tensors of one name, shape and seed are equal in all variants.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {**VARIANTS[variant], "eos_token_id": eos[0]}
    config["vocab_size"] = vocab_size or config["vocab_size"]
    config["dtype" if "dtype" in config else "torch_dtype"] = "float32" if dequantised else dtype
    weights = tensors(config, seed, dtype=dtype, ships_head=variant in _SHIPS_HEAD)
    if "quantization_config" in config:
        scale_dtype = np.float32 if variant in _F32_SCALES else ml_dtypes.bfloat16
        weights = quantise(weights, config["quantization_config"], scale_dtype)
    elif dequantised:
        raise ValueError(f"variant {variant!r} is not quantised; use one with fp8 in its name")
    if dequantised:
        del config["quantization_config"]
        weights = dequantise(weights)
    _save_json(directory / "config.json", config)
    _save_json(directory / "generation_config.json", _generation(eos))
    if shards == 1:
        save_safetensors(directory / "model.safetensors", weights)
    else:
        _save_shards(directory, weights, shards)
    return directory


def _generation(eos: tuple[int, int]) -> dict[str, Any]:
    """The hybrid Qwen3 models' generation_config.json."""
    ids = {"bos_token_id": eos[1], "eos_token_id": list(eos), "pad_token_id": eos[1]}
    return {**ids, "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


def _save_shards(directory: pathlib.Path, weights: Tensors, shards: int) -> None:
    names = list(weights)
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_safetensors(directory / file, {name: weights[name] for name in held})
        where.update(dict.fromkeys(held, file))
    size = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    _save_json(directory / "model.safetensors.index.json", index)


def _save_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def prompt(length: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Random token ids, int32 [length]."""
    bits = stream(seed, f"prompt of {length}").random_raw(length)
    return (bits % np.uint64(vocab_size)).astype(np.int32)


def digest(directory: pathlib.Path) -> str:
    """SHA-256 of what a checkpoint of one file says: its config.json and its weights."""
    found = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        found.update((directory / name).read_bytes())
    return found.hexdigest()
