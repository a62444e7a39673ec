"""How a conversion is cut: which pieces of which leaf are read, and which arrays they become.

Knows the table, sizes and dtypes; writes nothing. A leaf is cut along one letter: experts first, so
that expert parallelism reads whole files, else a letter that strategies shard; where the piece is
to be quantised, a letter that is not summed over, so that a piece holds whole output channels.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import dims as dims_lib
from qwen_jax.weights import derive, hf, orbax_io
from qwen_jax.weights.config import ModelConfig, QuantConfig
from qwen_jax.weights.load import open_sources
from qwen_jax.weights.orbax_io import Index
from qwen_jax.weights.params import Param, Weights
from qwen_jax.weights.quant import QArray
from qwen_jax.weights.requantize import quantize_leaf, requantized
from qwen_jax.weights.safetensors import Checkpoint

DTYPES = ("bfloat16", "float32")
_CUT = "ENKIFV"  # letters to cut along, the best first
_SHARE = 8  # a piece is at most this part of the largest leaf
_LARGEST, _SMALLEST = 64 << 20, 1 << 20  # bytes of a piece


@dataclasses.dataclass(frozen=True)
class ArrayPlan:
    """An array to write: its shape and dtype, and the shape of a chunk (a file)."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """A leaf to write.

    Attributes:
        name: its path in the tree of weights.
        source: where it comes from.
        quant: to quantise it, or None to store it as it is read.
        axis, step: it is read in pieces of ``step`` elements along ``axis``.
        arrays: array name -> what is written: one, or values and scale.
    """

    name: str
    source: hf.Source
    quant: QuantConfig | None
    axis: int
    step: int
    arrays: Mapping[str, ArrayPlan]

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(math.prod(x.shape) * _itemsize(x.dtype) for x in self.arrays.values())

    def pieces(
        self, checkpoint: Checkpoint
    ) -> Iterator[tuple[dict[str, Index], dict[str, np.ndarray]]]:
        """Reads the leaf piece by piece: per array, where the piece belongs and what it is.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        first, *others = self.arrays
        row, scales = self.source.row, []
        for start in range(0, row.shape[self.axis], self.step):
            index = [slice(0, n) for n in row.shape]
            index[self.axis] = slice(start, min(start + self.step, row.shape[self.axis]))
            where = tuple(index)
            if self.quant is None:
                dtype = np.dtype(self.arrays[first].dtype)
                values = hf.read_values(self.source, checkpoint, dtype, where)
            else:
                values, scale = _quantized(self.source, checkpoint, where, self.quant)
                scales.append(scale)
            yield {first: where}, {first: values}
        for name in others:
            dtype = np.dtype(self.arrays[name].dtype)
            scale = (
                np.concatenate(scales, self.axis)
                if scales
                else hf.read_scale(self.source, checkpoint, dtype)
            )
            yield {name: tuple(slice(0, n) for n in scale.shape)}, {name: scale}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion.

    Attributes:
        config: of the result.
        abstract: shapes and dtypes of the result.
        leaves: what is written, in the order of the table.
    """

    config: ModelConfig
    abstract: Weights
    leaves: tuple[LeafPlan, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def digest(self) -> str:
        """Changes with everything that decides what is written."""
        arrays = {
            name: dataclasses.asdict(x) for leaf in self.leaves for name, x in leaf.arrays.items()
        }
        text = json.dumps([repr(self.config), arrays], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_plan(
    config: ModelConfig, checkpoint: Checkpoint, dtype: str | None, quantization: str | None
) -> Plan:
    """Plans a conversion; arguments as in `convert`.

    Raises:
        ValueError: the weights do not fit the configuration, or an option is unknown.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use {' or '.join(DTYPES)}, or leave it out")
    config, sources = open_sources(config, checkpoint)
    target = requantized(config, quantization)
    if dtype is not None:
        target = dataclasses.replace(target, dtype=dtype)

    def stored(source: hf.Source, shape):
        if isinstance(shape, QArray):
            return shape
        keep = dtype or hf.stored_dtype(source, checkpoint)
        return jax.ShapeDtypeStruct(shape.shape, keep)

    abstract = jax.tree.map(stored, sources, derive.abstract(target))
    named = orbax_io.names(sources)
    shapes = jax.tree.structure(sources).flatten_up_to(abstract)
    sizes = [max(_bytes(x) for x in jax.tree.leaves(shape)) for shape in shapes]
    limit = min(max(max(sizes) // _SHARE, _SMALLEST), _LARGEST)
    leaves = tuple(
        _leaf_plan(name, source, shape, target, limit)
        for (name, source), shape in zip(named.items(), shapes, strict=True)
    )
    return Plan(target, abstract, leaves)


def _leaf_plan(name: str, source: hf.Source, shape, target: ModelConfig, limit: int) -> LeafPlan:
    row = source.row
    quant = derive.quantization(row, target) if source.quant is None else None
    axis = _axis(row, quant)
    values = shape.values if isinstance(shape, QArray) else shape
    # What is read counts, and that is float32 where it is to be quantised.
    read = jnp.dtype(values.dtype).itemsize if quant is None else 4
    length = row.shape[axis]
    step = _step(length, limit // (math.prod(row.shape) // length * read))
    chunk = tuple(step if i == axis else n for i, n in enumerate(row.shape))
    if not isinstance(shape, QArray):
        arrays = {name: _array(shape, chunk)}
    else:
        arrays = {
            f"{name}.values": _array(shape.values, chunk),
            f"{name}.scale": _array(shape.scale, shape.scale.shape),
        }
    return LeafPlan(name, source, quant, axis, step, arrays)


def _axis(row: Param, quant: QuantConfig | None) -> int:
    letters = dims_lib.parse(row.dims)
    free = [x for x in letters if quant is None or x not in row.over.split()]
    best = [x for x in _CUT if x in free] or free
    return letters.index(best[0])


def _step(length: int, most: int) -> int:
    """The largest divisor of ``length`` up to ``most``, unless it is less than half of that."""
    most = max(1, min(most, length))
    divisor = next(n for n in range(most, 0, -1) if length % n == 0)
    return divisor if 2 * divisor > most else most


def _quantized(
    source: hf.Source, checkpoint: Checkpoint, index: Index, quant: QuantConfig
) -> tuple[np.ndarray, np.ndarray]:
    # On the CPU, also where an accelerator is the default: a conversion needs no device.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        piece = jnp.asarray(hf.read_values(source, checkpoint, np.float32, index))
        found = quantize_leaf(piece, source.row, quant, None)
        return np.asarray(found.values), np.asarray(found.scale)


def _array(shape: jax.ShapeDtypeStruct | jax.Array, chunk: tuple[int, ...]) -> ArrayPlan:
    return ArrayPlan(tuple(shape.shape), jnp.dtype(shape.dtype).name, tuple(chunk))


def _bytes(shape: jax.ShapeDtypeStruct) -> int:
    return math.prod(shape.shape) * _itemsize(shape.dtype)


def _itemsize(dtype) -> int:
    return jnp.dtype(dtype).itemsize
