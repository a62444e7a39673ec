"""Measures tile sizes on the accelerator that is here, and keeps the fastest for its kind.

    python scripts/tune_kernels.py --match 30B-A3B/ep8/decode
    python scripts/tune_kernels.py --op ragged_dot --out measured      to look at first

Every candidate of a kernel's own list is timed at the published models' real shapes: the median of
--repeats calls. Programs that look their sizes up by the same key are taken together: the candidate
with the least sum of medians wins. The entries go to `pallas_kernels/tuned/<op>.json`, which stands
before every kernel's rule, with the times, the device, the date and this command. A candidate that
the compiler refuses is told, and is out for its key.
"""

import argparse
import datetime
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import compile_kernels

import pallas_kernels
from pallas_kernels import tuning
from pallas_kernels.device import Device
from pallas_kernels.program import Program

# Seconds of a program's call with one function, or why it cannot run.
Timer = Callable[[Program, Callable[..., Any]], float | str]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    device = jax.devices()[0]
    if device.platform == "cpu":
        print("there is no accelerator here: tile sizes are measured where they run")
        return 1
    mesh = Mesh(np.array([device]), ("one",), axis_types=(AxisType.Auto,))
    programs = compile_kernels.listed(mesh, args.op, args.match)
    tune(programs, Device.of(device), Stopwatch(args.repeats), pathlib.Path(args.out))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ops = compile_kernels.OPS
    parser.add_argument("--op", action="append", choices=ops, help="default: all that have sizes")
    parser.add_argument("--match", default="", help="a regular expression found in the name")
    parser.add_argument("--repeats", type=int, default=20, help="calls that one median is of")
    tuned = pathlib.Path(pallas_kernels.__file__).parent / "tuned"
    parser.add_argument("--out", default=tuned, help="directory of the tables")
    return parser.parse_args(argv)


def tune(
    programs: Iterable[Program], device: Device, timer: Timer, directory: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """Measures, prints and stores the best tiles of every key; returns op -> key -> entry."""
    keys: dict[tuple[str, str], list[Program]] = {}
    for program in programs:
        if program.tunable is not None:
            op = program.name.split("/")[0]
            keys.setdefault((op, program.tunable.key), []).append(program)
    found: dict[str, dict[str, Any]] = {}
    for (op, key), sharing in keys.items():
        entry = best(sharing, timer)
        if entry is None:
            print(f"{op} {key}: no candidate runs", flush=True)
            continue
        now = datetime.datetime.now(datetime.UTC).date().isoformat()
        command = shlex.join(["python", *sys.argv])
        entry["measured"] |= {"device": device.kind, "date": now, "command": command}
        found.setdefault(op, {})[key] = entry
        tuning.store(directory, op, device.kind, {key: entry})
        us, rule = entry["measured"]["us"], entry["measured"]["rule_us"]
        print(f"{op} {key}: {entry['tiles']} {us:.1f} us, the rule {rule} us", flush=True)
    return found


def best(sharing: list[Program], timer: Timer) -> dict[str, Any] | None:
    """The entry of one key, or None if no candidate runs; times are sums over its programs."""
    first = sharing[0].tunable
    assert first is not None
    sums = []
    for tiles in first.tiles:
        seconds = 0.0
        for program in sharing:
            assert program.tunable is not None
            took = timer(program, program.tunable.with_tiles(tiles))
            if isinstance(took, str):
                print(f"{program.name} {dict(tiles)}: {took}", flush=True)
                seconds = float("inf")
                break
            seconds += took
        sums.append(seconds)
    least = min(sums)
    if least == float("inf"):
        return None
    rule = None if sums[0] == float("inf") else round(sums[0] * 1e6, 2)
    measured = {
        "us": round(least * 1e6, 2),
        "rule_us": rule,
        "programs": [program.name for program in sharing],
        "candidates": len(sums),
    }
    return {"tiles": dict(first.tiles[sums.index(least)]), "measured": measured}


class Stopwatch:
    """The median time of a call on the device that is here; keeps one program's inputs."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        self._inputs: tuple[str, Any] = ("", ())

    def __call__(self, program: Program, fn: Callable[..., Any]) -> float | str:
        import jax

        if self._inputs[0] != program.name:
            self._inputs = ("", ())  # frees the old ones first
            self._inputs = (program.name, program.make(0))
        compiled = jax.jit(fn)
        try:
            jax.block_until_ready(compiled(*self._inputs[1]))
        except jax.errors.JaxRuntimeError as error:
            return str(error).splitlines()[0]
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*self._inputs[1]))
            times.append(time.perf_counter() - start)
        return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
