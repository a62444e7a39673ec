"""Compiles every kernel at the published models' real shapes for accelerators that are not here.

    python scripts/compile_kernels.py --device v6e --match 30B-A3B/ep8 --out compiled.jsonl
    python scripts/compile_kernels.py --out compiled.jsonl       all of them, but for those in there

Needs the extra "aot" (libtpu) for TPUs, "gpu" for h200. One process per device compiles one program
after another; a program that takes longer than --timeout is given up with its process, and said to
be. What a kernel does not take is listed with its reason. Ends with status 1 if any program failed.
The list is each operation's own: `pallas_kernels.<op>.cases`. For h200 each kernel's registers,
spills and shared memory are told (`pallas_kernels.gpu_report`), and its instructions if `nvdisasm`
is on the PATH; a TPU's memory that does not suffice is an error with the compiler's numbers.

--out gets a line of JSON for each program as it is done. What it holds already, of the same sources
and compiler, is not done again unless it failed.
"""

import argparse
import dataclasses
import hashlib
import importlib
import importlib.metadata
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
    results, before = [], 0
    for device in args.device or compilable():
        done = recorded(args.out, device)
        before += len(done)
        results += compile_for(device, args, done)
    failed = [r for r in results if "error" in r]
    for result in failed:
        print(f"failed: {result['device']} {result['name']}: {result['error']}")
    skipped = sum("refused" in r for r in results)
    compiled, seconds = len(results) - skipped - len(failed), sum(r["seconds"] for r in results)
    spill = sum(any(kernel["spilled"] for kernel in r.get("kernels", ())) for r in results)
    print(
        f"{compiled} compiled ({spill} spill registers), {skipped} skipped, {len(failed)} failed, "
        f"{seconds:.0f} s; {before} were done before"
    )
    return 1 if failed or not (results or before) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", choices=OPS, help="default: all")
    parser.add_argument("--device", action="append", choices=DEVICES, help="default: all")
    parser.add_argument("--match", default="", help="a regular expression found in the name")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one program")
    parser.add_argument("--out", type=pathlib.Path, help="file for the results")
    return parser.parse_args(argv)


def compilable() -> list[str]:
    """The devices whose compiler is installed."""
    tpu = importlib.util.find_spec("libtpu") is not None
    gpu = importlib.util.find_spec("jax_cuda13_plugin") is not None
    for missing, extra in ((not tpu, "aot"), (not gpu, "gpu")):
        if missing:
            print(f'nothing is compiled for want of the extra "{extra}"', file=sys.stderr)
    return [*(TOPOLOGIES if tpu else ()), *(("h200",) if gpu else ())]


def recorded(out: pathlib.Path | None, device: str) -> set[str]:
    """The programs of a device that a file of results has, as sources and compiler are now."""
    if out is None or not out.exists():
        return set()
    lines = map(json.loads, out.read_text().splitlines())
    now = {op: identity(device, op) for op in OPS}
    return {
        line["name"]
        for line in lines
        if line["device"] == device
        and "error" not in line
        and now[line["name"].split("/")[0]].items() <= line.items()
    }


def identity(device: str, op: str) -> dict[str, str]:
    """What decides how an operation compiles for a device: a digest of sources, the compiler."""
    import pallas_kernels

    root = pathlib.Path(pallas_kernels.__file__).parent
    # Without the other platform's, and without what chooses, reads reports or holds no code.
    others = ("gpu", "hopper", "warpgroup") if device in TOPOLOGIES else ("tpu",)
    others += ("registry", "program", "gpu_report", "tpu_schedule")
    digest = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *(root / op).glob("*.py"), root / f"tuned/{op}.json"]):
        if path.is_file() and not path.name.startswith(others):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    packages = ["jax", "libtpu" if device in TOPOLOGIES else "jax-cuda13-plugin"]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return {"source": digest.hexdigest()[:12], "compiler": ", ".join(versions)}


