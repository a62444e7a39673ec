"""Compiles a decode step of a published model for TPUs that are not here, and reads the result.

    python scripts/compile_step.py --model Qwen/Qwen3-30B-A3B-FP8 --device v6e --mesh expert=4 \\
        --layers 2 --rows 32

Prints one JSON object: the kernels chosen, how often each is called, the bytes of every copy of an
array of a mebibyte or more, and the memory of one device: arguments (weights, cache and batch), the
compiler's peak, and what the planner says the step needs besides (`plan.temporary_bytes`). Ends
with status 1 if there is such a copy, if a kernel that was chosen is not called, or if the peak is
more than 5 % above arguments and planned temporaries. Needs the extra "aot" (libtpu).
"""

import argparse
import dataclasses
import json
import os
import sys
import time

import compile_kernels


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ.update(compile_kernels.ENVIRONMENT)
    found = report(args)
    print(json.dumps(found, indent=1))
    return 1 if found["copies"] or found["missing"] or found["peak_ratio"] > 1.05 else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen/Qwen3-30B-A3B", help="a preset's name")
    parser.add_argument("--device", default="v6e", help="a chip (four of it), or e.g. v6e:4x8")
    parser.add_argument("--mesh", default="expert=4")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--layers", type=int, help="keep the first ones only")
    parser.add_argument("--rows", type=int, default=32, help="rows that decode one token each")
    parser.add_argument("--context", type=int, default=1024, help="positions of each row")
    return parser.parse_args(argv)


def report(args: argparse.Namespace) -> dict:
    """What the compiled step of ``args`` holds."""
    from qwen_jax.planner.compiled import lower_step, topology_devices
    from qwen_jax.planner.plan import Load, temporary_bytes
    from qwen_jax.planner.program_text import calls_of, copies_of
    from qwen_jax.runtime import Runtime
    from qwen_jax.weights import presets

    config = presets.preset(args.model)
    if args.layers:
        text = dataclasses.replace(config.text, num_hidden_layers=args.layers)
        config = dataclasses.replace(config, text=text)
    runtime = Runtime.make(
        mesh=args.mesh,
        strategy=args.strategy,
        kernels=args.kernels,
        kv_cache_dtype=args.kv_cache_dtype,
        page_size=args.page_size,
        devices=topology_devices(compile_kernels.TOPOLOGIES.get(args.device, args.device)),
        config=config,
    )
    width = -(-args.context // runtime.page_size)
    sizes = {"tokens": args.rows, "rows": args.rows, "pages": args.rows * width}
    begun = time.perf_counter()
    exe = lower_step(config, runtime, **sizes, table_width=width).compile()
    seconds = time.perf_counter() - begun
    memory, text = exe.memory_analysis(), exe.as_text()
    calls = calls_of(text)
    wanted = [op for op, impl in runtime.kernels if impl == "tpu" and op != "segment_attention"]
    arguments, peak = memory.argument_size_in_bytes, memory.peak_memory_in_bytes
    planned = temporary_bytes(config, runtime, Load(batch=args.rows, chunk=1))
    return {
        "kernels": dict(runtime.kernels),
        "calls": calls,
        "missing": [op for op in wanted if not any(call.startswith(op) for call in calls)],
        "copies": copies_of(text),
        "arguments": arguments,
        "temporary": memory.temp_size_in_bytes,
        "planned_temporary": planned,
        "peak": peak,
        "peak_ratio": peak / (arguments + planned),
        "compile_seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
