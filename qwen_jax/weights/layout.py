"""A strategy before it runs: every parameter, how it is split, its bytes on a device; and pictures.

Knows the table, meshes and rules; needs no weights, and for the table no devices either:

    layout = layout_of(config, mesh, sharding.strategy("ep+tp"))
    print(layout)                        parameter, dims, split, bytes per device
    layout.draw("mlp.experts")           which device holds which part, in a terminal
    layout.figure("mlp.experts")         the same by treescope, in a notebook
"""

import dataclasses
import math
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax import dims as dims_lib
from qwen_jax import sharding as sharding_lib
from qwen_jax.sharding import Rules
from qwen_jax.weights import derive
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import table
from qwen_jax.weights.quant import QArray

_LAYER = re.compile(r"\.\d+\.")


@dataclasses.dataclass(frozen=True)
class Row:
    """A parameter, or one that many layers have alike.

    Attributes:
        name: as the checkpoint calls it; ``*`` for the number of the layer.
        count: how many layers have it.
        dims: its letters.
        shape: of the whole array.
        dtype: of its values.
        spec: how they are split.
        bytes: on each device, of all ``count`` of them, scales included.
    """

    name: str
    count: int
    dims: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    bytes: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """All parameters of a model on a mesh; prints as a table."""

    rows: tuple[Row, ...]
    mesh: Mesh
    rules: Rules

    @property
    def bytes(self) -> int:
        """Of all weights, on each device."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        sizes = ", ".join(f"{axis}={n}" for axis, n in self.mesh.shape.items())
        cells = [("parameter", "layers", "dims", "dtype", "split", "MB per device")]
        cells += [
            (
                row.name,
                str(row.count),
                " ".join(f"{d}={n}" for d, n in zip(row.dims.split(), row.shape, strict=True)),
                row.dtype,
                _split(row),
                f"{row.bytes / 1e6:,.3f}",
            )
            for row in self.rows
        ]
        cells.append(("all", "", "", "", str(self.rules), f"{self.bytes / 1e6:,.3f}"))
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        return "\n".join([f"mesh {sizes}", *lines])

    def draw(self, name: str) -> None:
        """Prints which device holds which part of a parameter (`jax.debug.visualize_sharding`).

        Axes that are whole are left out. ``name`` is the end or any part of one row's name.

        Raises:
            ValueError: no row, or several, are called so; it is split along more than two axes; or
                the mesh has no devices.
        """
        shape, spec = self._drawn(name)
        if len(shape) > 2:
            raise ValueError(f"{name} is split along {len(shape)} axes, a terminal draws two")
        jax.debug.visualize_sharding(shape or (1,), NamedSharding(self.mesh, spec))

    def figure(self, name: str):
        """The same as a treescope figure, for any number of axes; show it in a notebook.

        Raises:
            ValueError: as `draw`.
        """
        import treescope

        shape, spec = self._drawn(name)
        whole = np.zeros(shape or (1,), np.int8)
        return treescope.render_array_sharding(
            jax.device_put(whole, NamedSharding(self.mesh, spec))
        )

    def _drawn(self, name: str) -> tuple[tuple[int, ...], PartitionSpec]:
        """One element for each part of the parameter, along the axes that are split."""
        if not isinstance(self.mesh, Mesh):
            raise ValueError("layout: a mesh without devices cannot be drawn; print the table")
        found = [row for row in self.rows if name in row.name]
        if len(found) != 1:
            names = [row.name for row in found or self.rows]
            raise ValueError(
                f"layout: {name!r} is the name of {len(found)} parameters; use one of "
                f"{', '.join(names)}"
            )
        entries = [axes for axes in found[0].spec if axes is not None]
        return tuple(_ways(self.mesh, axes) for axes in entries), PartitionSpec(*entries)


def layout_of(config: ModelConfig, mesh: Mesh, rules: Rules, dtype: str = "bfloat16") -> Layout:
    """How the weights of a model would lie.

    Args:
        config: the model.
        mesh: of devices, or abstract.
        rules: letter -> mesh axes.
        dtype: of unquantised weights.

    Raises:
        ValueError: as `derive.shardings`: a size or its blocks of scales do not divide.
    """
    rows, tree = jax.tree.flatten(table(config))
    arrays = tree.flatten_up_to(derive.abstract(config, dtype))
    places = tree.flatten_up_to(derive.shardings(config, mesh, rules))
    found: dict[tuple, Row] = {}
    for row, array, place in zip(rows, arrays, places, strict=True):
        stored = array.values if isinstance(array, QArray) else array
        spec = (place.values if isinstance(place, QArray) else place).spec
        name, dims = _LAYER.sub(".*.", row.name), " ".join(dims_lib.parse(row.dims))
        size = _bytes(array, place)
        key = (name, stored.shape, stored.dtype.name, spec)
        old = found.get(key)
        found[key] = Row(
            name,
            old.count + 1 if old else 1,
            dims,
            stored.shape,
            stored.dtype.name,
            spec,
            old.bytes + size if old else size,
        )
    return Layout(tuple(found.values()), mesh, rules)


def _bytes(array, place) -> int:
    leaves = zip(jax.tree.leaves(array), jax.tree.leaves(place), strict=True)
    return sum(math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize for x, where in leaves)


def _ways(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return sharding_lib.ways(mesh, (axes,) if isinstance(axes, str) else axes)


def _split(row: Row) -> str:
    parts = [
        f"{letter}->{axes if isinstance(axes, str) else '+'.join(axes)}"
        for letter, axes in zip(row.dims.split(), row.spec, strict=False)
        if axes is not None
    ]
    return ", ".join(parts) or "whole"
