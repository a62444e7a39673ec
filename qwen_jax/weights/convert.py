"""Converts a Hugging Face checkpoint to a directory that serves alone, in pieces.

Knows what must be written and in which order; `orbax_io.py` knows how. Everything happens in
``OUT.partial``; each finished leaf is noted in a journal, so a conversion that was killed goes on
where it was; the manifest is written last, and the directory gets its name after that. So whatever
has the name is complete.

    OUT/params/          the orbax checkpoint
    OUT/manifest.json    configuration, files, source
    OUT/tokenizer.json … copies of what stood beside the weights

Memory: two pieces of an eighth of the largest leaf, at most 64 MiB, are on their way at a time.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

from qwen_jax.weights import manifest, orbax_io
from qwen_jax.weights.copying import NotFiniteError
from qwen_jax.weights.journal import Journal
from qwen_jax.weights.location import (
    ARRAYS,
    JOURNAL,
    PARTIAL_SUFFIX,
    SIDE_FILES,
    Location,
    read_config,
    resolve,
)
from qwen_jax.weights.manifest import ArrayFiles, Manifest
from qwen_jax.weights.pieces import LeafPlan, Plan, make_plan
from qwen_jax.weights.progress import Meter, Progress
from qwen_jax.weights.safetensors import Checkpoint

_AT_ONCE = 2  # leaves: while one is written, the next is read
_HASHED = 1 << 22  # bytes of a source file in memory while it is hashed
_SPARE = 64 << 20  # bytes left free on the disk


def convert(
    path: str | os.PathLike[str] | Location,
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Converts safetensors to an orbax checkpoint; started again after a kill, it goes on.

    Args:
        path: local Hugging Face directory, or hub id[@revision].
        out: the directory to make.
        dtype: "bfloat16" or "float32" for unquantised weights; None keeps each file's own.
        quantization: None keeps the weights as they are; "int8" and "fp8" requantise them.
        revision, cache_dir: of a hub id.
        progress: called with a `Transfer` after every leaf.

    Returns:
        ``out``.

    Raises:
        FileExistsError: ``out`` exists, or its beginning is of another conversion or in use.
        FileNotFoundError: there is nothing at ``path``, or files are missing.
        OSError: the disk is full; what is finished stays for the next run.
        ValueError: damaged files, weights that do not fit config.json, NaN; nothing is left.
    """
    location = resolve(path, load_format="auto", revision=revision, cache_dir=cache_dir)
    if location.form != "safetensors":
        raise ValueError(f"{location.given} is converted already: start from safetensors")
    checkpoint = Checkpoint(location.local)
    plan = make_plan(read_config(location), checkpoint, dtype, quantization)
    out = _check_output(pathlib.Path(out).expanduser())
    partial = out.with_name(out.name + PARTIAL_SUFFIX)
    try:
        with _exclusive(partial):
            _convert(location, checkpoint, plan, partial, progress)
            os.replace(partial, out)
    except NotFiniteError:
        shutil.rmtree(partial)
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: {plan.nbytes / 1e9:.1f} GB are needed in all; what is finished "
            f"stays in {partial}: make room and run the same conversion again, or delete it",
        ) from error
    (out / JOURNAL).unlink()
    _sync(out)
    _sync(out.parent)
    return out


