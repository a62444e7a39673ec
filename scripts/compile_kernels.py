"""Compiles every kernel at the published models' real shapes for accelerators that are not here.

    python scripts/compile_kernels.py --device v6e --match 30B-A3B/ep8 --out compiled.json

Needs the extra "aot" (libtpu) for TPUs, "gpu" for h200. One process per device compiles one program
after another; a program that takes longer than --timeout is given up with its process, and said to
be. Ends with status 1 if any program failed. The list is each operation's own:
`pallas_kernels.<op>.cases`. For h200 each kernel's registers, spills and shared memory are told
(`pallas_kernels.gpu_report`), and its instructions if `nvdisasm` is on the PATH.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
import time

OPS = ("ragged_dot", "paged_attention", "segment_attention")
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
DEVICES = (*TOPOLOGIES, "h200")
# What libtpu asks for before it believes that no TPU is here.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ.update(ENVIRONMENT)
    results = []
    for device in args.device or compilable():
        results += compile_for(device, args)
    failed = [r for r in results if "error" in r]
    seconds = sum(r["seconds"] for r in results)
    print(f"{len(results)} programs, {seconds:.0f} s, {len(failed)} failed")
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"command": " ".join(sys.argv), "programs": results}, file, indent=1)
    return 1 if failed or not results else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", choices=OPS, help="default: all")
    parser.add_argument("--device", action="append", choices=DEVICES, help="default: all")
    parser.add_argument("--match", default="", help="a regular expression found in the name")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one program")
    parser.add_argument("--out", help="JSON file for the results")
    return parser.parse_args(argv)


def compilable() -> list[str]:
    """The devices whose compiler is installed."""
    tpu = importlib.util.find_spec("libtpu") is not None
    gpu = importlib.util.find_spec("jax_cuda13_plugin") is not None
    for missing, extra in ((not tpu, "aot"), (not gpu, "gpu")):
        if missing:
            print(f'nothing is compiled for want of the extra "{extra}"', file=sys.stderr)
    return [*(TOPOLOGIES if tpu else ()), *(("h200",) if gpu else ())]


def compile_for(device: str, args: argparse.Namespace) -> list[dict]:
    """Every program of one device, in a process that is replaced when it hangs."""
    context = multiprocessing.get_context("spawn")
    results, skip = [], 0
    while True:
        ours, theirs = context.Pipe()
        work = (theirs, device, args.op, args.match, skip)
        process = context.Process(target=worker, args=work, daemon=True)
        process.start()
        theirs.close()
        found, pending, error = listen(ours, process, device, args.timeout)
        results += found
        if pending is None:
            return results
        results.append({"device": device, "name": pending, "seconds": 0.0, "error": error})
        print(f"{device} {pending}: {error}", flush=True)
        skip = len(results)


def listen(ours, process, device: str, timeout: float) -> tuple[list[dict], str | None, str]:
    """Results until the worker is done (then None), or the program it ends in, and how."""
    results, pending, error = [], None, f"given up after {timeout:.0f} s"
    while ours.poll(timeout):
        try:
            kind, value = ours.recv()
        except EOFError:
            error = "the compiler's process died of it"
            break
        if kind == "start":
            pending = value
            continue
        pending = None
        if kind == "done":
            break
        results.append(value)
        print(f"{device} {value['name']}: {value['seconds']:.1f} s, {summary(value)}", flush=True)
    process.kill()
    process.join()
    return results, pending, error


def summary(result: dict) -> str:
    """What came of one program, in a line."""
    if "error" in result:
        return (result["error"].splitlines() or ["no reason given"])[0]
    kernels = [
        f"{k['kernel']}: {k['registers']} registers, {k['spilled']} B spilled, "
        f"{k['shared']} B shared" + (", products serialized" if k["serialized"] else "")
        for k in result["kernels"]
    ]
    return "; ".join([f"{result['temporary']:,} B temporary", *kernels])


def worker(pipe, device: str, ops: list[str] | None, match: str, skip: int) -> None:
    """Compiles what matches, but for the first ``skip``, and tells the pipe about each."""
    from pallas_kernels import gpu_report

    with tempfile.TemporaryDirectory() as dump:
        os.environ["MOSAIC_GPU_DUMP_TO"] = dump
        mesh = chip(device)
        for program in listed(mesh, ops, match)[skip:]:
            pipe.send(("start", program.name))
            started = time.perf_counter()
            result = {"device": device, "name": program.name}
            try:
                memory = compiled(program, mesh).memory_analysis()
                result["temporary"] = memory.temp_size_in_bytes
                reports = gpu_report.read(pathlib.Path(dump))
                result["kernels"] = [dataclasses.asdict(report) for report in reports]
            except (RuntimeError, ValueError, NotImplementedError) as error:
                result["error"] = f"{type(error).__name__}: {error}"
            pipe.send(("result", {**result, "seconds": time.perf_counter() - started}))
            for old in pathlib.Path(dump).iterdir():
                old.unlink()
    pipe.send(("done", None))


def chip(device: str):
    """A mesh of one device of a topology that is not here."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    from pallas_kernels import hopper

    if device == "h200":
        topology = hopper.h200()
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[device])
    return Mesh(np.array(topology.devices[:1]), ("one",), axis_types=(AxisType.Auto,))


def listed(mesh, ops: list[str] | None, match: str) -> list:
    """The programs of some operations, or of all, whose names match."""
    from pallas_kernels.device import Device

    device = Device.of(mesh.devices.flat[0])
    found = []
    for op in ops or OPS:
        module = importlib.import_module(f"pallas_kernels.{op}.cases")
        found += [p for p in module.programs(device) if re.search(match, p.name)]
    return found


def compiled(program, mesh):
    """The executable of a program for the mesh's device."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    place = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), program.args
    )
    with jax.set_mesh(mesh):
        fn = jax.jit(program.fn, donate_argnums=tuple(program.carried))
        return fn.lower(*args).compile()


if __name__ == "__main__":
    sys.exit(main())
