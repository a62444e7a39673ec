"""Three-axis positions: pictures take space, text goes on behind them, decoding too."""

import pathlib

import numpy as np
import pytest
import vision_samples as samples
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.prompt.mrope import Span, feature_rows, mrope_positions, window

GOLDEN = pathlib.Path(__file__).parent / "golden" / "vision.npz"


def spans(mix: samples.Mix) -> list[Span]:
    """Where the pictures of a mix stand, found from its grids."""
    grids = {1: [], 2: []}
    for grid in mix.images:
        grids[1].append(grid)
    for slices, rows, columns in mix.videos:
        grids[2] += [(1, rows, columns)] * slices
    found = []
    position = 0
    while position < len(mix.ids):
        kind = mix.kinds[position]
        if kind:
            _, rows, columns = grids[kind].pop(0)
            found.append(Span(position, rows // 2, columns // 2, len(found)))
            position = found[-1].stop
        else:
            position += 1
    return found


def walked(length: int, spans: list[Span]) -> tuple[np.ndarray, int]:
    """The definition, token by token."""
    where = {}
    for span in spans:
        for i in range(span.stop - span.start):
            where[span.start + i] = (span, divmod(i, span.columns))
    positions, free, index = [], 0, 0
    while index < length:
        if index not in where:
            positions.append((free, free, free))
            free, index = free + 1, index + 1
            continue
        span = where[index][0]
        for i in range(span.start, span.stop):
            row, column = where[i][1]
            positions.append((free, free + row, free + column))
        free += max(span.rows, span.columns)
        index = span.stop
    highest = max(max(p) for p in positions)
    return np.array(positions).T, highest + 1 - length


@pytest.mark.parametrize("name", samples.MIXES)
def test_positions_and_delta_are_those_of_transformers(name):
    mix = samples.mix(samples.MIXES[name])
    with np.load(GOLDEN) as golden:
        expected = golden[f"mrope/{name}"]
    positions, delta = mrope_positions(len(mix.ids), spans(mix))
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(positions, expected[:-1].reshape(3, -1))
    assert delta == expected[-1]


def test_the_drawing_of_the_module_is_true():
    positions, delta = mrope_positions(10, [Span(2, 2, 3, 0)])
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6]
    assert positions[1].tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6]
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    assert delta == -3


@st.composite
def layouts(draw) -> tuple[int, list[Span]]:
    position, found = draw(st.integers(0, 4)), []
    for index in range(draw(st.integers(0, 5))):
        span = Span(position, draw(st.integers(1, 6)), draw(st.integers(1, 6)), index)
        found.append(span)
        position = span.stop + draw(st.integers(0, 5))
    return max(position, 1), found


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_any_mix_is_walked_token_by_token(layout):
    length, found = layout
    positions, delta = mrope_positions(length, found)
    expected, expected_delta = walked(length, found)
    np.testing.assert_array_equal(positions, expected)
    assert delta == expected_delta


@settings(max_examples=100, deadline=None)
@given(layouts(), st.integers(0, 30), st.integers(0, 30))
def test_a_window_is_a_piece_of_the_whole(layout, start, more):
    length, found = layout
    positions, delta = mrope_positions(length, found)
    behind = np.broadcast_to(np.arange(length, length + 100) + delta, (3, 100))
    whole = np.concatenate([positions, behind], axis=1)
    piece = window(positions, delta, start, start + more)
    np.testing.assert_array_equal(piece, whole[:, start : start + more])
    assert piece.dtype == np.int32


@settings(max_examples=100, deadline=None)
@given(layouts(), st.integers(1, 7))
def test_chunks_take_every_feature_row_once_and_in_order(layout, chunk):
    length, found = layout
    total = sum(span.stop - span.start for span in found)
    pieces = [feature_rows(found, i, min(i + chunk, length)) for i in range(0, length, chunk)]
    rows = np.concatenate(pieces)
    assert rows[rows >= 0].tolist() == list(range(total))
    for span in found:
        assert (rows[span.start : span.stop] >= 0).all()
    assert (feature_rows(found, length, length + 3) == -1).all()  # nothing while decoding


def test_text_alone_counts_up_and_has_no_delta():
    positions, delta = mrope_positions(5, [])
    np.testing.assert_array_equal(positions, np.broadcast_to(np.arange(5), (3, 5)))
    assert delta == 0
    assert mrope_positions(0, [])[1] == 0