def _check_output(out: pathlib.Path) -> pathlib.Path:
    if str(out).startswith("gs:"):
        raise ValueError(f"{out}: convert to a local directory, then copy it to the bucket")
    if out.exists():
        finished = (out / manifest.NAME).exists()
        what = "a finished conversion" if finished else "something else"
        raise FileExistsError(f"{out} exists and is {what}: delete it, or choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


@contextlib.contextmanager
def _exclusive(partial: pathlib.Path) -> Iterator[None]:
    """Two conversions must not write the same directory."""
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{partial}: another conversion is writing it") from None
        yield
    finally:
        os.close(handle)


def _convert(
    location: Location,
    checkpoint: Checkpoint,
    plan: Plan,
    partial: pathlib.Path,
    progress: Progress | None,
) -> None:
    """Fills ``partial``, or what of it is not filled yet."""
    sources = [file.path for file in checkpoint.files]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    journal = Journal(partial / JOURNAL, {"files": stats, "plan": plan.digest})
    stop = threading.Event()
    with (
        contextlib.closing(journal),
        ThreadPoolExecutor(1) as hashing,
        _stopping(stop),
    ):
        hashes = hashing.submit(_hash_files, sources, journal, stop)
        orbax_io.create(partial / ARRAYS, plan.abstract)
        arrays = _write_leaves(plan, checkpoint, partial / ARRAYS, journal, stop, progress)
        for name in SIDE_FILES:
            if (location.local / name).exists():
                shutil.copyfile(location.local / name, partial / name)
                _sync(partial / name)
        source = {"path": location.given, "files": hashes.result()}
        _write_manifest(partial, Manifest(plan.config, arrays, source, manifest.versions()))


@contextlib.contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Tells the threads to end when this one does, in whatever way."""
    try:
        yield
    finally:
        stop.set()


def _write_leaves(
    plan: Plan,
    checkpoint: Checkpoint,
    directory: pathlib.Path,
    journal: Journal,
    stop: threading.Event,
    progress: Progress | None,
) -> dict[str, ArrayFiles]:
    """Writes every leaf that the journal does not name as finished."""
    arrays: dict[str, ArrayFiles] = {}
    todo = []
    for leaf in plan.leaves:
        done = journal.get("leaf", leaf.name)
        found = {name: ArrayFiles.from_json(x, leaf.name) for name, x in (done or {}).items()}
        if found and all(orbax_io.is_there(directory, *item) for item in found.items()):
            arrays |= found
        else:
            todo.append(leaf)
    left = sum(leaf.nbytes for leaf in todo)
    free = shutil.disk_usage(directory).free
    if left + _SPARE > free:
        raise OSError(
            errno.ENOSPC, f"No space left: {left:,} bytes to write, {free:,} free", str(directory)
        )
    meter = Meter(plan.nbytes, progress, skipped=plan.nbytes - left)
    meter.add(0)

    def write(leaf: LeafPlan) -> dict[str, ArrayFiles]:
        return _write_leaf(leaf, checkpoint, directory, stop)

    with ThreadPoolExecutor(_AT_ONCE) as pool, _stopping(stop):
        running: dict[Future, LeafPlan] = {pool.submit(write, leaf): leaf for leaf in todo}
        for future in as_completed(running):
            leaf, written = running[future], future.result()
            journal.add("leaf", leaf.name, {name: x.to_json() for name, x in written.items()})
            arrays |= written
            meter.add(leaf.nbytes)
    order = [name for leaf in plan.leaves for name in leaf.arrays]
    return {name: arrays[name] for name in order}


def _write_leaf(
    leaf: LeafPlan, checkpoint: Checkpoint, directory: pathlib.Path, stop: threading.Event
) -> dict[str, ArrayFiles]:
    """Writes the one array of a leaf, or the two of a quantised one."""
    _go_on(leaf, stop)
    writers = {
        name: orbax_io.ArrayWriter(directory, name, x.shape, x.dtype, x.chunk)
        for name, x in leaf.arrays.items()
    }
    for index, pieces in leaf.pieces(checkpoint):
        _go_on(leaf, stop)
        for name, piece in pieces.items():
            writers[name].write(index[name], piece)
    return {name: writer.finish() for name, writer in writers.items()}


def _go_on(leaf: LeafPlan, stop: threading.Event) -> None:
    if stop.is_set():
        raise InterruptedError(f"{leaf.name}: stopped, because the conversion failed elsewhere")


def _hash_files(
    paths: list[pathlib.Path], journal: Journal, stop: threading.Event
) -> list[dict[str, str | int]]:
    """Name, bytes and SHA-256 of the source files, beside the conversion."""
    found = []
    for path in paths:
        known = journal.get("file", path.name) or _hash_file(path, stop)
        if known is None:
            return []
        if journal.get("file", path.name) is None:
            journal.add("file", path.name, known)
        found.append({"name": path.name, "bytes": path.stat().st_size, "sha256": known})
    return found


def _hash_file(path: pathlib.Path, stop: threading.Event) -> str | None:
    digest, buffer = hashlib.sha256(), bytearray(_HASHED)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stop.is_set():
                return None
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _write_manifest(directory: pathlib.Path, what: Manifest) -> None:
    path = directory / manifest.NAME
    fresh = path.with_suffix(".tmp")
    fresh.write_text(what.text())
    _sync(fresh)
    os.replace(fresh, path)
    _sync(directory)


def _sync(path: pathlib.Path) -> None:
    """Brings a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
