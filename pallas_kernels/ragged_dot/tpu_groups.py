"""Which experts have rows, and which rows: the list that a TPU kernel walks.

Knows group sizes; knows no tile size and no weight, so that both products of a layer ask for the
same list and XLA computes it once. Layers cannot share it: each has a router of its own.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Groups:
    """The experts held here that have rows, in order; entries behind ``count`` mean nothing.

    Attributes:
        count: int32 [1], how many.
        expert_E: int32 [E], their index in w.
        start_E, end_E: int32 [E], their rows. One group's end is the next one's start.
    """

    count: jax.Array
    expert_E: jax.Array
    start_E: jax.Array
    end_E: jax.Array

    @classmethod
    def of(cls, group_sizes: jax.Array, first_expert: jax.Array, E: int) -> "Groups":
        """The list for the experts ``first_expert .. first_expert + E - 1``.

        Args:
            group_sizes: int32 [R], rows of all experts.
            first_expert: int32 scalar.
            E: how many are held.
        """
        held_E = first_expert + jnp.arange(E, dtype=jnp.int32)
        every_R = jnp.arange(group_sizes.shape[0], dtype=jnp.int32)
        before_ER = every_R < held_E[:, None]
        start_E = jnp.sum(jnp.where(before_ER, group_sizes, 0), axis=1, dtype=jnp.int32)
        own_ER = every_R == held_E[:, None]
        size_E = jnp.sum(jnp.where(own_ER, group_sizes, 0), axis=1, dtype=jnp.int32)
        # Compares of all with all instead of a sort: a few hundred integers, one fusion each.
        index_E = jnp.arange(E, dtype=jnp.int32)
        active_E = size_E > 0
        place_E = jnp.sum(active_E & (index_E < index_E[:, None]), axis=1, dtype=jnp.int32)
        here_EE = active_E & (place_E == index_E[:, None])

        def compact(x_E):
            return jnp.sum(jnp.where(here_EE, x_E, 0), axis=1, dtype=jnp.int32)

        return cls(
            count=jnp.sum(active_E, dtype=jnp.int32)[None],
            expert_E=compact(index_E),
            start_E=compact(start_E),
            end_E=compact(start_E + size_E),
        )
