"""Compiles a decode step of a published model for TPUs that are not here, and reads the result.

    python scripts/compile_step.py --model Qwen/Qwen3-30B-A3B-FP8 --device v6e --mesh expert=4 \\
        --layers 2 --rows 32

Prints one JSON object: the kernels chosen, how often each is called, the bytes of every copy of an
array of a mebibyte or more, and the memory of one device: arguments (weights, cache and batch), the
compiler's peak, and what the planner says the step needs besides (`temporary.step_bytes`). Ends
with status 1 if there is such a copy, if a kernel that was chosen is not called, or if the peak is
more than 2 % off arguments and planned temporaries. Needs the extra "aot" (libtpu).
"""

import argparse
import dataclasses
import json
import os
import sys

import compile_kernels


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ.update(compile_kernels.ENVIRONMENT)
    found = report(args)
    print(json.dumps(found, indent=1))
    return 1 if found["copies"] or found["missing"] or abs(found["peak_ratio"] - 1) > 0.02 else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen/Qwen3-30B-A3B", help="a preset's name")
    parser.add_argument("--device", default="v6e", help="a chip (four of it), or e.g. v6e:4x8")
    parser.add_argument("--mesh", default="expert=4")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--dispatch", default="auto", help="how tokens meet their experts")
    parser.add_argument("--kernels", default="auto", help='e.g. "ragged_dot=tpu_w8a8"')
    parser.add_argument("--quantization", help="as on load: fp8 or int8")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--layers", type=int, help="keep the first ones only")
    parser.add_argument("--rows", type=int, default=32, help="rows that decode one token each")
    parser.add_argument("--context", type=int, default=1024, help="positions of each row")
    return parser.parse_args(argv)


def report(args: argparse.Namespace) -> dict:
    """What the compiled step of ``args`` holds."""
    from pallas_kernels.device import Device
    from qwen_jax.commands import options
    from qwen_jax.planner.compiled import compile_step, topology_devices
    from qwen_jax.planner.temporary import step_bytes
    from qwen_jax.runtime import Runtime
    from qwen_jax.weights import presets
    from qwen_jax.weights.requantize import requantized

    config = requantized(presets.preset(args.model), args.quantization)
    if args.layers:
        text = dataclasses.replace(config.text, num_hidden_layers=args.layers)
        config = dataclasses.replace(config, text=text)
    runtime = Runtime.make(
        mesh=args.mesh,
        strategy=args.strategy,
        dispatch=args.dispatch,
        kernels=options.kernels(args.kernels),
        kv_cache_dtype=args.kv_cache_dtype,
        page_size=args.page_size,
        devices=topology_devices(compile_kernels.TOPOLOGIES.get(args.device, args.device)),
        config=config,
    )
    width = -(-args.context // runtime.page_size)
    sizes = {"tokens": args.rows, "rows": args.rows}
    program = compile_step(config, runtime, **sizes, pages=args.rows * width, table_width=width)
    ours = [op for op, impl in runtime.kernels if impl != "xla" and op != "segment_attention"]
    device = Device.of(runtime.mesh.devices.flat[0])
    planned = step_bytes(config, runtime, device, dict(runtime.kernels), **sizes)
    return {
        "kernels": dict(runtime.kernels),
        "calls": program.calls,
        "missing": [op for op in ours if not any(c.startswith(op) for c in program.calls)],
        "copies": program.copies,
        "ragged_exchanges": sum(
            count for (op, _), count in program.collectives.items() if op == "ragged-all-to-all"
        ),
        "arguments": program.arguments,
        "temporary": program.temporary,
        "planned_temporary": planned,
        "peak": program.peak,
        "peak_ratio": program.peak / (program.arguments + planned),
        "compile_seconds": program.seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
