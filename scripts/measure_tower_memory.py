"""Prints the memory that the full-width vision tower takes for one picture, without running it.

XLA's own account of the compiled program, for the devices that are here.

Example:
    python scripts/measure_tower_memory.py --preset Qwen3-VL-30B-A3B-Instruct --side 4096
"""

import argparse
import sys

import jax
import jax.numpy as jnp

from qwen_jax.model.vision import VisionBatch, jit_encode
from qwen_jax.runtime import Runtime
from qwen_jax.weights import derive, presets


def abstract_batch(patches: int, width: int, segments: int) -> VisionBatch:
    """Shapes of a bucket."""
    shape = jax.ShapeDtypeStruct
    return VisionBatch(
        patches=shape((patches, width), jnp.uint8),
        coordinates=shape((patches, 2), jnp.int32),
        taps=shape((4, patches), jnp.int32),
        tap_weights=shape((4, patches), jnp.float32),
        segment_starts=shape((segments + 1,), jnp.int32),
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="Qwen3-VL-30B-A3B-Instruct")
    parser.add_argument("--side", type=int, default=4096, help="pixels of a square picture")
    args = parser.parse_args(argv)
    config = presets.preset(args.preset)
    assert config.vision is not None
    runtime = Runtime.make(mesh="tensor=1")
    weights = derive.abstract(config, runtime.dtype).vision
    sizes = config.vision.sizes
    patches = (args.side // config.vision.patch_size) ** 2
    width = sizes["C"] * sizes["Z"] * sizes["Y"] * sizes["X"]
    batch = abstract_batch(patches, width, 8)
    memory = jit_encode.lower(weights, batch, config.vision, runtime).compile().memory_analysis()
    parts = {
        "weights and pixels": memory.argument_size_in_bytes,
        "features": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }
    parts["peak, at most"] = sum(parts.values())
    print(f"{args.preset}: {patches:,} patches, {runtime.dtype}")
    for name, size in parts.items():
        print(f"  {name:20s}{size / 1e9:8.2f} GB")


if __name__ == "__main__":
    main(sys.argv[1:])
