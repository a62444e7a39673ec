"""Compiles the full-width vision tower, here or for a TPU that is not here, and prints its memory.

XLA's own account of each compiled program; nothing is run. For a TPU install the libtpu that goes
with this JAX (`pip install -e ".[tpu]"`); no TPU is needed.

Examples:
    python scripts/compile_tower.py --patches 65536            # 4096 x 4096 pixels, on this machine
    python scripts/compile_tower.py --topology v6e:2x2 --patches 1024 4096 16384
"""

import argparse
import os
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from qwen_jax.model.vision import VisionBatch, jit_encode
from qwen_jax.runtime import Runtime
from qwen_jax.weights import derive, presets
from qwen_jax.weights.config import VisionConfig


def abstract_batch(patches: int, config: VisionConfig, segments: int = 8) -> VisionBatch:
    """Shapes of a bucket."""
    shape, sizes = jax.ShapeDtypeStruct, config.sizes
    return VisionBatch(
        patches=shape((patches, sizes["C"] * sizes["Z"] * sizes["Y"] * sizes["X"]), jnp.uint8),
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
    parser.add_argument("--patches", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--topology", help="e.g. v6e:2x2; default: the devices that are here")
    parser.add_argument("--mesh", default="tensor=1", help="the towers' heads split over tensor")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args(argv)
    config = presets.preset(args.preset)
    if config.vision is None:
        parser.error(f"{args.preset} has no vision tower")
    devices = None
    if args.topology:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask
        devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    runtime = Runtime.make(mesh=args.mesh, devices=devices, dtype=args.dtype)
    weights = derive.abstract(config, runtime.dtype).vision
    placed = derive.shardings(config, runtime.mesh, runtime.rules).vision
    weights = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), weights, placed
    )
    whole = jax.NamedSharding(runtime.mesh, jax.P())
    print(f"{args.preset}, {args.topology or 'here'}, {args.mesh}, {runtime.dtype}; GB per device")
    print("patches  compile s  weights+pixels  features  temporary  peak at most")
    for patches in args.patches:
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
            abstract_batch(patches, config.vision),
        )
        begun = time.perf_counter()
        lowered = jit_encode.lower(weights, batch, config.vision, runtime)
        memory = lowered.compile().memory_analysis()
        seconds = time.perf_counter() - begun
        sizes = (
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            memory.temp_size_in_bytes,
        )
        given, out, temporary, peak = (f"{n / 1e9:.2f}" for n in (*sizes, sum(sizes)))
        columns = f"{given:>14}  {out:>8}  {temporary:>9}  {peak:>12}"
        print(f"{patches:7,}  {seconds:9.1f}  {columns}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
