"""What is known of a `segment_attention` before any picture exists: the facts of a choice."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Facts:
    """One block's attention, as one device sees it: heads N, head dimension H, dtype of q, k, v."""

    heads: int
    head_dim: int
    dtype: str
