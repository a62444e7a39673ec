"""Compiles a decode step of a published model for TPUs that are not here, and reads the result.

    python scripts/compile_step.py --model Qwen/Qwen3-30B-A3B-FP8 --device v6e --mesh expert=4 \\
        --layers 2 --rows 32

Prints one JSON object: the kernels chosen, how often each is called, the memory of one device, and
every copy of an array as large as a layer's expert weights. Ends with status 1 if there is such a
copy, or if a kernel that was chosen is not called. Needs the extra "aot" (libtpu).
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys

import compile_kernels

# "%copy.3 = bf16[32,2,2048,768]{3,2,1,0:T(8,128)} copy(%param.7)"
COPY = re.compile(r" = (\w+)\[([\d,]+)\]\S* copy(?:-start)?\(")
# "%ragged_dot_bfloat16.2 = f32[…] custom-call(…), custom_call_target="tpu_custom_call""
CALL = re.compile(r'%(\w+)\S* = .* custom-call\(.*custom_call_target="tpu_custom_call"')


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ.update(compile_kernels.ENVIRONMENT)
    found = report(args)
    print(json.dumps(found, indent=1))
    return 1 if found["copies"] or found["missing"] else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen/Qwen3-30B-A3B", help="a preset's name")
    parser.add_argument("--device", default="v6e", choices=compile_kernels.TOPOLOGIES)
    parser.add_argument("--mesh", default="expert=4")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--layers", type=int, help="keep the first ones only")
    parser.add_argument("--rows", type=int, default=32, help="rows that decode one token each")
    parser.add_argument("--context", type=int, default=1024, help="positions of each row")
    return parser.parse_args(argv)


def report(args: argparse.Namespace) -> dict:
    """What the compiled step of ``args`` holds."""
    from jax.experimental import topologies

    from qwen_jax.runtime import Runtime
    from qwen_jax.weights import presets

    config = presets.preset(args.model)
    if args.layers:
        text = dataclasses.replace(config.text, num_hidden_layers=args.layers)
        config = dataclasses.replace(config, text=text)
    name = compile_kernels.TOPOLOGIES[args.device]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    runtime = Runtime.make(
        mesh=args.mesh,
        strategy=args.strategy,
        kernels=args.kernels,
        devices=devices,
        config=config,
    )
    exe = compiled(config, runtime, args.rows, args.context)
    memory, lines = exe.memory_analysis(), exe.as_text().splitlines()
    calls = [found[1] for found in map(CALL.search, lines) if found]
    wanted = [op for op, impl in runtime.kernels if impl == "tpu" and op != "segment_attention"]
    return {
        "kernels": dict(runtime.kernels),
        "calls": {kernel: calls.count(kernel) for kernel in sorted(set(calls))},
        "missing": [op for op in wanted if not any(call.startswith(op) for call in calls)],
        "copies": copies(lines, smallest_expert_stack(config, runtime)),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }


def compiled(config, runtime, rows: int, context: int):
    """The executable of one decode step, made from shapes alone."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from qwen_jax import sharding
    from qwen_jax.model import cache
    from qwen_jax.model.step import jit_step
    from qwen_jax.weights import derive

    def place(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)

    shapes = derive.abstract(config, runtime.dtype)
    params = jax.tree.map(place, shapes, derive.shardings(config, runtime.mesh, runtime.rules))
    width = -(-context // runtime.page_size)
    pages = jax.eval_shape(lambda: cache.make_cache(config.text, runtime, rows * width))
    heads = sharding.spec(". . K .", runtime.mesh, runtime.rules)
    pages = jax.tree.map(lambda x: place(x, NamedSharding(runtime.mesh, heads)), pages)
    whole = NamedSharding(runtime.mesh, PartitionSpec())
    ints = lambda *shape: place(jax.ShapeDtypeStruct(shape, jnp.int32), whole)
    batch = cache.RaggedBatch(
        ints(rows), ints(3, rows), ints(rows + 1), ints(rows), ints(rows, width)
    )
    with jax.set_mesh(runtime.mesh):
        return jit_step.lower(params, config, runtime, batch, pages).compile()


def smallest_expert_stack(config, runtime) -> int:
    """Elements of the smaller of a layer's two stacks of experts, on one device."""
    from qwen_jax import kernel_facts
    from qwen_jax.runtime import KV_DTYPES

    facts = kernel_facts.of(
        config,
        mesh=runtime.mesh,
        rules=runtime.rules,
        dtype=runtime.dtype,
        kv_dtype=KV_DTYPES[runtime.kv_dtype],
        page_size=runtime.page_size,
    )
    return min(math.prod(each.w_shape) for each in facts["ragged_dot"])


def copies(lines: list[str], smallest: int) -> list[str]:
    """Copies of arrays of at least ``smallest`` elements, as the compiled text has them."""
    found = []
    for line in lines:
        match = COPY.search(line)
        if match and math.prod(map(int, match[2].split(","))) >= smallest:
            found.append(line.strip()[:200])
    return found


if __name__ == "__main__":
    sys.exit(main())
