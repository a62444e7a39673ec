"""Compiles whole steps of the published models for TPU slices that are not here.

For each model and slice: the best plan by arithmetic, then a decode step of its batch and a prefill
chunk by the compiler, with the bytes of both beside each other, what is copied, and what is sent.
Install the libtpu that goes with this JAX (`pip install -e ".[tpu]"`); no TPU is needed.

Examples:
    python scripts/compile_tpu.py                      # the whole matrix: hours on two cores
    python scripts/compile_tpu.py --model Qwen3-30B-A3B --topology v5e:2x4 --layers 2
"""

import argparse
import dataclasses
import json
import math
import sys

import jax

from qwen_jax.planner.check import compile_plan
from qwen_jax.planner.chips import Topology
from qwen_jax.planner.plan import Load, abstract_runtime
from qwen_jax.planner.search import search
from qwen_jax.weights import derive, presets
from qwen_jax.weights.requantize import requantized

MATRIX = (
    ("Qwen3-30B-A3B", "v5e:2x4", Load(batch=8, context=8192)),
    ("Qwen3-30B-A3B-FP8", "v6e:2x2", Load(batch=8, context=4096)),
    ("Qwen3-Coder-480B-A35B-Instruct-FP8", "v6e:8x8", Load(batch=64, context=32768)),
    ("Qwen3-Coder-480B-A35B-Instruct-FP8", "v5p:4x4x4", Load(batch=64, context=32768)),
    ("Qwen3-Coder-480B-A35B-Instruct-FP8", "v7x:2x2x2", Load(batch=64, context=32768)),
    ("Qwen3-VL-235B-A22B-Thinking", "v6e:4x8", Load(batch=16, context=8192)),
)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="only this preset")
    parser.add_argument("--topology", help="only this slice (with --model: any)")
    parser.add_argument("--layers", type=int, help="keep so many decoder layers")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--context", type=int)
    args = parser.parse_args(argv)
    chosen = [
        (name, topology, load)
        for name, topology, load in MATRIX
        if args.model in (None, name) and args.topology in (None, topology)
    ]
    if not chosen and args.model and args.topology:
        chosen = [(args.model, args.topology, Load())]
    if not chosen:
        parser.error("nothing of the matrix is left; give --model and --topology")
    for name, topology, load in chosen:
        given = {"batch": args.batch, "context": args.context}
        load = dataclasses.replace(load, **{k: v for k, v in given.items() if v})
        for line in compiled(name, topology, load, args.layers):
            print(json.dumps(line), flush=True)


def compiled(name: str, topology: str, load: Load, layers: int | None):
    """A dictionary for each step."""
    config = presets.preset(name)
    if layers:
        text = dataclasses.replace(config.text, num_hidden_layers=layers)
        config = dataclasses.replace(config, text=text)
    plan = search(config, Topology.parse(topology), load)[0]
    held = array_bytes(config, plan)
    for step, found in zip(("decode", "prefill"), compile_plan(config, plan), strict=True):
        arguments = plan.weights + plan.cache
        yield {
            "model": name,
            "layers": config.text.num_hidden_layers,
            "topology": topology,
            "mesh": dict(plan.mesh),
            "strategy": plan.strategy,
            "step": step,
            "compile_seconds": round(found.seconds, 1),
            "gb": {
                "arguments": round(found.arguments / 1e9, 3),
                "temporary": round(found.temporary / 1e9, 3),
                "peak": round(found.peak / 1e9, 3),
                "donated": round(found.donated / 1e9, 3),
            },
            "planned_arguments_gb": round(arguments / 1e9, 3),
            "planned_peak_gb": round(plan.peak / 1e9, 3),
            "cache_donated": found.donated >= plan.cache,
            "copied_like_weights_or_cache_mb": [
                round(n / 1e6, 1) for n in found.copies if n in held
            ],
            "kernels": dict(plan.kernels),
            "calls": found.calls,
            "copies_mb": [round(n / 1e6, 1) for n in found.copies],
            "collectives": [
                {"op": op, "mb": round(size / 1e6, 3), "count": count}
                for (op, size), count in sorted(found.collectives.items())
            ],
        }


def array_bytes(config, plan) -> set[int]:
    """Bytes on a device of each weight, and of a layer's pages."""
    stored, load = requantized(config, plan.load.quantization), plan.load
    mesh = abstract_runtime(plan.mesh, plan.rules, load).mesh
    arrays = jax.tree.leaves(derive.abstract(stored, load.dtype))
    places = jax.tree.leaves(derive.shardings(stored, mesh, plan.rules))
    sizes = {
        math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
        for x, place in zip(arrays, places, strict=True)
    }
    return sizes | {plan.cache // config.text.num_hidden_layers}


if __name__ == "__main__":
    main(sys.argv[1:])
