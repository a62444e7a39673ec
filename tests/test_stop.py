"""Stop strings: what is shown, what is held back, whatever pieces the text comes in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.prompt.stop import StopStrings

LETTERS = st.text(alphabet="ab<", max_size=12)
STOPS = st.lists(st.text(alphabet="ab<", min_size=1, max_size=4), max_size=3)


def first_match(text: str, strings) -> tuple[int, str] | None:
    """Where the first match ends (the text is read letter by letter), and the longest one there."""
    for end in range(1, len(text) + 1):
        found = [s for s in strings if text[:end].endswith(s)]
        if found:
            return end, max(found, key=len)
    return None


@given(text=LETTERS, strings=STOPS, include=st.booleans())
def test_letter_by_letter_the_first_string_to_be_complete_ends_the_text(text, strings, include):
    stop = StopStrings(strings, include=include)
    shown = "".join(map(stop.push, text)) + ("" if stop.matched else stop.finish())
    match = first_match(text, strings)
    if match is None:
        assert (shown, stop.matched) == (text, None)
    else:
        end, which = match
        assert stop.matched == which
        assert shown == text[: end if include else end - len(which)]


@given(
    pieces=st.lists(LETTERS, max_size=6),
    stop=st.text(alphabet="ab<", min_size=1, max_size=4),
    include=st.booleans(),
)
def test_any_pieces_of_a_text_show_the_same(pieces, stop, include):
    def run(parts):
        it = StopStrings([stop], include=include)
        shown = "".join(map(it.push, parts))
        return shown + ("" if it.matched else it.finish()), it.matched

    assert run(pieces) == run(["".join(pieces)])


@given(text=LETTERS, stop=st.text(alphabet="ab<", min_size=2, max_size=4))
def test_nothing_is_shown_that_a_stop_string_may_take_back(text, stop):
    it = StopStrings([stop])
    shown = ""
    for i, letter in enumerate(text):
        shown += it.push(letter)
        if it.matched:
            break
        held = text[len(shown) : i + 1]
        assert stop.startswith(held)
        assert len(held) < len(stop)


def test_of_several_in_one_piece_the_one_that_begins_first_counts():
    stop = StopStrings(["two", "one", "on"])
    assert stop.push("zero one two") == "zero "
    assert stop.matched == "one"  # the longer of two that begin together
    assert stop.push("more") == ""


def test_without_strings_nothing_is_held():
    stop = StopStrings([])
    assert stop.push("<|") == "<|"
    assert stop.finish() == ""


@pytest.mark.parametrize("include", [False, True])
def test_a_string_before_its_time_is_text(include):
    stop = StopStrings(["end"], include=include)
    assert stop.push("the end, the e", stops=False) == "the end, the "
    assert stop.matched is None
    assert stop.push("nd.") == ("end" if include else "")  # begun before, complete after
    assert stop.matched == "end"
