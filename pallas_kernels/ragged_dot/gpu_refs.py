"""What the Hopper kernel works on: its arguments and buffers by name. Knows their shapes alone."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Refs:
    """What the kernel works on. I row tiles, E experts, P matrices per expert, N rows per tile.

    Attributes:
        expert, first, end: int32 [I]; until, start, behind: int32 [E]; see `gpu_items.Items`.
        x: [M, D].
        w: [E, P, D, F].
        scale: [E, P, D // 128, F // 128], or None.
        out: [M, F].
        x_ring: shared [stages, N, inner].
        w_ring: shared [stages, 2, inner, 64].
        tiles: shared [2, N, 64], results of each warpgroup on their way out.
        up: shared float32 [64, N], or None without SwiGLU.
        ready, free: barriers, one per stage.
        up_ready, up_free: barriers, or None.
    """

    expert: Any
    first: Any
    end: Any
    until: Any
    start: Any
    behind: Any
    x: Any
    w: Any
    scale: Any
    out: Any
    x_ring: Any
    w_ring: Any
    tiles: Any
    up: Any
    ready: Any
    free: Any
    up_ready: Any
    up_free: Any
