"""A checkpoint -> arrays on their devices, whatever it is stored as.

Knows the table's shardings and who can read a slice; knows no file format. Every leaf is asked for
by slices: each process reads what its own devices hold, once, and a slice that several devices hold
is read once for all of them.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qwen_jax.runtime import Runtime
from qwen_jax.weights import derive, hf, manifest, orbax_io
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.location import (
    ARRAYS,
    Location,
    local_files,
    read_config,
    read_json,
    resolve,
)
from qwen_jax.weights.orbax_io import Reader
from qwen_jax.weights.params import Param, Weights, table
from qwen_jax.weights.progress import Meter, Progress
from qwen_jax.weights.quant import QArray
from qwen_jax.weights.requantize import quantize_leaf, requantized
from qwen_jax.weights.safetensors import Checkpoint
from qwen_jax.weights.storage import Directory

_FLOATS = ("float32", "float16", "bfloat16")
_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, ready to run.

    Attributes:
        config: what it is.
        params: its weights, on their devices.
        directory: local directory of tokenizer, template and the like; None for a preset.
        generation_config: the content of generation_config.json, empty where there is none.
    """

    config: ModelConfig
    params: Weights
    directory: pathlib.Path | None
    generation_config: dict[str, Any]


def load(
    path: str | os.PathLike[str] | Location,
    *,
    runtime: Runtime | None = None,
    load_format: str = "auto",
    quantization: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Loads a checkpoint, or makes random weights.

    Args:
        path: local Hugging Face or converted directory, hub id[@revision], gs:// directory of a
            converted checkpoint; with ``load_format="dummy"`` a preset's name, or a directory of
            which config.json is read; or what `resolve` returned.
        runtime: mesh, rules and dtype; default `Runtime.make()`.
        load_format: "auto" (what is there), "safetensors", "orbax" or "dummy".
        quantization: None keeps the weights as they are stored; "int8" and "fp8" requantise them.
        seed: of random weights.
        revision, cache_dir: of a hub id.
        overrides: keys of config.json to replace, e.g. ``{"num_hidden_layers": 2}``.
        progress: called with a `Transfer` after every leaf.

    Raises:
        FileNotFoundError: there is nothing of that name, or files are missing.
        ValueError: damaged files, weights that do not fit the configuration or the mesh, NaN.
    """
    runtime = runtime or Runtime.make()
    location = resolve(path, load_format=load_format, revision=revision, cache_dir=cache_dir)
    config = read_config(location, overrides)
    wanted = None if quantization is None else requantized(config, quantization)
    if location.form == "dummy":
        config = wanted or config
        params = derive.init(config, seed, runtime.dtype, runtime.mesh, runtime.rules)
    elif location.form == "safetensors":
        checkpoint = Checkpoint(location.local)
        config, sources = open_sources(config, checkpoint)
        shapes = _shapes(config, wanted, runtime.dtype)
        readers = _safetensors_readers(sources, checkpoint, shapes)
        params = _place(config, wanted, readers, shapes, runtime, progress)
    else:
        shapes = _shapes(config, wanted, runtime.dtype)
        readers = _orbax_readers(location.files, shapes)
        params = _place(config, wanted, readers, shapes, runtime, progress)
    files = local_files(location, cache_dir)
    generation = files and read_json(files, "generation_config.json")
    return Loaded(wanted or config, params, files, generation or {})


def _shapes(config: ModelConfig, wanted: ModelConfig | None, dtype: str) -> Weights:
    """What to read: the runtime's dtype, but all the bits of what is to be quantised."""

    def one(row: Param, shape):
        if wanted is None or derive.quantization(row, wanted) is None:
            return shape
        return jax.ShapeDtypeStruct(shape.shape, jnp.float32)

    return jax.tree.map(one, table(config), derive.abstract(config, dtype))


# ---- who reads -----------------------------------------------------------------------------------


def open_sources(config: ModelConfig, checkpoint: Checkpoint) -> tuple[ModelConfig, Weights]:
    """Assigns every tensor to a leaf, and completes the configuration by what only files say.

    Raises:
        ValueError: as `hf.assign`.
    """
    sources = hf.assign(config, checkpoint)
    quantised = [s for s in jax.tree.leaves(sources) if s.quant is not None]
    if not quantised or config.quantization is None:
        return config, sources
    dtypes = {hf.stored_dtype(s, checkpoint, hf.SCALE_SUFFIX).name for s in quantised}
    # Published files have bfloat16 everywhere; whatever is mixed or float16 fits into float32.
    scale_dtype = "bfloat16" if dtypes == {"bfloat16"} else "float32"
    quant = dataclasses.replace(config.quantization, scale_dtype=scale_dtype)
    return dataclasses.replace(config, quantization=quant), sources


def _safetensors_readers(sources: Weights, checkpoint: Checkpoint, shapes: Weights) -> Weights:
    """A `Reader` per array, on Hugging Face's files."""

    def reader(read: Callable[..., np.ndarray], source: hf.Source, dtype) -> Reader:
        return lambda indices: [read(source, checkpoint, dtype, index) for index in indices]

    def one(source: hf.Source, shape):
        if not isinstance(shape, QArray):
            return reader(hf.read_values, source, shape.dtype)
        values = reader(hf.read_values, source, shape.values.dtype)
        return QArray(values, reader(hf.read_scale, source, shape.scale.dtype), shape.blocks)

    return jax.tree.map(one, sources, shapes)


def _orbax_readers(directory: Directory, shapes: Weights) -> Weights:
    """A `Reader` per array, on a converted checkpoint whose files were held against its manifest.

    Raises:
        ValueError: the arrays are not those of the configuration, or files are not as written.
    """
    arrays, wanted = manifest.read(directory).arrays, orbax_io.names(shapes)
    problems = [f"{name}: missing" for name in wanted if name not in arrays]
    problems += [f"{name}: not of this model" for name in arrays if name not in wanted]
    for name in wanted.keys() & arrays.keys():
        stored, shape = arrays[name], wanted[name]
        dtype = jnp.dtype(shape.dtype).name
        dtypes = _FLOATS if dtype in _FLOATS else (dtype,)
        if stored.shape != shape.shape or stored.dtype not in dtypes:
            expected = f"{' or '.join(dtypes)}{list(shape.shape)}"
            problems.append(f"{name}: {stored.dtype}{list(stored.shape)}, expected {expected}")
    if problems:
        listed = "\n  ".join(problems[:_SHOWN])
        raise ValueError(
            f"{directory}: {len(problems):,} arrays do not fit the configuration (changed by "
            f"overrides?):\n  {listed}"
        )
    orbax_io.verify(directory / ARRAYS, arrays)
    readers = [
        orbax_io.reader(directory / ARRAYS, name, arrays[name], shape.dtype)
        for name, shape in wanted.items()
    ]
    return jax.tree.structure(shapes).unflatten(readers)


# ---- where to ------------------------------------------------------------------------------------


def _place(
    config: ModelConfig,
    wanted: ModelConfig | None,
    readers: Weights,
    shapes: Weights,
    runtime: Runtime,
    progress: Progress | None,
) -> Weights:
    """Reads every leaf onto its devices; quantises it there if ``wanted`` says so."""
    rows, tree = jax.tree.flatten(table(config))
    places = derive.shardings(config, runtime.mesh, runtime.rules)
    ends = places if wanted is None else derive.shardings(wanted, runtime.mesh, runtime.rules)
    total = sum(
        _local_bytes(x, p) for x, p in zip(*map(jax.tree.leaves, (shapes, places)), strict=True)
    )
    meter = Meter(total, progress)
    columns = (tree.flatten_up_to(x) for x in (readers, shapes, places, ends))
    leaves, before = [], []
    for row, read, shape, place, end in zip(rows, *columns, strict=True):
        leaf = jax.tree.map(_place_array, read, shape, place)
        if wanted is not None and (quant := derive.quantization(row, wanted)) is not None:
            leaf = quantize_leaf(leaf, row, quant, end)
        # The host may run one leaf ahead of its devices, and no further.
        jax.block_until_ready(before)
        before = leaf
        leaves.append(leaf)
        meter.add(sum(map(_local_bytes, jax.tree.leaves(shape), jax.tree.leaves(place))))
    return tree.unflatten(leaves)


def _place_array(read: Reader, shape: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.Array:
    """One array, of which each distinct slice is read once."""
    devices: dict[tuple, list] = {}
    slices = {}
    where = place.devices_indices_map(shape.shape)
    for device in sorted(place.addressable_devices, key=lambda device: device.id):
        key = tuple(s.indices(n) for s, n in zip(where[device], shape.shape, strict=True))
        devices.setdefault(key, []).append(device)
        slices[key] = tuple(slice(*bounds) for bounds in key)
    pieces = read(list(slices.values()))
    parts = [
        jax.device_put(piece, device)
        for piece, key in zip(pieces, slices, strict=True)
        for device in devices[key]
    ]
    return jax.make_array_from_single_device_arrays(shape.shape, place, parts)


def _local_bytes(shape: jax.ShapeDtypeStruct, place: NamedSharding) -> int:
    """Bytes of an array on the devices of this process."""
    shard = int(np.prod(place.shard_shape(shape.shape)))
    return shard * jnp.dtype(shape.dtype).itemsize * len(place.addressable_devices)
