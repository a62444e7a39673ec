import pytest

from qwen_jax.weights.json_keys import Keys


def keys(**raw):
    return Keys(raw, "here")


def test_null_counts_as_absent():
    assert keys(a=None).take("a", 3) == 3
    with pytest.raises(ValueError, match="here: the key 'a' is missing"):
        keys(a=None).take("a")


def test_a_missing_key_points_at_one_left_over_that_looks_like_it():
    with pytest.raises(ValueError, match="'num_hidden_layers' is missing, did you mean 'num_hiden"):
        keys(num_hiden_layers=3).take("num_hidden_layers")


def test_what_is_not_an_object_raises():
    with pytest.raises(ValueError, match=r"here: expected a JSON object, found \[1\]"):
        Keys([1], "here")


def test_either_spelling_is_taken_and_two_that_differ_raise():
    assert keys(new=4).take("new", also="old") == keys(old=4).take("new", also="old") == 4
    assert keys(new=4, old=4).take("new", also="old") == 4
    assert keys(new=0, old=None).take("new", also="old") == 0
    with pytest.raises(ValueError, match=r"differ: \{'new': 4, 'old': 5\}"):
        keys(new=4, old=5).take("new", also="old")


def test_same_takes_absence_for_the_first_allowed_value():
    keys().same("a", "x", "y")
    keys(a="y").same("a", "x", "y")
    with pytest.raises(ValueError, match="a='z' is not supported, only 'x' or 'y'"):
        keys(a="z").same("a", "x", "y")


@pytest.mark.parametrize("value", ["true", 1, 0, [True]])
def test_a_flag_is_true_or_false_and_nothing_like_it(value):
    assert keys(a=True).flag("a") is True
    assert keys().flag("a", False) is False
    with pytest.raises(ValueError, match=r"here: a=.* is not true or false"):
        keys(a=value).flag("a")


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "1", True])
def test_a_number_is_positive_and_finite(value):
    assert keys(a=2).number("a") == 2.0
    with pytest.raises(ValueError, match=r"here: a=.* is not a positive number"):
        keys(a=value).number("a")


def test_an_optional_number_is_checked_when_it_is_there():
    assert keys().number_or_none("a") is None
    assert keys(a=1.5).number_or_none("a") == 1.5
    with pytest.raises(ValueError, match="a=-1 is not"):
        keys(a=-1).number_or_none("a")


@pytest.mark.parametrize("value", [0, 1.0, True, "1"])
def test_an_integer_is_no_float_no_flag_and_not_too_small(value):
    assert keys(a=7).integer("a") == 7
    with pytest.raises(ValueError, match=r"here: a=.* is not an integer of 1 or more"):
        keys(a=value).integer("a")


def test_one_integer_is_a_list_of_one():
    assert keys(a=[3, 0]).integers("a") == (3, 0)
    assert keys(a=3).integers("a") == (3,)
    assert keys().integers("a", ()) == ()
    with pytest.raises(ValueError, match="a='x' is not an integer"):
        keys(a=[3, "x"]).integers("a")


def test_finish_lists_every_unknown_key_that_says_something():
    left = keys(norm_topk_prop=True, none=None, no=False, zero=0, empty=[], _mine=1, known=1, fun=2)
    left.take("norm_topk_prob", False)
    with pytest.raises(ValueError) as error:
        left.finish(frozenset({"known"}))
    message = str(error.value)
    assert "'norm_topk_prop' (= True), did you mean 'norm_topk_prob'?" in message
    assert "'fun' (= 2)" in message
    for quiet in ("'none'", "'no'", "'zero'", "'empty'", "_mine", "'known'"):
        assert quiet not in message


def test_a_key_that_was_taken_is_not_left_over():
    left = keys(a=1, b=2)
    left.take("a")
    assert left.items() == [("b", 2)]
    left.take("b")
    left.finish()
