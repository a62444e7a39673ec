"""What kernels reach of their limits: measured on an accelerator, or by the compiler's schedule.

    python scripts/bench_kernels.py --match 30B-A3B/whole/ --out measured.json   on a TPU, an H200
    python scripts/bench_kernels.py --device v6e --match ep8/decode                      anywhere

On an accelerator: the time of a call, its share of the bandwidth (or matrix unit) limit measured in
the same run, and the times of the baselines (tokamax among them if it is installed). Calls follow
each other inside of one program, so no time of the host is in them, and a cache that is updated in
place goes from call to call; the chip's caches keep what fits into them from call to call, which is
more than all of a call's weights only in the smallest decode cases. What cannot run has its error
in its row, and the others run; the status is 1 if it was a kernel.
With --device, for a TPU that is not here (extra "aot"): the static schedule. ``bound`` is what must
move over the stated bandwidth, ``copies`` what the kernel copies, ``compute`` all bundles at the
chip's clock; ``call`` is the longer of both, and before and after it what cannot overlap: the
bundles outside of the loops and one innermost tile.
Latencies of copies and stalls are in no schedule; and a kernel of several walks, as attention to
rows of one token beside longer ones is, has loops of which it does not tell how often each runs:
such rows are left out, with the reason.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping

import compile_kernels


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    table = scheduled(args) if args.device else measured(args)
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"command": " ".join(sys.argv), "programs": table}, file, indent=1)
    return 1 if any("error" in row and row["what"] == "kernel" for row in table) else 0


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
            if "untold" in row:
                print(f"{program.name:>53} left out: {row['untold']}", flush=True)
                continue
            times = " ".join(f"{row[k] * 1e6:7.1f}" for k in ("bound", "copies", "compute", "call"))
            ratio = row["call"] / row["bound"]
            print(f"{program.name:>53} {times} {ratio:5.2f} {row['spills']}", flush=True)
    return table


def estimate(program, dump: pathlib.Path, kind: str) -> dict:
    """Times in seconds of one program, from the schedule in ``dump``, or why it tells none."""
    from pallas_kernels import tpu_schedule
    from pallas_kernels.device import tpu_info

    info = tpu_info(kind)
    schedule = tpu_schedule.read(dump, program.name.split("/")[0])
    untold = schedule.untold(program.trips)
    if untold is not None:
        return {"name": program.name, "untold": untold}
    clock, bandwidth = tpu_schedule.clock(info), info.mem_bw_bytes_per_second * info.num_cores
    rate = info.bf16_ops_per_second * info.num_cores
    copies, compute = program.copied / bandwidth, schedule.cycles(program.trips) / clock
    alone = schedule.total - sum(schedule.nest[:-1])
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
        row = {"name": program.name, "what": name, "bound": bound}
        try:
            row["seconds"] = fastest(fn, inputs, program.carried, repeats) / repeats
        except (RuntimeError, ValueError, NotImplementedError) as error:
            row["error"] = f"{type(error).__name__}: {error}"
            said = row["error"].splitlines()[0]
        else:
            said = f"{row['seconds'] * 1e6:9.1f} us, {bound / row['seconds']:.0%} of the limit"
        print(f"{program.name:>53} {name:>8} {said}", flush=True)
        yield row


def repeated(fn, carried: Mapping[int, str], repeats: int):
    """One program of ``repeats`` calls of ``fn``, each after the one before.

    Args:
        carried: as `Program` has it: the numbers of the arguments that each call updates in place
            for the next one, and which field of its result each becomes. They are donated.

    Returns:
        A jitted function of ``fn``'s arguments; it returns what the last call left of the carried
        ones, by their numbers, and the rest of its result.
    """
    import jax
    from jax import lax

    def call(kept, fixed):
        out = fn(*(kept[i] if i in carried else fixed[i] for i in range(len(kept) + len(fixed))))
        kept = {i: getattr(out, name) for i, name in carried.items()}
        # One value must not be in the loop twice, or it has two buffers and is copied.
        return kept, out.replace(**dict.fromkeys(carried.values())) if carried else out

    def run(*inputs):
        fixed = {i: x for i, x in enumerate(inputs) if i not in carried}

        def again(_, state):
            # Most inputs are the same; the compiler must not see that, nor do calls at once.
            same, (kept, _) = lax.optimization_barrier((fixed, state))
            return call(kept, same)

        return lax.fori_loop(1, repeats, again, call({i: inputs[i] for i in carried}, fixed))

    return jax.jit(run, donate_argnums=tuple(carried))


def fastest(fn, inputs, carried: Mapping[int, str], repeats: int) -> float:
    """Seconds of the fastest of five runs of ``repeats`` calls; leaves ``inputs`` as they are."""
    import jax
    import jax.numpy as jnp

    run = repeated(fn, carried, repeats)
    given = [jnp.copy(x) if i in carried else x for i, x in enumerate(inputs)]
    times = []
    for _ in range(6):  # the first one compiles
        start = time.perf_counter()
        kept, _ = jax.block_until_ready(run(*given))
        times.append(time.perf_counter() - start)
        for i, x in kept.items():
            given[i] = x
    return min(times[1:])


if __name__ == "__main__":
    sys.exit(main())
