"""What kernels reach of their limits: measured on an accelerator, or by the compiler's schedule.

    python scripts/bench_kernels.py --match 30B-A3B/whole/ --out measured.json   on a TPU, an H200
    python scripts/bench_kernels.py --device v6e --match ep8/decode                      anywhere

On an accelerator: the time of a call, its share of the bandwidth (or matrix unit) limit measured in
the same run, and the times of the baselines (tokamax among them if it is installed). Calls follow
each other inside of one program, so no time of the host is in them; the cache keeps what fits into
it from call to call, which is more than all of a call's weights only in the smallest decode cases.
With --device, for a TPU that is not here (extra "aot"): the static schedule. ``bound`` is what must
move over the stated bandwidth, ``copies`` what the kernel copies, ``compute`` all bundles at the
chip's clock; ``call`` is the longer of both, and before and after it what cannot overlap: the
bundles outside of the loops and one innermost tile.
Latencies of copies and stalls are in no schedule.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator

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
    """A row per program and baseline, with the limit measured in the same run.

    Raises:
        ValueError: there is no kernel for the device that is here.
    """
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from qwen_jax import roofline

    device = jax.devices()[0]
    mesh = Mesh(np.array([device]), ("one",), axis_types=(AxisType.Auto,))
    programs = compile_kernels.listed(mesh, args.op, args.match)
    if not programs:
        raise ValueError(f"no kernel for {device.device_kind} has a name with {args.match!r}")
    limit = roofline.measure("bfloat16")
    print(f"{device.device_kind}: {limit.bytes_per_s / 1e9:.0f} GB/s", file=sys.stderr)
    rows = (row for program in programs for row in measure(program, limit, args.repeats))
    return [{"device": device.device_kind, **row} for row in rows]


def measure(program, limit, repeats: int) -> Iterator[dict]:
    """A row for the program and each of its baselines."""
    from qwen_jax import roofline

    inputs = program.make(0)
    bound = limit.seconds(roofline.Work(program.moved, program.flops))
    for name, fn in {"kernel": program.fn, **program.baselines}.items():
        seconds = fastest(repeated(fn, repeats), inputs) / repeats
        share = f"{bound / seconds:.0%} of the limit"
        print(f"{program.name:>53} {name:>8} {seconds * 1e6:9.1f} us, {share}", flush=True)
        yield {"name": program.name, "what": name, "seconds": seconds, "bound": bound}


def repeated(fn, repeats: int):
    """One program of ``repeats`` calls of ``fn``, each after the one before."""
    import jax
    from jax import lax

    def run(*inputs):
        def again(_, out):
            # The inputs are the same; the compiler must not see that, nor do calls at once.
            same, _ = lax.optimization_barrier((inputs, out))
            return fn(*same)

        return lax.fori_loop(1, repeats, again, fn(*inputs))

    return jax.jit(run)


def fastest(run, inputs) -> float:
    """Seconds of the fastest of five runs."""
    import jax

    jax.block_until_ready(run(*inputs))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
