"""Compiles whole steps of the published models for TPU slices that are not here.

For each model and slice: the best plan by arithmetic, then a decode step of its batch and a prefill
chunk by the compiler. A line for each: weights and cache, and the peak, in GB on a device, as
planned and as compiled, and how far the plan is off; whether the cache is donated; copies of arrays
as large as a weight or a layer's pages; whether the kernels are called in every layer. Ends with
status 1 if a plan is more than 2 % off, a step copies such an array, the cache is not donated or a
kernel is missing. Needs the extra "aot" (libtpu), no TPU.

Examples:
    python scripts/compile_tpu.py                      # the whole matrix: an hour on two cores
    python scripts/compile_tpu.py --model Qwen3-30B-A3B --topology v5e:2x4 --layers 2 --json
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import sys

import compile_kernels

MATRIX = (
    ("Qwen3-30B-A3B", "v5e:2x4", 8, 8192),
    ("Qwen3-30B-A3B-FP8", "v6e:2x2", 8, 4096),
    ("Qwen3-Coder-480B-A35B-Instruct-FP8", "v6e:8x8", 64, 32768),
    ("Qwen3-Coder-480B-A35B-Instruct-FP8", "v5p:4x4x4", 64, 32768),
    ("Qwen3-Coder-480B-A35B-Instruct-FP8", "v7x:2x2x2", 64, 32768),
    ("Qwen3-VL-235B-A22B-Thinking", "v6e:4x8", 16, 8192),
)
MOST_OFF = 0.02
COLUMNS = "{:34} {:9} {:21} {:21} {:>6} {:7} {:>15} {:>15} {:>6}  {:7} {:6} {:7} {:>7}"
HEAD = ("model", "slice", "strategy", "mesh", "layers", "step", "held: plan/XLA")
HEAD += ("peak: plan/XLA", "off %", "donated", "copies", "kernels", "seconds")


def main(argv: list[str]) -> int:
    args = parse(argv)
    os.environ.update(compile_kernels.ENVIRONMENT)
    if not args.json:
        print(COLUMNS.format(*HEAD), flush=True)
    failed = False
    for name, topology, batch, context in chosen(args):
        for found in compiled(args, name, topology, args.batch or batch, args.context or context):
            print(json.dumps(found) if args.json else row(found), flush=True)
            failed |= not right(found)
    return int(failed)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="only this preset")
    parser.add_argument("--topology", help="only this slice (with --model: any)")
    parser.add_argument("--layers", type=int, help="keep so many decoder layers")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--mesh", help="default: the best one")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--dispatch", default="auto")
    parser.add_argument("--json", action="store_true", help="a JSON object a line, with all found")
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace) -> list[tuple[str, str, int, int]]:
    """What of the matrix is asked for, or a model and a slice beside it."""
    found = [x for x in MATRIX if args.model in (None, x[0]) and args.topology in (None, x[1])]
    if found:
        return found
    if not (args.model and args.topology):
        sys.exit("nothing of the matrix is left; give --model and --topology")
    return [(args.model, args.topology, 1, 4096)]


def compiled(args: argparse.Namespace, name: str, topology: str, batch: int, context: int):
    """A dictionary for each step."""
    from qwen_jax.planner.check import check_steps
    from qwen_jax.planner.chips import Topology
    from qwen_jax.planner.plan import Load
    from qwen_jax.planner.search import search
    from qwen_jax.sharding import parse_mesh
    from qwen_jax.weights import presets

    config = presets.preset(name)
    load = Load(batch=batch, context=context)
    given = {"mesh": args.mesh and parse_mesh(args.mesh), "strategy": args.strategy}
    # The plan of the whole model, so that a part of it is compiled as the whole would be.
    plan = search(config, Topology.parse(topology), load, dispatch=args.dispatch, **given)[0]
    if args.layers:
        text = dataclasses.replace(config.text, num_hidden_layers=args.layers)
        config = dataclasses.replace(config, text=text)
        given = {"mesh": plan.mesh, "strategy": plan.strategy, "dispatch": args.dispatch}
        plan = search(config, plan.topology, load, **given)[0]
    held = array_bytes(config, plan)
    for step, found in check_steps(config, plan).items():
        yield report(name, config, plan, step, found, held)


def report(name: str, config, plan, step: str, found, held: set[int]) -> dict:
    """What a step's program has, beside what was planned."""
    program = found.compiled
    return {
        "model": name,
        "layers": config.text.num_hidden_layers,
        "topology": str(plan.topology),
        "mesh": dict(plan.mesh),
        "strategy": plan.strategy,
        "dispatch": plan.dispatch,
        "batch": plan.load.batch,
        "context": plan.load.context,
        "chunk": plan.load.chunk,
        "step": step,
        "compile_seconds": round(program.seconds, 1),
        "planned": {"held": found.arguments, "temporary": found.temporary, "peak": found.peak},
        "compiled": {
            "held": program.arguments,
            "temporary": program.temporary,
            "peak": program.peak,
            "donated": program.donated,
        },
        "off": round(found.off, 5),
        "cache_donated": program.donated >= plan.cache,
        "copied_like_weights_or_cache": [n for n in program.copies if n in held],
        "copies": program.copies,
        "kernels": dict(plan.kernels),
        "missing": missing(config, plan, program.calls),
        "calls": program.calls,
        "collectives": [
            {"op": op, "bytes": size, "count": count}
            for (op, size), count in sorted(program.collectives.items())
        ],
    }


