"""Routed expert products in XLA: the definition of correct, and the fast path on CPU.

Cost follows the routing: loops with data-dependent trip counts visit only experts that have rows,
and only rows that exist. Two forms, chosen by static sizes alone (M rows, R experts in all):

`_skinny`, up to `SKINNY_MEAN` rows per expert on average (decode). One item is one expert and up to
four of its rows. A dot needs its operand as a buffer of its own, so XLA:CPU copies a dynamically
sliced matrix before multiplying it. Here the product is written as elementwise arithmetic instead,
which XLA fuses with the slice: the weights are read once, where they lie, converted in registers if
they are narrow, and both cores take half.

    y[c, m, p, n] = sum_{j < J} x[m, c, j] * w[expert, p, c, j, n]     D = C * J, unrolled over j
    y[m, p, n]    = sum_c y[c, m, p, n]

`_wide` (prefill). Each active expert's matrices are sliced (and dequantised) once; an inner loop
multiplies tiles of `TILE` of its rows by them with ordinary dots.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pallas_kernels import narrow, registry
from pallas_kernels.buffers import in_own_loop, zeros_after
from pallas_kernels.device import Device
from pallas_kernels.precision import exact
from pallas_kernels.ragged_dot.facts import Facts

SKINNY_MEAN = 4
HEIGHTS = (1, 2, 4)
STRIPS = (16, 8, 4, 2, 1)
TILE = 16


def ragged_dot(x_MD, w, group_sizes, *, scale, blocks, activation, first_expert, out_dtype):
    """`pallas_kernels.ragged_dot`, on checked arguments."""
    M = x_MD.shape[0]
    if M == 0:
        return jnp.zeros((0, w.shape[-1]), out_dtype)
    experts = _Experts.of(w, scale, blocks)
    mean = M / group_sizes.shape[0]
    form = _skinny if mean <= SKINNY_MEAN else _wide
    return form(x_MD, experts, _spans(group_sizes, first_expert, w.shape[0]), out_dtype)


@struct.dataclass
class _Experts:
    """The weights with what is needed to read an expert: P matrices [D, F].

    w stays [E, D, F] where P is 1: XLA would copy all of a reshaped array at `narrow`'s barrier.
    """

    w: jax.Array
    scale: jax.Array | None
    blocks: tuple[int, ...] | None = struct.field(pytree_node=False)

    @classmethod
    def of(cls, w, scale, blocks) -> "_Experts":
        if w.ndim == 3:
            blocks = blocks and (blocks[0], 1, *blocks[1:])
            scale = None if scale is None else scale[:, None]
        return cls(w, scale, blocks)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """E, P, D, F."""
        E, *P, D, F = self.w.shape
        return E, P[0] if P else 1, D, F

    def strip(self) -> int:
        """J: how many rows of a matrix one partial sum takes; never across a scale's border."""
        _, _, D, _ = self.sizes
        block = D if self.blocks is None else self.blocks[2]
        return next(J for J in STRIPS if D % J == 0 and (block >= D or block % J == 0))

    def scales(self, e, strip: int):
        """The scales of expert ``e``: [P, D // strip or 1, F], one row per strip of D."""
        assert self.scale is not None
        assert self.blocks is not None
        scale = lax.dynamic_index_in_dim(self.scale, e // self.blocks[0], keepdims=False)
        scale = scale.astype(jnp.float32)
        _, P, D, F = self.sizes
        sizes, (_, pair, rows, columns) = (P, D // strip, F), self.blocks
        blocks = (pair, max(1, rows // strip), columns)
        for axis, (size, block) in enumerate(zip(sizes, blocks, strict=True)):
            if axis == 1 and scale.shape[1] == 1:
                continue
            scale = jnp.repeat(scale, block, axis)[(slice(None),) * axis + (slice(size),)]
        return scale

    def strips(self, e, J: int):
        """For each j < J, rows j, J + j, 2 J + j ... of expert ``e``, float32 [D / J, 1, P, F]."""
        E, P, D, F = self.sizes
        w, at = narrow.bits_at(self.w, e)
        if w is not self.w:
            # The view of an array as integers fuses with one slice, not with J of them.
            w, at, E = lax.dynamic_slice_in_dim(w, at, 1), jnp.zeros_like(at), 1
        w = w.reshape(E, P, D // J, J, F)
        for j in range(J):
            strip = lax.dynamic_slice(w, (at, 0, 0, j, 0), (1, P, D // J, 1, F))[0]
            strip = narrow.from_bits(strip, self.w.dtype).astype(jnp.float32)
            yield strip.transpose(1, 2, 0, 3)

    def matrices(self, e, dtype) -> list[jax.Array]:
        """Expert ``e`` as P plain [D, F] matrices: the product with the scale rounded once."""
        w, e = narrow.bits_at(self.w, e)
        _, P, D, F = self.sizes
        w = w.reshape(-1, D, F)
        each = [lax.dynamic_index_in_dim(w, e * P + p, keepdims=False) for p in range(P)]
        each = [narrow.from_bits(matrix, self.w.dtype) for matrix in each]
        if self.scale is not None:
            scales = self.scales(e, 1)
            each = [m.astype(jnp.float32) * s for m, s in zip(each, scales, strict=True)]
        return [matrix.astype(dtype) for matrix in each]


def _activate(y: Sequence[jax.Array]) -> jax.Array:
    """SwiGLU in float32 of a pair of products; one alone as it is."""
    return y[0] if len(y) == 1 else jax.nn.silu(y[0]) * y[1]


@struct.dataclass
class _Spans:
    """Where the rows of each held expert stand: [start, end), int32 [E] each."""

    start_E: jax.Array
    end_E: jax.Array

    def items(self, rows: int, most: int):
        """Splits every span into items of ``rows`` rows (the last one of an expert may be shorter).

        Args:
            rows: rows per item.
            most: a static bound on the number of items.

        Returns:
            The number of items, then int32 [most] each: expert, first row, end of its rows.
        """
        items_E = -(-(self.end_E - self.start_E) // rows)
        last_E = jnp.cumsum(items_E)
        item_I = jnp.arange(most, dtype=jnp.int32)
        expert_I = jnp.searchsorted(last_E, item_I, side="right", method="compare_all")
        expert_I = jnp.minimum(expert_I, last_E.shape[0] - 1).astype(jnp.int32)
        first_I = (self.start_E - rows * (last_E - items_E))[expert_I] + rows * item_I
        return last_E[-1], expert_I, first_I, self.end_E[expert_I]


def _spans(group_sizes, first_expert, E):
    held_E = first_expert + jnp.arange(E)
    before_ER = jnp.arange(group_sizes.shape[0]) < held_E[:, None]
    start_E = jnp.sum(jnp.where(before_ER, group_sizes, 0), axis=1, dtype=jnp.int32)
    return _Spans(start_E, start_E + lax.dynamic_slice_in_dim(group_sizes, first_expert, E))


def _skinny(x_MD, experts, spans, out_dtype):
    M, E = x_MD.shape[0], experts.w.shape[0]
    heights = [h for h in HEIGHTS if h <= M]
    tallest = heights[-1]
    count, expert_I, first_I, end_I = spans.items(tallest, M // tallest + min(E, M))

    def item(i, out):
        first = first_I[i]
        rows = end_I[i] - first
        branch = sum((rows > h).astype(jnp.int32) for h in heights[:-1])
        branches = [functools.partial(_rows_by_strips, height=h, padded=tallest) for h in heights]
        y = lax.switch(branch, branches, x_MD, experts, expert_I[i], first)
        # Items come in the order of their rows: what an item clears behind its own rows belongs to
        # later ones, or to nobody.
        y = jnp.where((jnp.arange(tallest) < rows)[:, None], y, 0).astype(out_dtype)
        return lax.dynamic_update_slice_in_dim(out, y, first, axis=0)

    out = zeros_after(x_MD, (M + tallest, experts.w.shape[-1]), out_dtype)
    return lax.fori_loop(0, count, item, out)[:M]


def _rows_by_strips(x_MD, experts, e, first, *, height, padded):
    """``height`` rows from ``first`` on times expert ``e``, and zero rows up to ``padded``."""
    M, D = x_MD.shape
    J = experts.strip()
    row = jnp.minimum(first + jnp.arange(height), M - 1)
    x = x_MD[row].reshape(height, D // J, J).astype(jnp.float32)
    terms = [x[:, :, j].T[:, :, None, None] * w for j, w in enumerate(experts.strips(e, J))]
    y = functools.reduce(jnp.add, terms)
    if experts.scale is not None:
        y = y * experts.scales(e, J).swapaxes(0, 1)[:, None]
    y = in_own_loop(y, first).sum(0)  # apart from its sum, or w would be copied
    return jnp.pad(_activate(list(y.swapaxes(0, 1))), ((0, padded - height), (0, 0)))


def _wide(x_MD, experts, spans, out_dtype):
    M, E = x_MD.shape[0], experts.w.shape[0]
    tile = min(TILE, M)
    # One item per active expert: M rows are more than any expert has.
    count, expert_I, first_I, end_I = spans.items(M, min(E, M))

    def expert(i, out):
        matrices = experts.matrices(expert_I[i], x_MD.dtype)

        def rows(t, out):
            begin = first_I[i] + t * tile
            start = jnp.minimum(begin, M - tile)
            x = lax.dynamic_slice_in_dim(x_MD, start, tile)
            y = [
                jnp.dot(x, w, precision=exact(x), preferred_element_type=jnp.float32)
                for w in matrices
            ]
            y = _activate(y)
            row = start + jnp.arange(tile)
            mine = ((row >= begin) & (row < end_I[i]))[:, None]
            old = lax.dynamic_slice_in_dim(out, start, tile)
            y = jnp.where(mine, y.astype(out_dtype), old)
            return lax.dynamic_update_slice_in_dim(out, y, start, axis=0)

        return lax.fori_loop(0, -(-(end_I[i] - first_I[i]) // tile), rows, out)

    return lax.fori_loop(0, count, expert, zeros_after(x_MD, (M, experts.w.shape[-1]), out_dtype))


def supports(device: Device, facts: Facts) -> str | None:
    """Runs every case on every platform."""
    return None


IMPL = registry.Impl("ragged_dot", "xla", None, supports, ragged_dot)
