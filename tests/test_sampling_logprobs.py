"""Logprobs and ranks are those of the raw logits, whatever the settings do to the draw."""

import jax
import numpy as np
import pytest
from sampling_oracle import Row, arguments

from qwen_jax.sampling import NOT_FINITE, RowSettings, prompt_logprobs, sample

SAMPLE = jax.jit(sample, static_argnames=("num_logprobs", "features"))
PROMPT = jax.jit(prompt_logprobs, static_argnums=2)
V = 151_936


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def logits(rows: int, size: int, *, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, size)) * scale).astype(np.float32)


def sampled(batch: list[Row], num_logprobs: int | None):
    return jax.tree.map(np.asarray, SAMPLE(**arguments(batch), num_logprobs=num_logprobs))


HEAVY = RowSettings(
    temperature=3.0, top_k=4, top_p=0.9, min_p=0.01, repetition=1.5, presence=1.0,
    bias={3: 30.0}, allowed=range(0, 50, 3), stop_ids=(0,), min_tokens=5,
)  # fmt: skip


@pytest.mark.parametrize("settings", [RowSettings(temperature=0.0), RowSettings(), HEAVY])
def test_logprobs_are_those_of_the_unmodified_logits(settings):
    x = logits(5, 50)
    found = sampled([Row(row, settings, output=(3,)) for row in x], 4)
    wanted = log_softmax(x)
    at = np.arange(5)
    np.testing.assert_allclose(found.logprob, wanted[at, found.tokens], atol=2e-6)
    order = np.argsort(-x, kind="stable")[:, :4]
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top_logprobs, wanted[at[:, None], order], atol=2e-6)
    ranks = (x >= x[at, found.tokens][:, None]).sum(-1)
    np.testing.assert_array_equal(found.rank, ranks)
    if settings is HEAVY:
        assert found.rank.max() > 4  # the bias drew tokens that were not among the best


def test_the_rank_counts_every_token_that_is_not_worse():
    x = np.array([[2.0, 5.0, 2.0, 1.0, 5.0, 7.0]], np.float32).repeat(6, 0)
    found = PROMPT(x, np.arange(6), 0)
    np.testing.assert_array_equal(found.rank, [5, 3, 5, 6, 3, 1])


def test_none_asks_for_nothing_and_zero_for_the_token_alone():
    batch = [Row(row) for row in logits(2, 50)]
    nothing, alone = sampled(batch, None), sampled(batch, 0)
    assert (nothing.logprob, nothing.rank, nothing.top_ids, nothing.top_logprobs) == (None,) * 4
    assert alone.top_ids.shape == alone.top_logprobs.shape == (2, 0)
    np.testing.assert_array_equal(alone.tokens, nothing.tokens)
    wanted = log_softmax(np.stack([row.logits for row in batch]))[[0, 1], alone.tokens]
    np.testing.assert_allclose(alone.logprob, wanted, atol=2e-6)


def test_minus_one_returns_the_whole_vocabulary_best_first():
    x = logits(3, 200)
    found = sampled([Row(row) for row in x], -1)
    order = np.argsort(-x, kind="stable")
    np.testing.assert_array_equal(found.top_ids, order)
    wanted = np.take_along_axis(log_softmax(x), order, -1)
    np.testing.assert_allclose(found.top_logprobs, wanted, atol=2e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])  # flat to peaked
def test_a_real_vocabulary_keeps_its_digits(scale):
    x = logits(2, V, scale=scale) + 30
    targets = np.array([5, 151_935])
    found = PROMPT(x, targets, 20)
    wanted = log_softmax(x)
    np.testing.assert_allclose(found.logprob, wanted[[0, 1], targets], rtol=1e-6, atol=4e-6)
    order = np.argsort(-x, kind="stable")[:, :20]
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(
        found.top_logprobs, np.take_along_axis(wanted, order, -1), rtol=1e-6, atol=4e-6
    )


def test_prompt_logprobs_give_each_target_its_own_row():
    x = logits(7, 33)
    targets = np.array([0, 32, 5, 5, 1, 2, 3])
    found = PROMPT(x, targets, 2)
    np.testing.assert_allclose(found.logprob, log_softmax(x)[np.arange(7), targets], atol=2e-6)
    np.testing.assert_array_equal(found.top_ids, np.argsort(-x, kind="stable")[:, :2])


def test_excluded_tokens_have_minus_infinity_and_padding_targets_nan():
    x = logits(3, 40)
    x[0, 5] = -np.inf
    found = PROMPT(x, np.array([5, -1, 6]), 40)
    assert found.logprob[0] == -np.inf
    assert np.isnan(found.logprob[1])
    assert np.isfinite(found.logprob[2])
    np.testing.assert_array_equal(np.asarray(found.rank)[:2], [40, 0])
    assert found.top_logprobs[0, -1] == -np.inf
    assert np.isfinite(found.top_logprobs[0, :-1]).all()


@pytest.mark.parametrize("size", [40, 6000])
def test_a_nan_anywhere_shows_in_the_logprobs(size):
    x = logits(2, size)
    x[1, size - 2] = np.nan
    found = PROMPT(x, np.array([0, 0]), 1)
    assert np.isnan(np.asarray(found.logprob)).tolist() == [False, True]
    row = sampled([Row(x[0]), Row(x[1])], 1)
    assert row.tokens[1] == NOT_FINITE
    assert np.isnan(row.logprob).tolist() == [False, True]
    assert row.rank[1] == 0


def test_prompt_logprobs_refuse_other_dtypes():
    with pytest.raises(ValueError, match="logits must be float32"):
        PROMPT(logits(2, 9).astype(np.float16), np.zeros(2, np.int32), 1)
