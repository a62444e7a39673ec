"""How prompts are cut into chunks for prefill. Knows lengths and token ids; knows no cache."""

from collections.abc import Sequence

import numpy as np


def plan_chunks(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """How many tokens of each prompt each chunk takes.

    The last chunk, and only that one, takes the last token of every prompt, so that its stream has
    all rows' next-token logits. A chunk has at most ``limit`` tokens, or one per row if that is
    more.

        lengths 7, 2, 3   limit 5      [5, 0, 0]  [1, 1, 2]  [1, 1, 1]
    """
    chunks, left = [], list(lengths)
    while sum(left) > max(limit, len(left)):
        room, takes = limit, []
        for n in left:
            takes.append(min(n - 1, room))
            room -= takes[-1]
        chunks.append(takes)
        left = [n - take for n, take in zip(left, takes, strict=True)]
    return [*chunks, left]


def targets(prompts: Sequence[Sequence[int]], cached: Sequence[int], takes, size: int):
    """int32 [size]: the prompt token after each token of a chunk, -1 where there is none.

    Args:
        prompts: token ids of each row.
        cached: tokens of each prompt that earlier chunks took.
        takes: tokens that this chunk takes.
        size: T of the chunk, padding included.
    """
    found = np.full(size, -1, np.int32)
    start = 0
    for prompt, past, take in zip(prompts, cached, takes, strict=True):
        following = prompt[past + 1 : past + take + 1]
        found[start : start + len(following)] = following
        start += take
    return found
