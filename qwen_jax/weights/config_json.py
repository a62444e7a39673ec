"""A `ModelConfig` as JSON: written in Hugging Face's keys, read back, and with keys replaced.

Knows the keys that `hf_config.py` reads and nothing of files. What is written goes back through
`hf_config.from_hf`, so a configuration from a manifest, or one that a user changed, is held against
the same rules as one from the hub.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from qwen_jax.weights import hf_config
from qwen_jax.weights.config import ModelConfig, QuantConfig, RopeConfig, TextConfig
from qwen_jax.weights.json_keys import Keys
from qwen_jax.weights.quant import FORMATS

_MOE_ONLY = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)
_SPELLINGS = {"num_local_experts": "num_experts", "torch_dtype": "dtype", "type": "rope_type"}
_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_SCALE_DTYPES = ("bfloat16", "float32")


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Everything that `from_json` needs to build an equal configuration."""
    quant = config.quantization
    storage = None if quant is None else dataclasses.asdict(quant)
    return {"config": as_hf(config), "quantization": storage}


def from_json(raw: Any, where: str) -> ModelConfig:
    """The configuration that `to_json` wrote, after a way through JSON.

    Raises:
        ValueError: a key is missing, unknown, or has a value of another kind.
    """
    keys = Keys(raw, where)
    config = hf_config.from_hf(keys.take("config"))
    storage = keys.take("quantization", None)
    keys.finish()
    if storage is None:
        return config
    return dataclasses.replace(config, quantization=_quantization(Keys(storage, where)))


def override(config: ModelConfig, overrides: Mapping[str, Any]) -> ModelConfig:
    """The configuration with some keys of its `config.json` replaced.

    Args:
        config: any.
        overrides: e.g. ``{"num_hidden_layers": 2}`` or ``{"rope_scaling": {"rope_type": "yarn",
            "factor": 4.0, "original_max_position_embeddings": 32768}}``, in either spelling; in a
            vision-language model the decoder's keys need no ``text_config`` around them.

    Raises:
        ValueError: a key is unknown, or the result is no configuration.
    """
    raw = as_hf(config)
    for key, value in overrides.items():
        _replace(raw, _SPELLINGS.get(key, key), value)
    return dataclasses.replace(hf_config.from_hf(raw), quantization=config.quantization)


def as_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a configuration, without its quantisation."""
    raw: dict[str, Any] = {
        "model_type": config.model_type,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": config.dtype,
        "eos_token_id": list(config.eos_token_ids),
    }
    text = _text(config.text)
    if config.vision is None:
        return raw | text
    vision = dataclasses.asdict(config.vision) | {"hidden_act": "gelu_pytorch_tanh"}
    vision["deepstack_visual_indexes"] = list(config.vision.deepstack_visual_indexes)
    ids = {name: getattr(config, name) for name in _IDS}
    return raw | ids | {"text_config": text, "vision_config": vision}


def _text(text: TextConfig) -> dict[str, Any]:
    raw = {f.name: getattr(text, f.name) for f in dataclasses.fields(text) if f.name != "rope"}
    raw["mlp_only_layers"] = list(text.mlp_only_layers)
    if not text.num_experts:
        raw = {key: value for key, value in raw.items() if key not in _MOE_ONLY}
    return raw | {"rope_theta": text.rope.theta, "rope_scaling": _rope(text.rope)}


def _rope(rope: RopeConfig) -> dict[str, Any]:
    raw: dict[str, Any] = {"rope_type": rope.kind}
    if rope.mrope_section:
        raw |= {"mrope_section": list(rope.mrope_section), "mrope_interleaved": True}
    if rope.kind == "yarn":
        raw |= {
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_position,
            "attention_factor": rope.attention_factor,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
        }
    return raw


def _quantization(keys: Keys) -> QuantConfig:
    form, block = keys.take("form"), keys.take("block", None)
    scale_dtype = keys.take("scale_dtype")
    if form not in FORMATS or scale_dtype not in _SCALE_DTYPES:
        raise ValueError(f"{keys.where}: quantization {form!r} with scales of {scale_dtype!r}")
    if block is not None:
        rows, columns = Keys({"block": block}, keys.where).integers("block", least=1)
        block = (rows, columns)
    skip = tuple(str(name) for name in keys.take("skip", ()))
    keys.finish()
    return QuantConfig(form=form, block=block, skip=skip, scale_dtype=scale_dtype)


def _replace(raw: dict[str, Any], key: str, value: Any) -> None:
    """Puts one key in its place: the top level, or the decoder's part."""
    text = raw.get("text_config", raw)
    if key == "rope_parameters":
        value = dict(Keys(value, f"overrides: {key}").items())
        text["rope_theta"] = value.pop("rope_theta", text["rope_theta"])
        key = "rope_scaling"
    if key == "rope_scaling":
        replaced = Keys(value or {"rope_type": "default"}, f"overrides: {key}")
        text[key] |= {_SPELLINGS.get(inner, inner): each for inner, each in replaced.items()}
    elif key in ("text_config", "vision_config") and key in raw:
        for inner, each in Keys(value, f"overrides: {key}").items():
            if _SPELLINGS.get(inner, inner) not in raw[key]:
                raise _unknown(f"{key}.{inner}", raw[key])
            _replace(raw[key], _SPELLINGS.get(inner, inner), each)
    elif key in raw:
        raw[key] = value
    elif key in text:
        text[key] = value
    else:
        raise _unknown(key, {**raw, **text})


def _unknown(key: str, known: Mapping[str, Any]) -> ValueError:
    near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
    return ValueError(f"overrides: this model's configuration has no key {key!r}{hint}")
