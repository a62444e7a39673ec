"""The weights of a tiny checkpoint: names, shapes, values, and their block-FP8 form.

Knows which tensors a config calls for; knows no file. Values are sums of raw PCG64 bits, whose
streams numpy guarantees, and not numpy's normal variates, whose last bits may differ between
versions and machines. Scales are such that logits have about unit scale, attention is peaked in
places, and the router tells experts apart.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

Config = Mapping[str, Any]
Tensors = dict[str, np.ndarray]

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
FP8_MAX = 448.0


def stream(seed: int, name: str) -> np.random.PCG64:
    """The bits that belong to a name."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.PCG64(int.from_bytes(key[:16], "little"))


def unit(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Zero mean, unit variance, nearly normal: float64 sums of four 16-bit uniforms each."""
    bits = stream(seed, name).random_raw(math.prod(shape))
    total = bits.view(np.uint16).reshape(-1, 4).sum(1, dtype=np.int64) - 2 * 65535
    return (total / math.sqrt((65536**2 - 1) / 3)).reshape(shape)


def shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that a config calls for, in Hugging Face's names and layouts."""
    d = config["hidden_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], d)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield f"{at}input_layernorm.weight", (d,)
        yield from ((f"{at}self_attn.{name}", shape) for name, shape in _attention(config))
        yield f"{at}post_attention_layernorm.weight", (d,)
        yield from ((f"{at}mlp.{name}", shape) for name, shape in _mlp(config, layer))
    yield "model.norm.weight", (d,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], d)


def _attention(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, heads = config["hidden_size"], config["num_attention_heads"]
    h = config.get("head_dim", d // heads)
    q, kv = heads * h, config["num_key_value_heads"] * h
    for name, out, into in (("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)):
        yield f"{name}_proj.weight", (out, into)
        if config.get("attention_bias"):
            yield f"{name}_proj.bias", (out,)
    yield from ((f"{name}_norm.weight", (h,)) for name in "qk")


def _mlp(config: Config, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, width, owners = config["hidden_size"], config["intermediate_size"], [""]
    if is_moe(config, layer):
        experts = config.get("num_experts") or config["num_local_experts"]
        width, owners = config["moe_intermediate_size"], [f"experts.{e}." for e in range(experts)]
        yield "gate.weight", (experts, d)
    for owner in owners:
        yield f"{owner}gate_proj.weight", (width, d)
        yield f"{owner}up_proj.weight", (width, d)
        yield f"{owner}down_proj.weight", (d, width)


def is_moe(config: Config, layer: int) -> bool:
    """Whether a layer has experts. Source: transformers Qwen3MoeDecoderLayer.__init__."""
    if config["model_type"] == "qwen3" or layer in config["mlp_only_layers"]:
        return False
    return (layer + 1) % config["decoder_sparse_step"] == 0


def tensors(config: Config, seed: int, *, dtype: str, ships_head: bool = False) -> Tensors:
    """All weights of a config, unquantised.

    Args:
        config: a parsed config.json.
        seed: of every stream.
        dtype: a key of `DTYPES`.
        ships_head: whether a tied checkpoint holds an lm_head.weight all the same.
    """
    tied = config["tie_word_embeddings"]
    found = {
        name: _values(name, shape, seed, tied).astype(DTYPES[dtype])
        for name, shape in shapes(config)
    }
    if ships_head:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def _values(name: str, shape: tuple[int, ...], seed: int, tied: bool) -> np.ndarray:
    z = unit(seed, name, shape)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 1.4 + 0.3 * z  # scores of about twice unit scale: a peaked softmax
    if name.endswith("norm.weight"):
        return 1 + 0.25 * z
    if name.endswith(".bias"):
        return 0.3 * z
    if "embed_tokens" in name:
        return z * (shape[-1] ** -0.5 if tied else 1.0)
    gains = {"mlp.gate.weight": 3.0, "o_proj.weight": 1.5, "down_proj.weight": 2.0}
    gain = next((g for end, g in gains.items() if name.endswith(end)), 1.0)
    return z * (gain * shape[-1] ** -0.5)


def quantise(weights: Tensors, quantization: Config, scale_dtype: Any) -> Tensors:
    """Block-FP8: projections become F8_E4M3 and each brings a ``weight_scale_inv``.

    Args:
        weights: all tensors of a checkpoint.
        quantization: the config's ``quantization_config``.
        scale_dtype: bfloat16, as published, or float32.
    """
    block = quantization["weight_block_size"]
    kept = {f"{module}.weight" for module in quantization["modules_to_not_convert"]}
    found: Tensors = {}
    for name, w in weights.items():
        if name in kept or not name.endswith("_proj.weight"):
            found[name] = w
            continue
        rows, columns = (np.arange(0, n, b) for n, b in zip(w.shape, block, strict=True))
        w = w.astype(np.float32)
        amax = np.maximum.reduceat(np.maximum.reduceat(np.abs(w), rows, 0), columns, 1)
        scale = (amax / np.float32(FP8_MAX)).astype(scale_dtype)
        scaled = np.clip(w / _spread(scale, w.shape, block), -FP8_MAX, FP8_MAX)
        found[name] = scaled.astype(ml_dtypes.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scale
    return found


def dequantise(weights: Tensors, block: tuple[int, int] = (128, 128)) -> Tensors:
    """The same values in float32: each FP8 value times its block's scale."""
    found: Tensors = {}
    for name, w in weights.items():
        if name.endswith("_scale_inv"):
            continue
        found[name] = w.astype(np.float32)
        if (scale := weights.get(f"{name}_scale_inv")) is not None:
            found[name] *= _spread(scale, w.shape, block)
    return found


def _spread(scale: np.ndarray, shape: tuple[int, ...], block) -> np.ndarray:
    whole = np.kron(scale.astype(np.float32), np.ones(block, np.float32))
    return whole[: shape[0], : shape[1]]


def stack_experts(weights: Tensors, *, by_hub: bool) -> Tensors:
    """Experts of a layer in two tensors (FP8: and their scales in two more), as VL checkpoints do.

    by_hub: ``gate_up_proj`` [E, D, 2F] and ``down_proj`` [E, F, D], as published; else transposed,
    as transformers 5 saves them.
    """
    found: Tensors = {}
    for name, w in weights.items():
        before, mark, after = name.partition(".experts.")
        if not mark:
            found[name] = w
            continue
        if not after.startswith("0.gate_proj.weight"):
            continue
        suffix = after.removeprefix("0.gate_proj.weight")
        at, tail = before + mark, f".gate_proj.weight{suffix}"
        count = sum(n.startswith(at) and n.endswith(tail) for n in weights)
        gate, up, down = (
            np.stack(
                [weights[f"{before}{mark}{e}.{kind}_proj.weight{suffix}"] for e in range(count)]
            )
            for kind in ("gate", "up", "down")
        )
        for kind, x in (("gate_up", np.concatenate([gate, up], axis=1)), ("down", down)):
            whole = np.ascontiguousarray(x.swapaxes(1, 2)) if by_hub else x
            found[f"{at}{kind}_proj{suffix}"] = whole
    return found
