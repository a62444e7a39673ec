"""Rows split over devices: each device attends for the rows whose pages it holds.

Knows flat tokens, rows and page numbers; knows no attention. With the rule ``B -> axes`` the pages
of the cache lie in equal pieces on the devices of those axes, and all pages of a row lie on one of
them. Every device sees all tokens, brings those of its own rows to the front, and leaves the others
as padding:

    row of each token   0 0 1 2 2        device 0 holds rows 0 and 2:   order     0 1 3 4 | 2
    pages of the rows   0:3 1:9 2:5      (pages 0 to 7)                 row ends  2 2 4
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class LocalRows:
    """A ragged batch as one device sees it.

    Attributes:
        order: int32 [T], all flat tokens, those of the rows here first and in their order.
        row_starts: int32 [B + 1], where the rows here begin in that order; others have no token.
        kv_lens: int32 [B], 0 for the others.
        page_table: int32 [B, W], pages counted from the first one here.
    """

    order: jax.Array
    row_starts: jax.Array
    kv_lens: jax.Array
    page_table: jax.Array

    def take(self, x: jax.Array) -> jax.Array:
        """[T, ...] in the order of the batch -> in the order of this device."""
        return x[self.order]

    def put_back(self, x: jax.Array) -> jax.Array:
        """The inverse of `take`."""
        return jnp.zeros_like(x).at[self.order].set(x, unique_indices=True)


def rows_here(
    row_starts: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    *,
    first_page: jax.Array | int,
    num_pages: int,
    num_tokens: int,
) -> LocalRows:
    """Picks the rows whose pages are ``first_page .. first_page + num_pages - 1``.

    Args:
        row_starts, kv_lens, page_table: as in `RaggedBatch`; a row's first page tells where it is.
        first_page, num_pages: the piece of the cache on this device.
        num_tokens: T.
    """
    first = page_table[:, 0] - first_page
    here_B = (first >= 0) & (first < num_pages)
    lengths_B = jnp.where(here_B, row_starts[1:] - row_starts[:-1], 0)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.searchsorted(row_starts[1:], token, side="right", method="compare_all")
    here_T = (token < row_starts[-1]) & here_B[jnp.minimum(row, here_B.shape[0] - 1)]
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lengths_B, dtype=jnp.int32)])
    return LocalRows(
        order=jnp.argsort(~here_T, stable=True).astype(jnp.int32),
        row_starts=starts,
        kv_lens=jnp.where(here_B, kv_lens, 0),
        page_table=page_table - first_page,
    )
