"""Helpers of the checkpoint tests: runtimes, equal trees, conversions cut off and looked at."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny

from qwen_jax.runtime import Runtime
from qwen_jax.weights.checkpoint import convert
from qwen_jax.weights.safetensors import Checkpoint


def one_device(dtype: str = "float32") -> Runtime:
    """A runtime of one device; unlike `Runtime.make` it lets a CPU have bfloat16."""
    runtime = Runtime.make(dtype="float32", devices=jax.devices()[:1])
    return dataclasses.replace(runtime, dtype=dtype)


def same(one, other) -> bool:
    """Whether two trees are equal, bit for bit."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    arrays = ((np.asarray(x), np.asarray(y)) for x, y in pairs)
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in arrays
    )


def read_all(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a Hugging Face directory."""
    checkpoint = Checkpoint(directory)
    return {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names}


def rewrite(directory: pathlib.Path, change) -> pathlib.Path:
    """Writes the weights again with ``change(name, tensor)`` instead of each; None drops it."""
    changed = {name: change(name, x) for name, x in read_all(directory).items()}
    kept = {name: x for name, x in changed.items() if x is not None}
    tiny.save_safetensors(directory / "model.safetensors", kept)
    return directory


class Conversions:
    """Converted variants, each made once: (source, conversion)."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory):
        self._factory = tmp_path_factory
        self._found: dict[str, tuple[pathlib.Path, pathlib.Path]] = {}

    def __call__(self, variant: str) -> tuple[pathlib.Path, pathlib.Path]:
        if variant not in self._found:
            work = self._factory.mktemp(variant)
            source = tiny.write_text_model(work / "source", variant, dtype="bfloat16")
            self._found[variant] = source, convert(source, work / "out")
        return self._found[variant]


class Interrupted(Exception):
    """Raised by a progress callback."""


def interrupt(source: pathlib.Path, out: pathlib.Path, part: float = 0.5) -> None:
    """Converts until this part of the bytes is written."""

    def stop(transfer):
        if transfer.done >= part * transfer.total:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert(source, out, progress=stop)


def content(directory: pathlib.Path) -> dict[str, bytes]:
    """All files but the one in which orbax notes the time."""
    files = (x for x in directory.rglob("*") if x.is_file() and x.name != "_CHECKPOINT_METADATA")
    return {str(x.relative_to(directory)): x.read_bytes() for x in files}


def finished(partial: pathlib.Path) -> dict[pathlib.Path, int]:
    """The array files that the journal says are finished, and when they were written."""
    lines = [json.loads(x) for x in (partial / "journal.jsonl").read_text().splitlines()[1:]]
    names = [name for kind, _, arrays in lines if kind == "leaf" for name in arrays]
    files = [x for name in names for x in (partial / "params" / name).iterdir()]
    return {x.relative_to(partial): x.stat().st_mtime_ns for x in files}
