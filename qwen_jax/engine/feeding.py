"""Steps as arrays: what the host knows of rows, flat and padded to a declared shape.

Knows parts, shapes and token ids; runs nothing.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qwen_jax.engine.pictures import positions_of
from qwen_jax.engine.programs import Feed, Seats
from qwen_jax.engine.scheduler import Part
from qwen_jax.runtime import Buckets


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes that programs are compiled for.

    Attributes:
        ragged: (T, B) of forward passes with rows of any length: B < T, which tells attention so.
        rows: B of everything else, and T with it where all rows decode; the last one is the number
            of slots.
        width: W, pages of a row's table.
    """

    ragged: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    width: int

    @classmethod
    def make(cls, buckets: Buckets, *, max_rows: int, max_tokens: int, width: int) -> "Shapes":
        """Those that ``max_rows`` rows and chunks of ``max_tokens`` tokens can need.

        Raises:
            ValueError: no bucket holds so many tokens, or one of every row.
        """
        slots = buckets.pick("rows", max_rows)
        rows = tuple(b for b in buckets.rows if b <= slots)
        largest = buckets.pick("tokens", max(max_tokens, slots + 1))
        ragged = []
        for size in buckets.tokens:
            below = [b for b in rows if b < size]
            if below and size <= largest:
                ragged.append((size, below[-1]))
        return cls(tuple(ragged), rows, width)

    def for_rows(self, count: int) -> int:
        """The smallest B that holds ``count`` rows."""
        return next(b for b in self.rows if b >= count)

    def for_step(self, parts: Sequence[Part]) -> tuple[int, int]:
        """T and B of a forward pass."""
        if not any(part.known for part in parts):
            size = self.for_rows(len(parts))
            return size, size
        tokens = sum(part.take for part in parts)
        return next((t, b) for t, b in self.ragged if t >= tokens and b >= len(parts))


def feed(parts: Sequence[Part], size: tuple[int, int], shapes: Shapes) -> Feed:
    """The forward pass of a ragged step."""
    (tokens, rows), slots = size, shapes.rows[-1]
    arrays: dict[str, Any] = {
        "tokens": np.zeros(tokens, np.int32),
        "positions": np.zeros((3, tokens), np.int32),
        "row_starts": np.zeros(rows + 1, np.int32),
        "kv_lens": np.zeros(rows, np.int32),
        "page_table": page_table(parts, rows, shapes.width),
        "slots": np.full(rows, -1, np.int32),
        "rope_delta": np.zeros(rows, np.int32),
        "ends": np.zeros(slots, np.int32),
    }
    start = chosen = 0
    for b, part in enumerate(parts):
        stop, vision = start + part.take, part.row.sequence.job.vision
        if part.known:
            window = (part.start, part.start + part.take)
            arrays["tokens"][start:stop] = part.row.tokens[slice(*window)]
            arrays["positions"][:, start:stop] = positions_of(vision, window)
            arrays["kv_lens"][b] = window[1]
        else:
            arrays["slots"][b] = part.row.slot
            arrays["rope_delta"][b] = vision.delta if vision else 0
        if part.chooses:
            arrays["ends"][chosen] = stop - 1
            chosen += 1
        arrays["row_starts"][b + 1 :] = start = stop
    return Feed(**arrays)


def seats(choosers: Sequence[Part], size: int, slots: int) -> Seats:
    """Who chooses, in the order of ``ends``, but for those who do not any more.

    slots: how many there are, which marks an unused row.
    """
    at: Any = np.full(size, slots, np.int32)
    kv_lens: Any = np.full(size, -1, np.int32)
    count: Any = np.full(size, -1, np.int32)
    for b, part in enumerate(choosers):
        if not part.chooses:
            continue
        at[b] = part.row.slot
        if part.known:
            kv_lens[b] = part.start + part.take
            count[b] = len(part.row.sequence.token_ids)
    return Seats(at, kv_lens, count)


def prompt_logprobs_asked(parts: Sequence[Part]) -> Iterator[int]:
    """How many logprobs of their prompts' tokens rows of this step ask for."""
    for part in parts:
        asked = part.row.sequence.job.params.prompt_logprobs
        if part.known and part.row.wants_prompt_logprobs and asked is not None:
            yield asked


def targets(parts: Sequence[Part], size: int) -> np.ndarray:
    """int32 [size]: the prompt token after each token, -1 where none is asked for."""
    found = np.full(size, -1, np.int32)
    start = 0
    for part in parts:
        if part.known and part.row.wants_prompt_logprobs:
            first = part.start + 1
            following = part.row.sequence.job.prompt[first : first + part.take]
            found[start : start + len(following)] = following
        start += part.take
    return found


def page_table(parts: Sequence[Part], rows: int, width: int) -> np.ndarray:
    """int32 [rows, width]."""
    table = np.zeros((rows, width), np.int32)
    for b, part in enumerate(parts):
        table[b, : len(part.row.pages)] = part.row.pages
    return table
