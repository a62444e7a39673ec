"""Sharding as data: a strategy is a mapping from dimension letters to mesh axes.

Knows letters, sizes and meshes; knows no weight and no model. To try another strategy, write
another mapping:

    rules = Rules.of(E="expert", N="tensor", K="tensor", I="tensor", V="tensor")

Each letter of a dims string is looked up on its own, so one mapping shards weights, activations and
cache alike. A size that does not divide, or a mesh axis used twice in one array, raises with the
letter and the numbers: nothing is replicated without being asked to be, with two stated exceptions:
`replicate_kv`, and the tokens T of a step, which stay whole where they do not divide (`constrain`).
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen_jax import dims as dims_lib

AXES = ("data", "expert", "tensor")
_AXIS_SIZE = re.compile(r"\s*(\w+)\s*=\s*(\d+)\s*")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Letter -> mesh axes; a letter without an entry is replicated. Hashable, so jit can see it."""

    table: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def of(cls, mapping: Mapping[str, str | Sequence[str]] | None = None, **letters) -> "Rules":
        """``Rules.of(E="expert", V=("data", "tensor"))``; a mapping works too.

        Raises:
            ValueError: a key is not one letter of the glossary.
        """
        merged = {**(mapping or {}), **letters}
        for letter in merged:
            if dims_lib.parse(letter) != (letter,):
                raise ValueError(f"rules: {letter!r} is not one dimension letter")
        as_tuple = {k: (v,) if isinstance(v, str) else tuple(v) for k, v in merged.items()}
        return cls(tuple(sorted((k, v) for k, v in as_tuple.items() if v)))

    def axes(self, letter: str) -> tuple[str, ...]:
        """The mesh axes that ``letter`` is split over."""
        return dict(self.table).get(letter, ())

    def replicate(self, *letters: str) -> "Rules":
        """These rules with some letters replicated."""
        dims_lib.parse(" ".join(letters))
        return Rules(tuple((k, v) for k, v in self.table if k not in letters))

    def __str__(self) -> str:
        return ", ".join(f"{k}->{'+'.join(v)}" for k, v in self.table) or "all replicated"


_HEADS = dict.fromkeys("NKIV", "tensor")
_MORE_HEADS = dict.fromkeys("NKIV", ("expert", "tensor"))
_ROWS = {"B": ("data", "expert"), **_HEADS}


STRATEGIES: Mapping[str, Rules] = {
    "replicated": Rules(),
    "tp": Rules.of(_HEADS, F="tensor"),
    "ep": Rules.of(E="expert"),
    "ep+tp": Rules.of(_HEADS, E="expert", F="tensor"),
    # Attention and head use every device as tensor parallelism, experts use them all as experts.
    "tp-attention+ep": Rules.of(
        E=("expert", "tensor"), N=("expert", "tensor"), K=("expert", "tensor"), V="tensor"
    ),
    # Each row, with its pages, is on one device of data and expert; experts use every device, or
    # their hidden width is split where there are more devices than divide the experts.
    "dp-attention+ep": Rules.of(_ROWS, E=("data", "expert", "tensor")),
    "dp-attention+ep+tp": Rules.of(_ROWS, E=("data", "expert"), F="tensor"),
    # The same, with the tokens of a step split too: long prompts are projected in parallel.
    "sp+ep": Rules.of(_ROWS, E=("data", "expert", "tensor"), T=("data", "expert")),
    "sp+ep+tp": Rules.of(_ROWS, E=("data", "expert"), F="tensor", T=("data", "expert")),
    # Rows over data alone, heads over the rest: experts are split in other ways than attention.
    "dp+tp-attention+ep+tp": Rules.of(_MORE_HEADS, B="data", E=("data", "expert"), F="tensor"),
    "sp+tp-attention+ep+tp": Rules.of(
        _MORE_HEADS, B="data", E=("data", "expert"), F="tensor", T="data"
    ),
}


