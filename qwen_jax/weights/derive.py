"""What follows from the table: what is quantised, shapes, shardings, random weights, counts.

Knows rows, meshes and quantisation; knows no file and no forward pass. Every function here maps one
function over the leaves of `params.table(config)`.
"""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax import dims as dims_lib
from qwen_jax import sharding as sharding_lib
from qwen_jax.sharding import Rules
from qwen_jax.weights.config import ModelConfig, QuantConfig
from qwen_jax.weights.params import Param, Weights, table
from qwen_jax.weights.quant import FORMATS, QArray, scale_shape

# What requantising leaves alone: the router decides, and the head's rounding shows in every logit.
KEPT_EXACT = ("lm_head", "mlp.gate", "visual")
# Randoms drawn together: float32 and threefry's own arrays, on a CPU in its cache. Measured there:
# an expert stack 117 M/s, 49 M/s with 2**22 at once.
_DRAWN_AT_ONCE = 1 << 19


def quantization(row: Param, config: ModelConfig) -> QuantConfig | None:
    """How this row is stored by a checkpoint of ``config``; None: unquantised.

    The first tensor of a stack decides for all of them (loading then checks each one's dtype).
    """
    quant, tensor = config.quantization, row.name.format(E=0, P="gate")
    return None if quant is None or not row.linear or quant.skips(tensor) else quant


def blocks(row: Param, quant: QuantConfig) -> tuple[int, ...]:
    """Elements per scale along each letter of ``row.dims``.

    A block of 128 along the fused axis "(N H)" is one head of 128, two heads of 64 or half a head
    of 256. Where it is none of these (heads of 96), each element along that axis keeps a scale of
    its own. Letters that are separate tensors on disk (experts, gate and up) share no scale.
    """
    size, letters, over = row.size, dims_lib.parse(row.dims), row.over.split()
    if quant.block is None:
        return tuple(size[x] if x in over else 1 for x in letters)
    per_letter = dict.fromkeys(letters, 1)
    for axis in dims_lib.groups(row.layout):
        block = quant.block[1 if axis[-1] in over else 0]
        *outer, minor = axis
        if not outer or size[minor] % block == 0:
            per_letter[minor] = block
        elif block % size[minor] == 0:
            heads = block // size[minor]
            if len(outer) == 1 or size[outer[-1]] % heads == 0:
                per_letter[minor], per_letter[outer[-1]] = size[minor], heads
    return tuple(per_letter[x] for x in letters)


@lru_cache(maxsize=16)
def abstract(config: ModelConfig, dtype="bfloat16") -> Weights:
    """Shapes and dtypes of a model's weights, as `jax.ShapeDtypeStruct`s; allocates nothing."""

    def one(row: Param):
        quant = quantization(row, config)
        if quant is None:
            return jax.ShapeDtypeStruct(row.shape, jnp.dtype(dtype))
        per_axis = blocks(row, quant)
        return QArray(
            jax.ShapeDtypeStruct(row.shape, FORMATS[quant.form][0]),
            jax.ShapeDtypeStruct(scale_shape(row.shape, per_axis), jnp.dtype(quant.scale_dtype)),
            per_axis,
        )

    return jax.tree.map(one, table(config))


def shardings(config: ModelConfig, mesh: Mesh, rules: Rules) -> Weights:
    """The `NamedSharding` of every leaf of `abstract`.

    Raises:
        ValueError: a letter's size, or its blocks of scales, do not divide over its mesh axes;
            the message names the tensor, the letter and the numbers.
    """
    rules = sharding_lib.replicate_kv(rules, mesh, config.text.num_key_value_heads)
    made = {}  # most layers are alike, and a search asks for hundreds of meshes

    def one(row: Param):
        quant = quantization(row, config)
        kind = row.dims, row.shape, row.layout, row.over, quant
        if kind not in made:
            made[kind] = _place(row, quant, mesh, rules)
        return made[kind]

    return jax.tree.map(one, table(config))


def _place(row: Param, quant: QuantConfig | None, mesh: Mesh, rules: Rules):
    spec = sharding_lib.spec(row.dims, mesh, rules, row.size, row.name)
    values = NamedSharding(mesh, spec)
    if quant is None:
        return values
    per_axis = blocks(row, quant)
    scale = _scale_spec(row, per_axis, spec, mesh)
    return QArray(values, NamedSharding(mesh, scale), per_axis)


