"""What follows from the table: shapes, shardings, random weights, counts, requantisation.

Knows rows, meshes and quantisation; knows no file and no forward pass. Every function here maps one
function over the leaves of `params.table(config)`.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax import dims as dims_lib
from qwen_jax import sharding as sharding_lib
from qwen_jax.sharding import Rules
from qwen_jax.weights.config import ModelConfig, QuantConfig
from qwen_jax.weights.params import Param, Weights, table
from qwen_jax.weights.quant import FORMATS, QArray, quantize, scale_shape

# What requantising leaves alone: the router decides, and the head's rounding shows in every logit.
KEPT_EXACT = ("lm_head", "mlp.gate", "visual")


def quantization(row: Param, config: ModelConfig) -> QuantConfig | None:
    """How this row is stored by a checkpoint of ``config``; None: unquantised."""
    if config.quantization is None or not row.linear or config.quantization.skips(row.name):
        return None
    return config.quantization


def blocks(row: Param, quant: QuantConfig) -> tuple[int, ...]:
    """Elements per scale along each letter of ``row.dims``.

    A block of 128 along the fused axis "(N H)" is one head of 128, two heads of 64 or half a head
    of 256. Where it is none of these (heads of 96), each element keeps a scale of its own.
    """
    size, letters, over = row.size, dims_lib.parse(row.dims), row.over.split()
    if quant.block is None:
        return tuple(size[x] if x in over else 1 for x in letters)
    per_letter = dict.fromkeys(letters, 1)
    for axis in dims_lib.groups(row.layout):
        block = quant.block[1 if axis[-1] in over else 0]
        *outer, minor = axis
        if not outer:
            per_letter[minor] = block
        elif block % size[minor] == 0:
            per_letter[minor] = size[minor]
            per_letter[outer[-1]] = block // size[minor]
        elif size[minor] % block == 0:
            per_letter[minor] = block
    return tuple(per_letter[x] for x in letters)


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
        ValueError: a letter's size, or its blocks of scales, do not divide over its mesh axes.
    """
    rules = sharding_lib.replicate_kv(rules, mesh, config.text.num_key_value_heads)

    def one(row: Param):
        spec = sharding_lib.spec(row.dims, mesh, rules, row.size, row.name)
        values = NamedSharding(mesh, spec)
        quant = quantization(row, config)
        if quant is None:
            return values
        per_axis = blocks(row, quant)
        scale = _scale_spec(row, per_axis, spec, mesh)
        return QArray(values, NamedSharding(mesh, scale), per_axis)

    return jax.tree.map(one, table(config))


def _scale_spec(row: Param, per_axis, spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    entries = []
    counts = scale_shape(row.shape, per_axis)
    for letter, size, block, count, axes in zip(
        dims_lib.parse(row.dims), row.shape, per_axis, counts, spec, strict=True
    ):
        names = (axes,) if isinstance(axes, str) else axes or ()
        n = sharding_lib.ways(mesh, names)
        if count > 1 and (size // n) % block:
            raise ValueError(
                f"{row.name}: {letter}={size} over {'+'.join(names)}={n} cuts its scale blocks of "
                f"{block}; shard experts instead (rules.replicate({letter!r})) or dequantise"
            )
        entries.append(axes if count > 1 else None)
    return PartitionSpec(*entries)


def init(config: ModelConfig, seed: int, dtype, mesh: Mesh, rules: Rules) -> Weights:
    """Random weights of unit-scale activations, made on their devices, equal on every mesh."""
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
    _, largest = FORMATS["fp8" if shape.values.dtype != jnp.int8 else "int8"]
    values = _uniform(key, shape.values.shape, jnp.dtype(shape.values.dtype), largest, place.values)
    scale = jnp.full(shape.scale.shape, bound / largest, shape.scale.dtype, device=place.scale)
    return QArray(values, scale, shape.blocks)


def _uniform(key, shape, dtype, bound, place) -> jax.Array:
    # A weight of many gigabytes is drawn slice by slice: float32 randoms of one slice at a time.
    leading = shape[0] if len(shape) > 2 else 1

    @partial(jax.jit, out_shardings=place)
    def draw(key):
        def one(k):
            tail = shape[1:] if leading > 1 else shape
            return jax.random.uniform(k, tail, jnp.float32, -bound, bound).astype(dtype)

        if leading == 1:
            return one(key).reshape(shape)
        return jax.lax.map(one, jax.random.split(key, leading))

    return draw(key)


def count(config: ModelConfig) -> int:
    """How many parameters a model has (scales of a quantised checkpoint not counted)."""
    return sum(math.prod(row.shape) for row in jax.tree.leaves(table(config)))


def count_active(config: ModelConfig) -> int:
    """How many text parameters one token uses: experts count as the active ones; no embedding."""
    total, text = 0, config.text
    rows = table(config)
    for row in jax.tree.leaves((rows.layers, rows.norm, rows.head or rows.embed)):
        share = text.num_experts_per_tok / text.num_experts if "E" in row.dims.split() else 1
        total += int(math.prod(row.shape) * share)
    return total


def requantize(weights: Weights, config: ModelConfig, form: str) -> tuple[Weights, ModelConfig]:
    """Stores linear weights in ``form`` ("fp8", "int8") with one scale per output channel.

    Only unquantised checkpoints: requantising a quantised one would round twice. The head, the
    router and the vision tower stay as they are.

    Raises:
        ValueError: the checkpoint is quantised already, or ``form`` is unknown.
    """
    if config.quantization is not None:
        raise ValueError(
            f"the checkpoint is quantised already ({config.quantization.form}): "
            f"quantization={form!r} would round twice; leave it out, or convert from the original"
        )
    quant = QuantConfig(form=form, block=None, skip=KEPT_EXACT, scale_dtype="float32")
    config = dataclasses.replace(config, quantization=quant)

    @partial(jax.jit, static_argnums=(1,))
    def one(leaf, row: Param):
        if quantization(row, config) is None:
            return leaf
        return quantize(leaf, blocks(row, quant), form)

    rows, tree = jax.tree.flatten(table(config))
    leaves = tree.flatten_up_to(weights)
    return tree.unflatten([one(x, row) for x, row in zip(leaves, rows, strict=True)]), config
