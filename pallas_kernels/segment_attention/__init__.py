"""Bidirectional attention inside segments of a flat sequence: pictures side by side in one batch.

Knows segments; knows no page, layer, rotary embedding or mesh. Implementations: `xla`, `tpu`,
`gpu`. This module checks what they all rely on.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.device import Device
from pallas_kernels.segment_attention import gpu, tpu, xla
from pallas_kernels.segment_attention.facts import Facts as Facts

registry.register(tpu.IMPL)
registry.register(gpu.IMPL)
registry.register(xla.IMPL)


def segment_attention(
    q_UNH: jax.Array,
    k_UNH: jax.Array,
    v_UNH: jax.Array,
    *,
    segment_starts: jax.Array,
    sm_scale: float,
    impl: str = "xla",
) -> jax.Array:
    """Softmax attention of every element to all elements of its own segment, and to no other.

    Args:
        q_UNH, k_UNH, v_UNH: float [U, N, H].
        segment_starts: int32 [segments + 1], non-decreasing, from 0; segment s owns
            ``segment_starts[s]:segment_starts[s + 1]`` (it may be empty), and elements from the
            last start on are padding, which may hold anything and comes out exactly 0.
        sm_scale: multiplies the scores.
        impl: the implementation's name, as `registry.choose` gave it.

    Returns:
        [U, N, H] in q's dtype. No [U, U] array ever exists.

    Raises:
        ValueError: shapes do not fit together, or the implementation cannot run this on the device
            that the mesh names (`Device.current`).
    """
    if q_UNH.ndim != 3 or k_UNH.shape != q_UNH.shape or v_UNH.shape != q_UNH.shape:
        raise ValueError(
            f"segment_attention: q {q_UNH.shape}, k {k_UNH.shape}, v {v_UNH.shape}; "
            "all three are [U, N, H]"
        )
    if segment_starts.ndim != 1 or segment_starts.shape[0] < 2:
        raise ValueError(
            f"segment_attention: segment_starts {segment_starts.shape}; needs [segments + 1]"
        )
    _, N, H = q_UNH.shape
    facts = Facts(N, H, q_UNH.dtype.name)
    fn = registry.runnable("segment_attention", impl, Device.current(), [facts])
    return fn(q_UNH, k_UNH, v_UNH, segment_starts.astype(jnp.int32), sm_scale)
