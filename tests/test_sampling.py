"""Which tokens survive and with what probability, in vLLM's order; and what cannot be sampled."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_oracle import Row, arguments, distribution

from qwen_jax.sampling import (
    NO_TOKEN_LEFT,
    NOT_FINITE,
    Features,
    RowSettings,
    check_tokens,
    probabilities,
    sample,
)

SAMPLE = jax.jit(sample, static_argnames=("num_logprobs", "features"))
PROBABILITIES = jax.jit(probabilities, static_argnames="features")

V = 24


def grid(seed: int, size: int = V) -> np.ndarray:
    """Zero-mean logits in steps of 1/4: many ties, and exact arithmetic with the settings below."""
    return np.round(np.random.default_rng(seed).normal(size=size) * 8) / 4


def tokens(batch: list[Row], **changes) -> list[int]:
    found = SAMPLE(**(arguments(batch) | {"num_logprobs": None} | changes))
    return np.asarray(found.tokens).tolist()


# ---- the surviving set and its probabilities -----------------------------------------------------

OPTIONS = {
    "temperature": RowSettings(temperature=0.5),
    "greedy": RowSettings(temperature=0.0, top_k=3, top_p=0.5, min_p=0.2),
    "top_k": RowSettings(top_k=5),
    "top_p": RowSettings(top_p=0.83),
    "min_p": RowSettings(min_p=0.03),
    "repetition": RowSettings(repetition=2.0),
    "presence": RowSettings(presence=1.5),
    "frequency": RowSettings(frequency=-0.75),
    "bias": RowSettings(bias={2: 3.0, 23: -2.5}),
    "allowed": RowSettings(allowed=range(0, V, 3)),
    "min_tokens": RowSettings(min_tokens=5, stop_ids=(0, 1, 2, 3, 4, 5)),
    "qwen": RowSettings(temperature=0.7, top_k=20, top_p=0.8, repetition=1.25),
    "all": RowSettings(
        temperature=0.8, top_k=6, top_p=0.9, min_p=0.01, repetition=0.5, presence=0.5,
        frequency=0.25, bias={4: 2.0, 7: -1.0}, allowed=range(1, V), stop_ids=(7, 9), min_tokens=9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_keeps_the_right_tokens_with_the_right_probabilities(option):
    batch = [
        Row(grid(seed), OPTIONS[option], prompt=(1, 2, 2, 8), output=(3, 8, 3, 11))
        for seed in range(6)
    ]
    found = np.asarray(PROBABILITIES(**arguments(batch)))
    for row, p in zip(batch, found, strict=True):
        wanted, margin = distribution(row)
        assert margin > 1e-5
        np.testing.assert_array_equal(p > 0, wanted > 0)
        np.testing.assert_allclose(p, wanted, rtol=3e-6)


quarters = st.integers(-24, 24).map(lambda n: n / 4)
token_ids = st.integers(0, V - 1)
row_settings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 0.7, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, V - 1, V, V + 1, 1000]),
        "top_p": st.one_of(st.just(1.0), st.floats(1e-9, 0.9999)),
        "min_p": st.one_of(st.just(0.0), st.floats(0, 1)),
        "repetition": st.sampled_from([0.5, 1.0, 1.25, 2.0]),
        "presence": st.integers(-8, 8).map(lambda n: n / 4),
        "frequency": st.integers(-8, 8).map(lambda n: n / 4),
        "bias": st.dictionaries(token_ids, quarters, max_size=4),
        "allowed": st.one_of(st.none(), st.sets(token_ids, min_size=3)),
        "stop_ids": st.sets(token_ids, max_size=2),
        "min_tokens": st.integers(0, 4),
    }
)
any_row = st.builds(
    Row,
    st.lists(quarters, min_size=V, max_size=V).map(np.array),
    row_settings.map(lambda d: RowSettings(**d)),
    st.lists(token_ids, max_size=6).map(tuple),
    st.lists(token_ids, max_size=6).map(tuple),
)
# One more row keeps the shapes, and with them the compiled program, the same for every example.
WIDEST = Row(
    grid(0),
    RowSettings(bias=dict.fromkeys(range(4), 0.0), stop_ids=(0, 1), allowed=range(V)),
    output=tuple(range(12)),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(any_row, min_size=3, max_size=3))
def test_any_combination_keeps_the_right_tokens_with_the_right_probabilities(batch):
    found = PROBABILITIES(**(arguments([*batch, WIDEST]) | {"features": Features()}))
    for row, p in zip(batch, np.asarray(found), strict=False):
        wanted, margin = distribution(row)
        if margin > 1e-5:  # else the arithmetic decides which side of a cutoff a token is on
            np.testing.assert_array_equal(p > 0, wanted > 1e-38)
            np.testing.assert_allclose(p, wanted, rtol=1e-5, atol=1e-38)


def test_the_order_of_steps_is_that_of_vllm():
    """Each row comes out differently if two neighbouring steps change places."""
    x = np.array([2.0, 1.0, 0.0, -1.0, -9.0])
    for settings_, output in (
        (RowSettings(allowed=[1, 2], bias={0: 50.0}), ()),  # bias cannot bring a token back
        (RowSettings(bias={1: 4.0}, repetition=2.0), (1,)),  # (1 + 4) / 2, not 1 / 2 + 4
        (RowSettings(repetition=2.0, frequency=1.0), (0, 0)),  # 2 / 2 - 2, not (2 - 2) / 2
        (RowSettings(temperature=0.5, min_p=0.2), ()),  # relative after the temperature
        (RowSettings(temperature=2.0, top_p=0.7), ()),  # the nucleus of the flattened softmax
        (RowSettings(top_k=2, top_p=0.7), ()),  # the nucleus of the renormalised two
        (RowSettings(min_p=0.3, top_p=0.7), ()),
    ):
        row = Row(x, settings_, output=output)
        wanted, margin = distribution(row)
        assert margin > 1e-3
        found = np.asarray(PROBABILITIES(**arguments([row])))[0]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_ties_at_the_cutoff_are_kept():
    x = np.array([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    for settings_ in (RowSettings(top_k=2), RowSettings(top_p=0.5), RowSettings(min_p=0.3)):
        found = np.asarray(PROBABILITIES(**arguments([Row(x, settings_)])))[0]
        np.testing.assert_array_equal(found > 0, [False, True, True, True, True, False])


def test_cutoffs_fall_exactly_where_they_should():
    x = np.array([1.0, 0.0, -1.0])  # probabilities 0.6652, 0.2447, 0.0900; ratios e**-1, e**-2
    for kept, settings_ in (
        (2, RowSettings(min_p=0.3678)),
        (1, RowSettings(min_p=0.3679)),
        (3, RowSettings(min_p=0.1353)),
        (2, RowSettings(min_p=0.1354)),
        (1, RowSettings(top_p=0.6652)),
        (2, RowSettings(top_p=0.6653)),
        (2, RowSettings(top_p=0.9099)),
        (3, RowSettings(top_p=0.9100)),
        (1, RowSettings(top_p=0.7310, top_k=2)),
        (2, RowSettings(top_p=0.7311, top_k=2)),
    ):
        found = np.asarray(PROBABILITIES(**arguments([Row(x, settings_)])))
        assert np.count_nonzero(found) == kept, settings_


@pytest.mark.parametrize("top_p", [1e-30, 1e-45, 1e-300])
def test_a_tiny_top_p_keeps_the_best_token(top_p):
    batch = [Row(grid(seed) + np.arange(V) / 64, RowSettings(top_p=top_p)) for seed in range(4)]
    assert tokens(batch) == [int(row.logits.argmax()) for row in batch]


def test_a_top_k_of_the_vocabulary_or_more_keeps_all():
    for top_k in (V, V + 1, 2**31 - 1):
        found = PROBABILITIES(**arguments([Row(grid(1), RowSettings(top_k=top_k))]))
        assert np.all(np.asarray(found) > 0)


def test_masked_logits_are_never_kept():
    x = grid(1)
    x[[3, 5, 8]] = -np.inf
    found = np.asarray(PROBABILITIES(**arguments([Row(x, RowSettings(top_k=23, top_p=0.999))])))
    np.testing.assert_array_equal(found[0, [3, 5, 8]], 0)
    assert np.isclose(found.sum(), 1)


# ---- greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 9.9e-6])
def test_greedy_rows_of_a_mixed_batch_take_the_first_best_token(temperature):
    logits = [grid(seed) + 100 for seed in range(30)]  # steps of 1/4: the best one often ties
    assert any((x == x.max()).sum() > 1 for x in logits)
    greedy = [Row(x, RowSettings(temperature=temperature, top_p=0.9, seed=7)) for x in logits]
    mixed = [*greedy, Row(grid(0), RowSettings(temperature=2.0, top_p=0.9))]
    wanted = [int(x.argmax()) for x in logits]
    assert tokens(greedy) == wanted
    assert tokens(mixed)[:-1] == wanted


def test_greedy_sees_differences_that_vanish_beside_the_logits():
    x = np.full(V, 1e-30, np.float32)
    x[7] = 2e-30
    x[0] = -1e6
    batch = [Row(x, RowSettings(temperature=0.0)), Row(x, RowSettings())]
    assert tokens(batch)[0] == 7


def test_greedy_follows_bias_penalties_and_masks():
    x = np.array([1.0, 3.0, 2.0])
    greedy = RowSettings(temperature=0.0)
    for changes, wanted in (
        ({}, 1),
        ({"bias": {0: 2.5}}, 0),
        ({"allowed": [0, 2]}, 2),
        ({"stop_ids": (1,), "min_tokens": 2}, 2),
        ({"stop_ids": (1,), "min_tokens": 1}, 1),
        ({"frequency": 1.5}, 2),
        ({"repetition": 4.0}, 2),
    ):
        row = Row(x, dataclasses.replace(greedy, **changes), output=(1,))
        assert tokens([row]) == [wanted], changes


# ---- rows that cannot be sampled -----------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [V, 6000])
def test_bad_logits_give_a_flag_and_leave_other_rows_alone(temperature, size):
    s = RowSettings(temperature=temperature, top_k=5, seed=3)
    good = [Row(grid(seed, size), s) for seed in range(3)]
    bad = []
    for place, value in ((0, np.nan), (size - 1, np.nan), (size // 2, np.inf), (..., -np.inf)):
        x = grid(9, size)
        x[place] = value
        bad.append(Row(x, s))
    masked = Row(bad[1].logits, dataclasses.replace(s, allowed=[1, 2, 3]))
    found = tokens([good[0], bad[0], good[1], *bad[1:], masked, good[2]])
    assert found[1:2] + found[3:7] == [NOT_FINITE] * 5
    allowing = dataclasses.replace(s, allowed=range(size))
    assert [found[0], found[2], found[7]] == tokens([Row(r.logits, allowing) for r in good])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_settings_forbid_everything_is_flagged(temperature):
    x = grid(0)
    x[4:] = -np.inf
    s = RowSettings(temperature=temperature, stop_ids=range(4), min_tokens=3)
    assert tokens([Row(x, s), Row(x, s, output=(1, 1, 1))])[0] == NO_TOKEN_LEFT
    assert tokens([Row(x, s, output=(1, 1, 1))])[0] in range(4)
    p = PROBABILITIES(**arguments([Row(x, s)]))
    assert np.isnan(np.asarray(p)).all()


def test_check_tokens_names_every_failed_row():
    check_tokens(np.array([5, 0]), ["a", "b"])
    message = "for b: its logits hold NaN or infinity; c: what it may choose from .* leave no token"
    with pytest.raises(ValueError, match=message):
        check_tokens(np.array([5, NOT_FINITE, NO_TOKEN_LEFT]), ["a", "b", "c"])


# ---- what does not fit is refused at trace time --------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"logits_BV": a["logits_BV"].astype(np.float16)}, "float32 .* got float16"),
        (lambda a: {"logits_BV": a["logits_BV"][0]}, r"logits must be float32 \[B, V\]"),
        (lambda a: {"position": a["position"][:1]}, r"position has shape \(1,\), logits \(2, 24\)"),
        (lambda a: {"logits_BV": a["logits_BV"][:1]}, r"rows has shape \(2,\)"),
        (lambda a: {"counts": None}, "features.penalties needs counts"),
        (lambda a: {"counts": jax.tree.map(lambda x: x[:, :9], a["counts"])}, "counts has shape"),
        (lambda a: {"rows": a["rows"].replace(allowed=np.zeros((2, 2), np.uint32))}, "allowed has"),
        (lambda a: {"rows": a["rows"].replace(allowed=np.zeros((2, 1), np.int32))}, "be uint32"),
        (lambda a: {"num_logprobs": 25}, "num_logprobs=25 must be -1 .* 24"),
        (lambda a: {"num_logprobs": -2}, "num_logprobs=-2 must be"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    good = arguments([Row(grid(0)), Row(grid(1))])
    good |= {"features": Features(), "num_logprobs": None}
    SAMPLE(**good)
    with pytest.raises(ValueError, match=message):
        SAMPLE(**(good | change(good)))
