"""What is known of a `paged_attention` before any row exists: the facts a choice depends on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Facts:
    """One layer's attention, as one device sees it.

    Attributes:
        query_heads: N.
        kv_heads: K in the pages, which may hold copies of a head.
        head_dim: H.
        page_size: token positions per page.
        dtype: of queries, new keys and values, and the result.
        kv_dtype: of the pages.
        scaled: whether the pages have scales.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    kv_dtype: str
    scaled: bool

    @classmethod
    def of(cls, q_TNH, pages, scales) -> "Facts":
        """The facts of arrays, or of shapes and dtypes, that the operation was given."""
        _, N, H = q_TNH.shape
        return cls(
            query_heads=N,
            kv_heads=pages.shape[2] // 2,
            head_dim=H,
            page_size=pages.shape[1],
            dtype=q_TNH.dtype.name,
            kv_dtype=pages.dtype.name,
            scaled=scales is not None,
        )
