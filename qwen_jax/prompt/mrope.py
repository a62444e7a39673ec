"""Three-axis positions (time, row, column) of the tokens of a prompt with pictures: M-RoPE.

Knows where pictures stand among the tokens and their grids. Does not know pixels or token ids.

    tokens     a  b  [----- picture, 2 x 3 tokens -----]  c  d
    time       0  1   2     2     2     2     2     2     5  6
    row        0  1   2     2     2     3     3     3     5  6
    column     0  1   2     3     4     2     3     4     5  6
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of placeholder tokens: one picture, or one slice in time of a video.

    Attributes:
        start: of its first token in the prompt.
        rows, columns: of tokens (merged patches).
        picture: which of the prompt's pictures and videos.
        slice: which slice in time of it.
    """

    start: int
    rows: int
    columns: int
    picture: int
    slice: int = 0

    @property
    def stop(self) -> int:
        """Behind its last token."""
        return self.start + self.rows * self.columns


def mrope_positions(length: int, spans: Sequence[Span]) -> tuple[np.ndarray, int]:
    """Positions of a whole prompt, and how far the tokens after it are moved.

    A text token stands at the next free position on all axes. A picture's tokens share the next
    free one in time, and count rows and columns from it; it takes as many positions as its longer
    side has tokens. Source: transformers Qwen3VLModel.get_rope_index.

    Args:
        length: T, tokens of the prompt.
        spans: in the prompt's order, without overlap.

    Returns:
        int32 [3, T], and ``delta``: the token at index i behind the prompt stands at ``i + delta``
        on all axes.
    """
    positions = np.zeros((3, length), np.int32)
    done, free = 0, 0
    for span in spans:
        assert done <= span.start <= span.stop <= length
        text = span.start - done
        positions[:, done : span.start] = free + np.arange(text)
        free += text
        row, column = np.divmod(np.arange(span.stop - span.start), span.columns)
        positions[:, span.start : span.stop] = free
        positions[1, span.start : span.stop] += row.astype(np.int32)
        positions[2, span.start : span.stop] += column.astype(np.int32)
        free += max(span.rows, span.columns)
        done = span.stop
    positions[:, done:] = free + np.arange(length - done)
    delta = int(positions.max()) + 1 - length if length else 0
    return positions, delta


def window(positions: np.ndarray, delta: int, start: int, stop: int) -> np.ndarray:
    """Positions of the tokens ``start:stop`` of a prompt and what was generated after it.

    Args:
        positions: int32 [3, T] of the prompt.
        delta: of the prompt.
        start, stop: indices into prompt and generated tokens together.

    Returns:
        int32 [3, stop - start].
    """
    length = positions.shape[1]
    after = np.arange(max(start, length), max(stop, length), dtype=np.int32) + np.int32(delta)
    return np.concatenate(
        [positions[:, start:stop], np.broadcast_to(after, (3, len(after)))], axis=1
    )


def feature_rows(spans: Sequence[Span], start: int, stop: int) -> np.ndarray:
    """Which row of the prompt's visual features each token ``start:stop`` takes, -1 for text.

    The features of the prompt's pictures lie one behind the other in the order of the prompt, so
    the n-th placeholder token takes row n, in whatever chunks the prompt is worked on.

    Returns:
        int32 [stop - start].
    """
    rows = np.full(stop - start, -1, np.int32)
    row = 0
    for span in spans:
        first, last = max(span.start, start), min(span.stop, stop)
        if first < last:
            begin = row + first - span.start
            rows[first - start : last - start] = np.arange(begin, begin + last - first)
        row += span.stop - span.start
    return rows
