"""What follows from the table: shapes, shardings, random weights, counts, requantisation.

Knows rows, meshes and quantisation; knows no file and no forward pass. Every function here maps one
function over the leaves of `params.table(config)`.
"""

import dataclasses
import logging
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
from qwen_jax.weights.quant import FORMATS, QArray, Weight, dequantize, quantize, scale_shape

log = logging.getLogger(__name__)

# What requantising leaves alone: the router decides, and the head's rounding shows in every logit.
KEPT_EXACT = ("lm_head", "mlp.gate", "visual")
_DRAWN_AT_ONCE = 1 << 22  # float32 randoms that are in memory together, when weights are drawn


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
    """Uniform in [-bound, bound); a key per index of the first axis, few of them at a time."""

    def one(key):
        return jax.random.uniform(key, shape[1:], jnp.float32, -bound, bound).astype(dtype)

    together = min(shape[0], max(1, _DRAWN_AT_ONCE // math.prod(shape[1:])))
    drawn = jax.lax.map(one, jax.random.split(key, shape[0]), batch_size=together)
    return jax.lax.with_sharding_constraint(drawn, place)


def count(config: ModelConfig) -> int:
    """How many parameters a model has (scales of a quantised checkpoint not counted)."""
    return sum(math.prod(row.shape) for row in jax.tree.leaves(table(config)))


def count_active(config: ModelConfig) -> int:
    """How many text parameters one token uses: experts count as the active ones; no embedding."""
    rows, active = table(config), config.text.sizes["A"]
    return sum(
        math.prod(active if x == "E" else row.size[x] for x in dims_lib.parse(row.dims))
        for row in jax.tree.leaves((rows.layers, rows.norm, rows.head or rows.embed))
    )


def requantize(weights: Weights, config: ModelConfig, form: str) -> tuple[Weights, ModelConfig]:
    """Stores linear weights in ``form`` ("fp8", "int8") with one scale per output channel.

    A quantised checkpoint is dequantised first, so that the new rounding comes on top of its own;
    what it leaves exact stays exact. Of another one the head, the router and the vision tower do.
    The error is logged: the RMS of all differences over the RMS of all weights.

    Returns:
        The weights, whose values are sharded as they were, and their config.

    Raises:
        ValueError: ``form`` is unknown.
    """
    old = config.quantization
    skip = KEPT_EXACT if old is None else old.skip
    new = QuantConfig(form=form, block=None, skip=skip, scale_dtype="float32")
    config = dataclasses.replace(config, quantization=new)
    squares: list[tuple[float, float, str]] = []  # of errors, of weights; the tensor

    def one(row: Param, leaf: Weight) -> Weight:
        if quantization(row, config) is None:
            return leaf
        out, error, power = _requantize(leaf, blocks(row, new), form)
        squares.append((float(error), float(power), row.name))
        return out

    rows, tree = jax.tree.flatten(table(config))
    leaves = tree.flatten_up_to(weights)
    out = tree.unflatten([one(row, leaf) for row, leaf in zip(rows, leaves, strict=True)])
    errors = sorted((math.sqrt(e / p) if p else 0.0, name) for e, p, name in squares)
    total = math.sqrt(sum(e for e, _, _ in squares) / sum(p for _, p, _ in squares))
    log.info("requantised to %s: relative RMS error %.2f %%", form, 100 * total)
    log.info("of one tensor at worst %.2f %%: %s", 100 * errors[-1][0], errors[-1][1])
    return out, config


@partial(jax.jit, static_argnames=("per_axis", "form"))
def _requantize(w: Weight, per_axis: tuple[int, ...], form: str):
    """The requantised weight, the sum of its squared errors, and that of its squares."""
    exact = dequantize(w)
    out = quantize(exact, per_axis, form)
    return out, jnp.sum((dequantize(out) - exact) ** 2), jnp.sum(exact**2)