def missing(config, plan, calls: dict[str, int]) -> list[str]:
    """Kernels that are chosen and not called in every layer."""
    layers = config.text.num_hidden_layers
    wanted = {
        "paged_attention": layers,
        "ragged_dot": 2 * sum(map(config.text.is_moe, range(layers))),
    }
    counted: collections.Counter = collections.Counter()
    for call, count in calls.items():
        counted.update({op: count for op in wanted if call.startswith(op)})
    return [op for op, n in wanted.items() if plan.kernels.get(op) == "tpu" and counted[op] != n]


def array_bytes(config, plan) -> set[int]:
    """Bytes on a device of each weight, and of a layer's pages."""
    import jax

    from qwen_jax.planner.plan import abstract_runtime
    from qwen_jax.weights import derive
    from qwen_jax.weights.requantize import requantized

    stored, load = requantized(config, plan.load.quantization), plan.load
    mesh = abstract_runtime(plan.mesh, plan.rules, load).mesh
    arrays = jax.tree.leaves(derive.abstract(stored, load.dtype))
    places = jax.tree.leaves(derive.shardings(stored, mesh, plan.rules))
    sizes = {
        math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
        for x, place in zip(arrays, places, strict=True)
    }
    return sizes | {plan.cache // config.text.num_hidden_layers}


def right(found: dict) -> bool:
    """Whether the plan holds, and the program does what it should."""
    wrong = found["copied_like_weights_or_cache"] or found["missing"]
    return abs(found["off"]) <= MOST_OFF and found["cache_donated"] and not wrong


def row(found: dict) -> str:
    """A line of the table."""
    planned, program = found["planned"], found["compiled"]
    return COLUMNS.format(
        found["model"],
        found["topology"],
        found["strategy"],
        ",".join(f"{axis}={n}" for axis, n in found["mesh"].items()),
        found["layers"],
        found["step"],
        *(f"{planned[x] / 1e9:.3f}/{program[x] / 1e9:.3f}" for x in ("held", "peak")),
        f"{100 * found['off']:+.2f}",
        "yes" if found["cache_donated"] else "NO",
        len(found["copied_like_weights_or_cache"]),
        "all" if not found["missing"] else "NOT " + ",".join(found["missing"]),
        f"{found['compile_seconds']:.0f}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