def compile_for(device: str, args: argparse.Namespace, done: set[str]) -> list[dict]:
    """Every program of one device that is not done, in a process that is replaced if it hangs."""
    context = multiprocessing.get_context("spawn")
    identities = {op: identity(device, op) for op in OPS}
    results: list[dict] = []

    def keep(result: dict) -> None:
        result = {"device": device, **result, **identities[result["name"].split("/")[0]]}
        print(f"{device} {result['name']}: {summary(result)}", flush=True)
        results.append(result)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")

    while True:
        ours, theirs = context.Pipe()
        names = done | {result["name"] for result in results}
        work = (theirs, device, args.op, args.match, names)
        process = context.Process(target=worker, args=work, daemon=True)
        process.start()
        theirs.close()
        pending, error = listen(ours, process, keep, args.timeout)
        if pending is None:
            return results
        keep({"name": pending, "seconds": args.timeout, "error": error})


def listen(ours, process, keep, timeout: float) -> tuple[str | None, str]:
    """Keeps results until the worker is done (then None), or the program it ends in, and how."""
    pending, error = "the first program", f"given up after {timeout:.0f} s"
    while ours.poll(timeout):
        try:
            kind, value = ours.recv()
        except EOFError:
            error = "the compiler's process died of it"
            break
        if kind == "error":
            error = value
            break
        pending = value if kind == "start" else None
        if kind == "done":
            break
        if kind == "result":
            keep(value)
    process.kill()
    process.join()
    return pending, error


def summary(result: dict) -> str:
    """What came of one program, in a line."""
    if "refused" in result:
        return f"skipped: {result['refused']}"
    seconds = f"{result['seconds']:.1f} s"
    if "error" in result:
        return f"{seconds}, {(result['error'].splitlines() or ['no reason given'])[0]}"
    kernels = [
        f"{k['kernel']}: {k['registers']} registers, {k['spilled']} B spilled, "
        f"{k['shared']} B shared" + (", products serialized" if k["serialized"] else "")
        for k in result["kernels"]
    ]
    return "; ".join([f"{seconds}, {result['temporary']:,} B temporary", *kernels])


def worker(pipe, device: str, ops: list[str] | None, match: str, done: set[str]) -> None:
    """Compiles what matches and is not done, and tells the pipe about each."""
    from pallas_kernels import gpu_report

    with tempfile.TemporaryDirectory() as dump:
        os.environ["MOSAIC_GPU_DUMP_TO"] = dump
        mesh = chip(device)
        for call in not_taken(mesh, ops, match):
            if call.name not in done:
                result = {"name": call.name, "seconds": 0.0, "refused": call.reason}
                pipe.send(("result", result))
        for program in listed(mesh, ops, match):
            if program.name in done:
                continue
            pipe.send(("start", program.name))
            started = time.perf_counter()
            try:
                memory = compiled(program, mesh).memory_analysis()
                reports = gpu_report.read(pathlib.Path(dump))
            except Exception as error:
                pipe.send(("error", f"{type(error).__name__}: {error}"))
                raise  # compilers raise what they like; the next program has a process of its own
            result = {
                "name": program.name,
                "seconds": round(time.perf_counter() - started, 2),
                "temporary": memory.temp_size_in_bytes,
                "kernels": [dataclasses.asdict(report) for report in reports],
            }
            pipe.send(("result", result))
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
    device = device_of(mesh)
    found = (program for cases in cases_of(ops) for program in cases.programs(device))
    return [program for program in found if re.search(match, program.name)]


def not_taken(mesh, ops: list[str] | None, match: str) -> list:
    """The calls that their kernel does not take, whose names match."""
    device = device_of(mesh)
    found = (call for cases in cases_of(ops) for call in cases.refused(device))
    return [call for call in found if re.search(match, call.name)]


def cases_of(ops: list[str] | None) -> list:
    """The modules that list the calls of some operations, or of all."""
    return [importlib.import_module(f"pallas_kernels.{op}.cases") for op in ops or OPS]


def device_of(mesh):
    """The device of a mesh of one, as kernels see it."""
    from pallas_kernels.device import Device

    return Device.of(mesh.devices.flat[0])


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
