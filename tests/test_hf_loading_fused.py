"""Experts in one stack, as vision-language checkpoints have them."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import tiny
from checkpoint_samples import one_device, read_all, same

from qwen_jax.weights.checkpoint import load


def write_sized(directory: pathlib.Path, variant: str, **sizes: int) -> pathlib.Path:
    """A variant with other sizes, so that a transposed stack has another shape."""
    config = {**tiny.VARIANTS[variant], **sizes}
    tensors = tiny.tensors(config, 0, dtype="float32")
    if "quantization_config" in config:
        tensors = tiny.quantise(tensors, config["quantization_config"], ml_dtypes.bfloat16)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tiny.save_safetensors(directory / "model.safetensors", tensors)
    return directory


def fuse(directory: pathlib.Path, variant: str, input_first: bool) -> pathlib.Path:
    """Stacks the experts of a tiny checkpoint as vision-language checkpoints have them."""
    old = read_all(directory)
    config = tiny.VARIANTS[variant]
    new = {name: x for name, x in old.items() if ".experts." not in name}
    for i in range(config["num_hidden_layers"]):
        at, experts = f"model.layers.{i}.mlp.experts.", range(config["num_experts"])
        for suffix in ("", "_scale_inv") if "fp8" in variant else ("",):
            gate, up, down = (
                np.stack([old[f"{at}{e}.{x}_proj.weight{suffix}"] for e in experts])
                for x in ("gate", "up", "down")
            )
            both = np.concatenate([gate, up], axis=1)
            turn = (0, 2, 1) if input_first else (0, 1, 2)
            new[f"{at}gate_up_proj{suffix}"] = np.ascontiguousarray(both.transpose(turn))
            new[f"{at}down_proj{suffix}"] = np.ascontiguousarray(down.transpose(turn))
    tiny.save_safetensors(directory / "model.safetensors", new)
    return directory


@pytest.mark.parametrize("input_first", [True, False])
@pytest.mark.parametrize(("variant", "width"), [("moe", 40), ("moe_fp8", 256)])
def test_fused_experts_load_like_single_ones(variant, width, input_first, tmp_path):
    single = write_sized(tmp_path / "single", variant, moe_intermediate_size=width)
    fused = write_sized(tmp_path / "fused", variant, moe_intermediate_size=width)
    fuse(fused, variant, input_first)
    one, other = (load(x, runtime=one_device()) for x in (single, fused))
    assert same(one.params, other.params)


def test_a_fused_stack_that_fits_both_layouts_is_refused(tmp_path):
    directory = write_sized(tmp_path, "moe", moe_intermediate_size=64)
    fuse(directory, "moe", input_first=True)
    with pytest.raises(ValueError, match=r"down_proj: shape \(8, 64, 64\) fits 2 of the layouts"):
        load(directory, runtime=one_device())


def test_fused_scales_that_cover_gate_and_up_are_refused(tmp_path):
    directory = tiny.write(tmp_path, "moe_fp8")  # experts of 160 are one and a quarter block
    old = read_all(directory)
    new = {name: x for name, x in old.items() if ".experts." not in name}
    for i in range(2):
        at = f"model.layers.{i}.mlp.experts."
        for name, shape, scales in (
            ("gate_up_proj", (4, 192, 320), (4, 2, 3)),
            ("down_proj", (4, 160, 192), (4, 2, 2)),
        ):
            new[at + name] = np.zeros(shape, ml_dtypes.float8_e4m3fn)
            new[f"{at}{name}_scale_inv"] = np.ones(scales, ml_dtypes.bfloat16)
    tiny.save_safetensors(directory / "model.safetensors", new)
    with pytest.raises(ValueError, match=r"gate_up_proj: blocks of .* cut through gate and up"):
        load(directory, runtime=one_device())
