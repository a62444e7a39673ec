import itertools

import numpy as np
import pytest

from qwen_jax import dims

SIZES = {"N": 3, "H": 4, "D": 5, "P": 2, "F": 6, "E": 2}


def test_parse_gives_the_letters_in_order():
    assert dims.parse("E D P F") == ("E", "D", "P", "F")
    assert dims.parse("") == ()


def test_a_letter_outside_the_glossary_raises_and_is_named():
    with pytest.raises(ValueError, match=r"dims 'D d'.*\['d'\].*known"):
        dims.parse("D d")


def test_a_letter_that_stands_twice_raises():
    with pytest.raises(ValueError, match="'D N D': a letter stands twice"):
        dims.parse("D N D")


def test_groups_keep_fused_axes_together():
    assert dims.groups("(N H) D") == (("N", "H"), ("D",))
    assert dims.groups("D (N H)") == (("D",), ("N", "H"))
    assert dims.groups("E D (P F)") == (("E",), ("D",), ("P", "F"))


@pytest.mark.parametrize(
    ("layout", "why"),
    [("(N H) N", "twice"), ("() D", "without a letter"), ("(N H", "not in the glossary")],
)
def test_a_malformed_layout_raises(layout, why):
    with pytest.raises(ValueError, match=why):
        dims.groups(layout)


def test_shape_multiplies_fused_letters():
    assert dims.shape("(N H) D", SIZES) == (12, 5)
    assert dims.shape("E D P F", SIZES) == (2, 5, 2, 6)


@pytest.mark.parametrize("layout", ["(N H) D", "D (N H)", "(H N) D", "N D H"])
def test_rearrange_puts_every_element_where_its_letters_say(layout):
    order = [x for axis in dims.groups(layout) for x in axis]
    x = np.arange(60).reshape(dims.shape(layout, SIZES))
    y = dims.rearrange(x, layout, "D N H", SIZES)
    assert y.shape == (5, 3, 4)
    for d, n, h in itertools.product(range(5), range(3), range(4)):
        flat = 0
        for letter in order:
            flat = flat * SIZES[letter] + {"D": d, "N": n, "H": h}[letter]
        assert y[d, n, h] == flat


def test_rearrange_copies_nothing_where_a_view_will_do():
    x = np.arange(60).reshape(12, 5)
    assert np.shares_memory(x, dims.rearrange(x, "(N H) D", "D N H", SIZES))


def test_rearrange_of_another_shape_names_both():
    with pytest.raises(ValueError, match=r"shape \(5, 12\) is not '\(N H\) D' = \(12, 5\)"):
        dims.rearrange(np.zeros((5, 12)), "(N H) D", "D N H", SIZES)


def test_rearrange_between_different_letters_raises():
    with pytest.raises(ValueError, match="do not name the same letters"):
        dims.rearrange(np.zeros((12, 5)), "(N H) D", "D N", SIZES)


def test_every_letter_of_the_glossary_is_one_character_with_a_meaning():
    assert all(len(x) == 1 and x.isupper() and meaning for x, meaning in dims.GLOSSARY.items())
