"""Which rows meet which expert, cut into tiles of rows: the list that a Hopper kernel walks.

Knows group sizes and the height of a tile; knows no weight and no column, so that both products of
a layer ask for the same list and XLA computes it once.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Items:
    """Tiles of rows, expert by expert; experts without rows have none.

    Attributes:
        expert_I: int32 [I], the tile's expert as an index in w; I is a bound, `until_E` says how
            many there are, and what stands behind them means nothing.
        first_I: int32 [I], its first row.
        end_I: int32 [I], the row behind its last.
        until_E: int32 [E], tiles of this held expert and of those before it.
        start_E, end_E: int32 [E], rows of each held expert. One's end is the next one's start.
    """

    expert_I: jax.Array
    first_I: jax.Array
    end_I: jax.Array
    until_E: jax.Array
    start_E: jax.Array
    end_E: jax.Array

    @classmethod
    def of(
        cls, group_sizes: jax.Array, first_expert: jax.Array, E: int, *, rows: int, M: int
    ) -> "Items":
        """The list for the experts ``first_expert .. first_expert + E - 1``.

        Args:
            group_sizes: int32 [R], rows of all experts, of which there are ``M`` at most.
            first_expert: int32 scalar.
            E: how many are held.
            rows: the height of a tile; the last one of an expert may be lower.
            M: bound on the rows of all.
        """
        # Compares of all with all instead of scans: a few hundred integers, one fusion each.
        index_E = jnp.arange(E, dtype=jnp.int32)
        every_R = jnp.arange(group_sizes.shape[0], dtype=jnp.int32)
        held_E = first_expert + index_E

        def total(chosen_ER, x_R):
            return jnp.sum(jnp.where(chosen_ER, x_R, 0), axis=1, dtype=jnp.int32)

        start_E = total(every_R < held_E[:, None], group_sizes)
        end_E = total(every_R <= held_E[:, None], group_sizes)
        tiles_E = -(-(end_E - start_E) // rows)
        until_E = total(index_E <= index_E[:, None], tiles_E)
        item_I = jnp.arange(min(E, M) + M // rows, dtype=jnp.int32)[:, None]
        own_IE = (item_I >= until_E - tiles_E) & (item_I < until_E)
        first_I = total(own_IE, start_E + (item_I - until_E + tiles_E) * rows)
        end_I = jnp.minimum(first_I + rows, total(own_IE, end_E))
        return cls(total(own_IE, index_E), first_I, end_I, until_E, start_E, end_E)
