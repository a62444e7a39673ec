"""Hugging Face tensors -> our arrays, by the table.

Knows rows, tensor names and layouts; knows no mesh, no JAX array and no orbax. First `assign` holds
the table against a checkpoint's names, shapes and dtypes, and reports everything that does not fit
in one error; then `read_values` and `read_scale` fill one leaf, or any slice of it, straight from
the memory-mapped files.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import dims as dims_lib
from qwen_jax.weights import copying, derive
from qwen_jax.weights.config import ModelConfig, QuantConfig
from qwen_jax.weights.params import Param, Weights, table
from qwen_jax.weights.quant import FORMATS, scale_shape
from qwen_jax.weights.safetensors import Checkpoint

GATE_UP = ("gate", "up")
SCALE_SUFFIX = "_scale_inv"
_FLOATS = ("float32", "float16", "bfloat16")
_COMPARED = 1 << 22  # bytes of a head and an embedding compared in one piece
_SHOWN = 12  # problems of each kind listed in an error


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one leaf comes from.

    Attributes:
        row: its row of the table.
        name, layout: the form found on disk, with ``{E}``/``{P}`` where tensors are stacked.
        quant: how it is quantised, or None.
    """

    row: Param
    name: str
    layout: str
    quant: QuantConfig | None

    @property
    def stacked(self) -> tuple[str, ...]:
        """The letters of our array that are separate tensors on disk."""
        return tuple(x for x in "EP" if f"{{{x}}}" in self.name)

    @property
    def scale_sizes(self) -> dict[str, int]:
        """Letter -> scales along it. Only of a quantised leaf."""
        assert self.quant is not None
        counts = scale_shape(self.row.shape, derive.blocks(self.row, self.quant))
        return dict(zip(dims_lib.parse(self.row.dims), counts, strict=True))

    def tensor(self, chosen: Mapping[str, int]) -> str:
        """The tensor's name for one choice of the stacked letters."""
        return self.name.format(E=chosen.get("E", 0), P=GATE_UP[chosen.get("P", 0)])

    def tensors(self) -> Iterator[str]:
        """Every tensor this leaf reads, scales included."""
        for combination in itertools.product(*(range(self.row.size[x]) for x in self.stacked)):
            name = self.tensor(dict(zip(self.stacked, combination, strict=True)))
            yield name
            if self.quant is not None:
                yield name + SCALE_SUFFIX


# ---- does the table fit the files ----------------------------------------------------------------


def assign(config: ModelConfig, checkpoint: Checkpoint) -> Weights:
    """The tree of `Source`s of a checkpoint: each tensor read exactly once, each leaf filled.

    Raises:
        ValueError: tensors missing, left over, or of an unexpected shape or dtype: all of them in
            one message.
    """
    names, used = set(checkpoint.names), set()
    missing: list[str] = []
    wrong: list[str] = []

    def one(row: Param) -> Source:
        source = _choose(row, derive.quantization(row, config), checkpoint, wrong)
        if source.quant is not None and any(x is None for x in _scale_indices(source)):
            wrong.append(f"{source.name}: blocks of {source.quant.block} cut through gate and up")
        for name in source.tensors():
            if name not in names:
                missing.append(name)
                continue
            used.add(name)
            wrong.extend(_mismatch(source, name, checkpoint))
        return source

    sources = jax.tree.map(one, table(config))
    extra = names - used
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        wrong.extend(_untied(sources.embed, checkpoint))
    if missing or wrong or extra:
        raise ValueError(_report(checkpoint, missing, sorted(extra), wrong))
    return sources


def _choose(row: Param, quant, checkpoint: Checkpoint, wrong: list[str]) -> Source:
    """The form of ``row`` whose tensors are there; shapes decide between forms of one name."""
    forms = [Source(row, name, layout, quant) for name, layout in row.forms]
    there = [form for form in forms if form.tensor({}) in checkpoint]
    if len(there) < 2:
        return there[0] if there else forms[0]
    fits = [
        form
        for form in there
        if dims_lib.shape(form.layout, row.size) == checkpoint.info(form.tensor({})).shape
    ]
    if len(fits) == 1:
        return fits[0]
    found = checkpoint.info(there[0].tensor({})).shape
    layouts = ", ".join(f"{f.layout!r} {dims_lib.shape(f.layout, row.size)}" for f in there)
    wrong.append(
        f"{there[0].name}: shape {found} fits {len(fits)} of the layouts {layouts}; it must fit one"
    )
    return (fits or there)[0]


def _mismatch(source: Source, name: str, checkpoint: Checkpoint) -> Iterator[str]:
    info = checkpoint.info(name)
    shape, kinds = dims_lib.shape(source.layout, source.row.size), _FLOATS
    if source.quant is not None and name.endswith(SCALE_SUFFIX):
        blocks = _disk_blocks(source)
        shape = tuple(math.ceil(n / b) for n, b in zip(shape, blocks, strict=True))
    elif source.quant is not None:
        kinds = (jnp.dtype(FORMATS[source.quant.form][0]).name,)
    if tuple(info.shape) != shape or info.dtype.name not in kinds:
        expected = f"{' or '.join(kinds)}{list(shape)}"
        yield f"{name}: {info.dtype.name}{list(info.shape)}, expected {expected}"