def make_mesh(spec: "str | Mapping[str, int] | Mesh" = "auto", devices=None) -> Mesh:
    """A mesh with the axes data, expert, tensor (those not named have size 1), axis types Auto.

    Args:
        spec: ``"auto"`` (every device on the expert axis), ``"expert=4,tensor=2"``, a mapping, or
            a ready mesh, of which devices and axis names are kept (`jax.make_mesh` makes axis
            types Explicit, which this library does not use).
        devices: the devices to use, in order; default `jax.devices()`. A mesh that needs fewer
            takes the first ones.

    Raises:
        ValueError: an axis is unknown, or its size is no positive integer, or the mesh needs more
            devices than there are.
    """
    if isinstance(spec, Mesh):
        names = spec.axis_names
        return Mesh(spec.devices, names, axis_types=(AxisType.Auto,) * len(names))
    devices = list(jax.devices() if devices is None else devices)
    if spec == "auto":
        spec = {"expert": len(devices)}
    if isinstance(spec, str):
        spec = parse_mesh(spec)
    for name, size in spec.items():
        if name not in AXES or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"mesh axis {name}={size!r}: use positive sizes of {', '.join(AXES)}, "
                'for example "expert=4,tensor=2"'
            )
    sizes = [spec.get(axis, 1) for axis in AXES]
    if math.prod(sizes) > len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes)} devices, "
            f"{len(devices)} are here"
        )
    grid = np.array(devices[: math.prod(sizes)]).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """Reads ``"expert=4,tensor=2"``.

    Raises:
        ValueError: a part is not AXIS=SIZE, or an axis stands twice.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = _AXIS_SIZE.fullmatch(part)
        if found is None or found[1] in sizes:
            raise ValueError(
                f"mesh {text!r}: {part!r} is not AXIS=SIZE of a new axis; "
                'use for example "expert=4,tensor=2"'
            )
        sizes[found[1]] = int(found[2])
    return sizes


def strategy(name: "str | Rules") -> Rules:
    """The rules of a named strategy; ``"auto"`` is ``"ep+tp"``, right for every mesh above.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(name, Rules):
        return name
    if name == "auto":
        name = "ep+tp"
    if name not in STRATEGIES:
        raise ValueError(f"strategy {name!r} is unknown; named ones: auto, {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def ways(mesh: Mesh, axes: Sequence[str]) -> int:
    """Over how many devices the mesh ``axes`` split a dimension.

    Raises:
        ValueError: the mesh has no such axis.
    """
    missing = [a for a in axes if a not in mesh.shape]
    if missing:
        raise ValueError(
            f"rules name mesh axes {missing}; this mesh has {list(mesh.shape)}: "
            "add axes of size 1, or write rules for these"
        )
    return math.prod(mesh.shape[a] for a in axes)


def spec(
    dims: str,
    mesh: Mesh,
    rules: Rules,
    sizes: dims_lib.Sizes | None = None,
    name: str = "array",
) -> PartitionSpec:
    """The partition of an array in ``dims``; ``.`` stands for an axis that has no letter.

    Args:
        dims: e.g. ``"E P D F"``, or ``"T . H"``.
        mesh: the mesh.
        rules: letter -> mesh axes.
        sizes: the size per letter; with it, divisibility is checked.
        name: what to call the array in an error.

    Raises:
        ValueError: a letter is unknown, a size does not divide, or a mesh axis is used twice.
    """
    dims_lib.parse(dims.replace(".", " "))
    entries, used = [], set()
    for letter in dims.split():
        axes = () if letter == "." else rules.axes(letter)
        axes = tuple(a for a in axes if ways(mesh, (a,)) > 1)
        n = ways(mesh, axes)
        if sizes is not None and letter != "." and sizes[letter] % n:
            raise ValueError(
                f"{name}: {letter}={sizes[letter]} does not split over {'+'.join(axes)}={n}; "
                f"use a mesh whose {'+'.join(axes)} divides it, or rules.replicate({letter!r})"
            )
        if used & set(axes):
            raise ValueError(
                f"{name}: dims {dims!r} use mesh axes {sorted(used & set(axes))} twice"
            )
        used |= set(axes)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def replicate_kv(rules: Rules, mesh: Mesh, kv_heads: int) -> Rules:
    """The stated exception: key/value *weights* are replicated when heads are fewer than ways.

    The cache then holds each head once per device that needs it (`attention.stored_kv_heads`).

    Raises:
        ValueError: neither the heads divide by the ways nor the ways by the heads.
    """
    n = ways(mesh, rules.axes("K"))
    if kv_heads % n == 0:
        return rules
    if n % kv_heads:
        raise ValueError(
            f"K={kv_heads} kv heads neither split over nor divide {'+'.join(rules.axes('K'))}={n}; "
            f"use a divisor of {kv_heads} or a multiple of it, or rules.replicate('N', 'K')"
        )
    return rules.replicate("K")


def for_tokens(rules: Rules, mesh: Mesh, tokens: int) -> Rules:
    """These rules, with T left whole where ``tokens`` do not divide over its axes."""
    return rules.replicate("T") if tokens % ways(mesh, rules.axes("T")) else rules


def constrain(x: jax.Array, dims: str, mesh: Mesh, rules: Rules) -> jax.Array:
    """Tells the partitioner how an activation is laid out; nothing on a mesh of one device.

    Tokens that do not divide over the axes of T (a step of few rows) stay whole.

    Raises:
        ValueError: as `spec`.
    """
    if mesh.size == 1:
        return x
    sizes = dict(zip(dims.split(), x.shape, strict=True))
    rules = for_tokens(rules, mesh, sizes.get("T", 0))
    place = spec(dims, mesh, rules, sizes, "activation")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, place))


def replicate(tree, mesh: Mesh):
    """Arrays of the host, whole on every device of the mesh; every process brings the same."""
    place = NamedSharding(mesh, PartitionSpec())
    if place.is_fully_addressable:
        return jax.device_put(tree, place)

    def one(x) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, place, lambda _: host)

    return jax.tree.map(one, tree)


def per_shard(fn, mesh: Mesh, in_specs, out_specs):
    """`jax.shard_map` over the whole mesh, or ``fn`` itself on a mesh of one device."""
    if mesh.size == 1:
        return fn
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def shard_index(mesh: Mesh, axes: Sequence[str]) -> jax.Array | int:
    """Inside `per_shard`: which of the `ways` pieces this device holds, row-major."""
    index: jax.Array | int = 0
    for axis in axes:
        if mesh.shape[axis] > 1:
            index = index * mesh.shape[axis] + jax.lax.axis_index(axis)
    return index


def reduce_over(x: jax.Array, mesh: Mesh, axes: Sequence[str]) -> jax.Array:
    """Inside `per_shard`: the sum over the devices of ``axes``."""
    used = live(mesh, axes)
    return jax.lax.psum(x, used) if used else x


def scatter_over(x: jax.Array, mesh: Mesh, axes: Sequence[str]) -> jax.Array:
    """Inside `per_shard`: the piece of that sum, along the first axis, that this device keeps."""
    used = live(mesh, axes)
    return jax.lax.psum_scatter(x, used, scatter_dimension=0, tiled=True) if used else x


def live(mesh: Mesh, axes: Sequence[str]) -> tuple[str, ...]:
    """Those of ``axes`` that split anything."""
    return tuple(a for a in axes if mesh.shape[a] > 1)
