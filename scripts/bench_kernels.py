"""What kernels reach of their limits: measured on an accelerator, or by the compiler's schedule.

    python scripts/bench_kernels.py --match 30B-A3B/whole/decode --out measured.json     on a TPU
    python scripts/bench_kernels.py --device v6e --match ep8/decode                      anywhere

On an accelerator: the time of a call, its share of the bandwidth (or matrix unit) limit measured in
the same run, and the times of the baselines. With --device, for a TPU that is not here (extra
"aot"): the static schedule. ``bound`` is what must move over the stated bandwidth, ``copies`` what
the kernel copies, ``compute`` all bundles at the chip's clock; ``call`` is the longer of both, and
before and after it what cannot overlap: the bundles outside of the loops and one innermost tile.
Latencies of copies and stalls are in no schedule.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

import compile_kernels


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    table = scheduled(args) if args.device else measured(args)
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"command": " ".join(sys.argv), "programs": table}, file, indent=1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", choices=compile_kernels.OPS, help="default: all")
    parser.add_argument("--device", choices=compile_kernels.TOPOLOGIES, help="schedule for this")
    parser.add_argument("--match", default="", help="a regular expression found in the name")
    parser.add_argument("--repeats", type=int, default=20, help="calls in one measurement")
    parser.add_argument("--out", help="JSON file for the results")
    return parser.parse_args(argv)


def scheduled(args: argparse.Namespace) -> list[dict]:
    """A row per program from libtpu's dump; one process, so the environment comes first."""
    table = []
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        os.environ.update(compile_kernels.ENVIRONMENT, LIBTPU_INIT_ARGS=flags)
        mesh = compile_kernels.chip(args.device)
        print(f"{'us':>60} bound copies compute call call/bound spills")
        for program in compile_kernels.listed(mesh, args.op, args.match):
            for old in pathlib.Path(dump).iterdir():
                old.unlink()
            compile_kernels.compiled(program, mesh)
            row = estimate(program, pathlib.Path(dump), mesh.devices.flat[0].device_kind)
            table.append({"device": args.device, **row})
            times = " ".join(f"{row[k] * 1e6:7.1f}" for k in ("bound", "copies", "compute", "call"))
            ratio = row["call"] / row["bound"]
            print(f"{program.name:>53} {times} {ratio:5.2f} {row['spills']}", flush=True)
    return table


def estimate(program, dump: pathlib.Path, kind: str) -> dict:
    """Times in seconds of one program, from the schedule in ``dump``."""
    from pallas_kernels import tpu_schedule
    from pallas_kernels.device import tpu_info

    info = tpu_info(kind)
    schedule = tpu_schedule.read(dump, program.name.split("/")[0])
    clock, bandwidth = tpu_schedule.clock(info), info.mem_bw_bytes_per_second * info.num_cores
    rate = info.bf16_ops_per_second * info.num_cores
    copies, compute = program.copied / bandwidth, schedule.cycles(program.trips) / clock
    loops = len(program.trips)
    alone = schedule.total - sum(schedule.nest[: loops - 1])
    return {
        "name": program.name,
        "bound": max(program.moved / bandwidth, program.flops / rate),
        "copies": copies,
        "compute": compute,
        "call": max(copies, compute) + alone / clock,
        "spills": schedule.spills,
        "bundles": schedule.nest,
    }


def measured(args: argparse.Namespace) -> list[dict]:
    """A row per program and baseline, with the limit measured in the same run."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from qwen_jax import roofline

    device = jax.devices()[0]
    limit = roofline.measure("bfloat16")
    mesh = Mesh(np.array([device]), ("one",), axis_types=(AxisType.Auto,))
    print(f"{device.device_kind}: {limit.bytes_per_s / 1e9:.0f} GB/s", file=sys.stderr)
    table = []
    for program in compile_kernels.listed(mesh, args.op, args.match):
        inputs = program.make(0)
        bound = limit.seconds(roofline.Work(program.moved, program.flops))
        for name, fn in {"kernel": program.fn, **program.baselines}.items():
            seconds = fastest(jax.jit(fn), inputs, args.repeats)
            row = {"name": program.name, "what": name, "seconds": seconds, "bound": bound}
            table.append({"device": device.device_kind, **row})
            share = f"{bound / seconds:.0%} of the limit"
            print(f"{program.name:>53} {name:>8} {seconds * 1e6:9.1f} us, {share}", flush=True)
    return table


def fastest(fn, inputs, repeats: int) -> float:
    """Seconds per call: the best of five rows of ``repeats`` calls that do not wait in between."""
    import jax

    jax.block_until_ready(fn(*inputs))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            out = fn(*inputs)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / repeats)
    return min(times)


if __name__ == "__main__":
    main()
