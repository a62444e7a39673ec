"""What the generate loop is told and what it remembers, as plain values.

Knows the fields and their shapes; computes nothing (`generation` does).
"""

import dataclasses

import jax
from flax import struct

from qwen_jax import sampling
from qwen_jax.model.cache import KVCache

RUNNING, STOP, LENGTH, FAILED = range(4)  # State.finish


@dataclasses.dataclass(frozen=True)
class Options:
    """What a generate program computes; static, so that it compiles nothing it does not need.

    Attributes:
        features: the sampling options in use by any row.
        new_tokens: the size of the output buffers: at least the tokens that a row may get before
            the caller empties them.
        logprobs: how many best tokens to report with each new token; None for no logprobs at all.
    """

    features: sampling.Features
    new_tokens: int
    logprobs: int | None = None


@struct.dataclass
class Rows:
    """What the loop is told of each row.

    Attributes:
        sampling: the sampling parameters, stop ids and seeds.
        max_tokens: int32 [B], how many tokens a row may generate; 0 for an unused row.
        rope_delta: int32 [B], rotary position minus context position (0 for text).
    """

    sampling: sampling.RowSampling
    max_tokens: jax.Array
    rope_delta: jax.Array


@struct.dataclass
class State:
    """Everything a generate loop remembers.

    Attributes:
        cache: keys and values.
        page_table: int32 [B, W].
        kv_lens: int32 [B], positions in the cache: all but the newest token.
        newest: int32 [B], each row's last token, which is not in the cache yet.
        tokens: int32 [B, new_tokens]; entry i of a row is its new token ``taken + i``, or says by a
            negative number (see `sampling.check_tokens`) why there is none.
        count: int32 [B], new tokens so far.
        taken: int32 [B], those of them that the caller has taken out of ``tokens``, and of
            ``logprobs``: by setting ``taken`` to ``count``, which empties both.
        finish: int32 [B], `RUNNING`, `STOP`, `LENGTH` or `FAILED`.
        counts: token counts for the penalties, or None.
        logprobs: of ``tokens``, with [B, new_tokens, …] leaves, or None.
    """

    cache: KVCache
    page_table: jax.Array
    kv_lens: jax.Array
    newest: jax.Array
    tokens: jax.Array
    count: jax.Array
    taken: jax.Array
    finish: jax.Array
    counts: sampling.Counts | None
    logprobs: sampling.Logprobs | None