def _scale_spec(row: Param, per_axis, spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """Scales lie with their values; a single scale along an axis is on every device."""
    entries = []
    counts = scale_shape(row.shape, per_axis)
    for letter, size, block, count, axes in zip(
        dims_lib.parse(row.dims), row.shape, per_axis, counts, spec, strict=True
    ):
        names = (axes,) if isinstance(axes, str) else axes or ()
        n = sharding_lib.ways(mesh, names)
        if n > 1 and count > 1 and (size // n) % block:
            raise ValueError(
                f"{row.name}: {letter}={size} over {'+'.join(names)}={n} cuts its scale blocks of "
                f"{block}; shard experts instead (rules.replicate({letter!r})) or dequantise"
            )
        entries.append(axes if count > 1 else None)
    return PartitionSpec(*entries)


def init(config: ModelConfig, seed: int, dtype, mesh: Mesh, rules: Rules) -> Weights:
    """Random weights of unit-scale activations, made on their devices, equal on every mesh.

    Args:
        config: the model.
        seed: of all weights.
        dtype: of unquantised weights.
        mesh, rules: where they lie.

    Raises:
        ValueError: as `shardings`.
    """
    rows, tree = jax.tree.flatten(table(config))
    places = tree.flatten_up_to(shardings(config, mesh, rules))
    shapes = tree.flatten_up_to(abstract(config, dtype))
    key = jax.random.key(seed)
    return tree.unflatten(
        [
            _random(jax.random.fold_in(key, i), row, shape, place)
            for i, (row, shape, place) in enumerate(zip(rows, shapes, places, strict=True))
        ]
    )


def _random(key, row: Param, shape, place):
    if row.init != "normal":
        fill = jnp.ones if row.init == "ones" else jnp.zeros
        return fill(shape.shape, shape.dtype, device=place)
    fan_in = math.prod(row.size[x] for x in row.over.split())
    bound = math.sqrt(3.0 / fan_in)  # a uniform distribution of variance 1 / fan_in
    if not isinstance(shape, QArray):
        return _uniform(key, shape.shape, jnp.dtype(shape.dtype), bound, place)
    values = shape.values
    largest = next(most for dtype, most in FORMATS.values() if values.dtype == dtype)
    scale = jnp.full(shape.scale.shape, bound / largest, shape.scale.dtype, device=place.scale)
    drawn = _uniform(key, values.shape, jnp.dtype(values.dtype), largest, place.values)
    return QArray(drawn, scale, shape.blocks)


@partial(jax.jit, static_argnames=("shape", "dtype", "bound", "place"))
def _uniform(key, shape, dtype, bound: float, place: NamedSharding) -> jax.Array:
    """Uniform in [-bound, bound): a key for each slice of the last axes, few of them at a time."""
    axes = range(1, len(shape) + 1)
    split = next(i for i in axes if math.prod(shape[i:]) <= _DRAWN_AT_ONCE)
    slices, tail = math.prod(shape[:split]), shape[split:]

    def one(key):
        return jax.random.uniform(key, tail, jnp.float32, -bound, bound).astype(dtype)

    together = min(slices, _DRAWN_AT_ONCE // math.prod(tail))
    drawn = jax.lax.map(one, jax.random.split(key, slices), batch_size=together)
    return jax.lax.with_sharding_constraint(drawn.reshape(shape), place)


def count(config: ModelConfig) -> int:
    """How many parameters a model has (scales of a quantised checkpoint not counted)."""
    return sum(math.prod(row.shape) for row in jax.tree.leaves(table(config)))


@lru_cache(maxsize=16)
def count_active(config: ModelConfig) -> int:
    """How many text parameters one token uses: experts count as the active ones; no embedding."""
    rows, active = table(config), config.text.sizes["A"]
    return sum(
        math.prod(active if x == "E" else row.size[x] for x in dims_lib.parse(row.dims))
        for row in jax.tree.leaves((rows.layers, rows.norm, rows.head or rows.embed))
    )