def _untied(embed: Source, checkpoint: Checkpoint) -> Iterator[str]:
    """A tied checkpoint may ship its head (Qwen3-0.6B does); it must be the embedding."""
    if embed.name not in checkpoint:
        return
    one, other = checkpoint.tensor("lm_head.weight"), checkpoint.tensor(embed.name)
    same = one.shape == other.shape and one.dtype == other.dtype
    if same:
        x, y = (w.reshape(-1).view(np.uint8) for w in (one, other))
        starts = range(0, x.size, _COMPARED)
        same = all(np.array_equal(x[i : i + _COMPARED], y[i : i + _COMPARED]) for i in starts)
    copying.forget(one)
    copying.forget(other)
    if not same:
        yield (
            f"lm_head.weight: differs from {embed.name}, but config.json says tie_word_embeddings: "
            "set it to false to use both, or remove lm_head.weight"
        )


def _report(checkpoint: Checkpoint, missing, extra, wrong) -> str:
    def part(title: str, items: Sequence[str]) -> str:
        shown = "".join(f"\n    {x}" for x in items[:_SHOWN])
        more = f"\n    … and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
        return f"\n  {title} ({len(items):,}):{shown}{more}" if items else ""

    return (
        f"{checkpoint.directory}: the weights do not fit config.json"
        + part("missing tensors", missing)
        + part("tensors nobody asked for", extra)
        + part("tensors that are not as expected", wrong)
        + "\n  Is config.json of this model, and is the download complete?"
    )


# ---- reading -------------------------------------------------------------------------------------


def stored_dtype(source: Source, checkpoint: Checkpoint, suffix: str = "") -> np.dtype:
    """The narrowest dtype that holds every tensor of a leaf (or every scale) exactly."""
    names = (n for n in source.tensors() if n.endswith(SCALE_SUFFIX) == bool(suffix))
    found = {checkpoint.info(name).dtype for name in names}
    return np.dtype(functools.reduce(jnp.promote_types, sorted(found, key=str)))


def read_values(source: Source, checkpoint: Checkpoint, dtype, index=None) -> np.ndarray:
    """One leaf, or a slice of it: the weight itself, or the values of a quantised one.

    Args:
        source: from `assign`.
        checkpoint: the files.
        dtype: of the result; rounded once where the file's is wider.
        index: one slice (of step 1) per letter of ``source.row.dims``; default all of it.

    Returns:
        An array in ``source.row.dims``.

    Raises:
        ValueError: a value is NaN or infinite; the message names the tensor.
    """
    return _gather(source, checkpoint, source.row.size, np.dtype(dtype), index, "")


def read_scale(source: Source, checkpoint: Checkpoint, dtype, index=None) -> np.ndarray:
    """The scales of a quantised leaf, or a slice of them; arguments as in `read_values`.

    Args:
        index: one slice per letter, counted in scales.
    """
    return _gather(source, checkpoint, source.scale_sizes, np.dtype(dtype), index, SCALE_SUFFIX)


def _gather(
    source: Source, checkpoint: Checkpoint, size: dims_lib.Sizes, dtype, index, suffix: str
) -> np.ndarray:
    """Stacks the tensors of a leaf, reading only what ``index`` asks for."""
    letters = dims_lib.parse(source.row.dims)
    slices = index or (slice(None),) * len(letters)
    window = {x: range(*s.indices(size[x])) for x, s in zip(letters, slices, strict=True)}
    inner = [x for x in letters if x not in source.stacked]
    out = copying.empty([len(window[x]) for x in letters], dtype)
    jobs, mapped = [], []
    for combination in itertools.product(*(window[x] for x in source.stacked)):
        chosen = dict(zip(source.stacked, combination, strict=True))
        name = source.tensor(chosen) + suffix
        tensor = checkpoint.tensor(name)
        mapped.append(tensor)
        if suffix:
            tensor = _per_letter(tensor, source)
        view = dims_lib.rearrange(tensor, source.layout, " ".join(inner), size)
        view = view[tuple(slice(window[x].start, window[x].stop) for x in inner)]
        place = tuple(chosen[x] - window[x].start if x in chosen else slice(None) for x in letters)
        jobs.append((name, out[place], view))
    copying.copy_all(jobs)
    for tensor in mapped:
        copying.forget(tensor)
    return out


def _per_letter(scale: np.ndarray, source: Source) -> np.ndarray:
    """Scales of blocks on disk -> scales of our blocks, which never cross a letter."""
    for axis, index in enumerate(_scale_indices(source)):
        assert index is not None  # `assign` refused the others
        scale = np.take(scale, index, axis)
    return scale


def _disk_blocks(source: Source) -> list[int]:
    """Elements per scale along each axis of a tensor on disk."""
    assert source.quant is not None
    assert source.quant.block is not None
    out_block, in_block = source.quant.block
    over = source.row.over.split()
    return [
        1 if axis == ("E",) else in_block if axis[-1] in over else out_block
        for axis in dims_lib.groups(source.layout)
    ]


def _scale_indices(source: Source) -> Iterator[np.ndarray | None]:
    """Per axis on disk: which of its scales each of our blocks has; None: not a single one.

    A fused axis is cut into our blocks letter by letter: 128 rows of "(N H)" may be a head, two
    heads, or, where blocks end inside heads, each row a block of its own.
    """
    assert source.quant is not None
    ours = dict(
        zip(dims_lib.parse(source.row.dims), derive.blocks(source.row, source.quant), strict=True)
    )
    for axis, disk_block in zip(dims_lib.groups(source.layout), _disk_blocks(source), strict=True):
        first, last = np.zeros(1, int), np.zeros(1, int)
        for letter in axis:
            size = source.row.size[letter]
            starts = np.arange(0, size, ours[letter])
            ends = np.minimum(starts + ours[letter], size) - 1
            first = (first[:, None] * size + starts).reshape(-1)
            last = (last[:, None] * size + ends).reshape(-1)
        index = first // disk_block
        yield index if np.array_equal(index, last // disk_block) else None
