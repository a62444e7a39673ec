"""Tokens are drawn with the right frequencies, and a row's tokens depend on that row alone."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_oracle import Row, arguments, distribution, noise

from qwen_jax import sampling_draw
from qwen_jax import sampling_select as select
from qwen_jax.sampling import Features, RowSampling, RowSettings, sample

V = 24  # small rows: all tokens are near ones
WIDE = 4500  # more than sampling_draw.NEAR_BLOCKS blocks


@functools.cache
def sampler(near_blocks: int):
    """`sample`, compiled for this number of near blocks."""

    return jax.jit(
        lambda arrays, features: sample(**arrays, num_logprobs=None, features=features).tokens,
        static_argnums=1,
    )


def run(arguments: dict) -> np.ndarray:
    arrays = {name: value for name, value in arguments.items() if name != "features"}
    return np.asarray(sampler(sampling_draw.NEAR_BLOCKS)(arrays, arguments["features"]))


def tokens(batch: list[Row], **changes) -> np.ndarray:
    return run(arguments(batch) | changes)


def repeated(row: Row, count: int) -> dict:
    """Arguments for `count` equal rows."""
    a = arguments([row])
    features = a.pop("features")
    return jax.tree.map(lambda x: np.repeat(x, count, 0), a) | {"features": features}


def chi_square_limit(freedom: int) -> float:
    """Exceeded by chance once in 100,000 times (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3


# ---- frequencies ---------------------------------------------------------------------------------

OPTIONS = {
    "plain": RowSettings(),
    "temperature": RowSettings(temperature=1.7),
    "top_k": RowSettings(top_k=7),
    "top_p": RowSettings(top_p=0.8),
    "min_p": RowSettings(min_p=0.15),
    "bias": RowSettings(bias={3: 1.5, 4: -4.0}),
    "penalties": RowSettings(repetition=1.6, presence=0.5, frequency=0.3),
    "allowed": RowSettings(allowed=range(0, V, 2)),
    "min_tokens": RowSettings(min_tokens=9, stop_ids=(0, 1, 2)),
    "qwen": RowSettings(temperature=0.6, top_k=20, top_p=0.95),
    "all": RowSettings(
        temperature=1.3, top_k=15, top_p=0.9, min_p=0.02, repetition=1.2, presence=0.2,
        frequency=0.1, bias={4: 1.0}, allowed=range(2, V), stop_ids=(7,), min_tokens=9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_frequencies_follow_the_distribution(option):
    logits = np.random.default_rng(5).normal(size=V).astype(np.float32)
    row = Row(logits, OPTIONS[option], prompt=(1, 2), output=(3, 3, 9))
    p, margin = distribution(row)
    assert margin > 1e-5
    count = 20_000
    a = repeated(row, count)
    a["rows"] = a["rows"].replace(seed=np.arange(count, dtype=np.uint32))
    found = np.bincount(run(a), minlength=V)
    assert np.all(found[p == 0] == 0)
    expected = p[p > 0] * count
    assert expected.min() > 5
    chi_square = np.sum((found[p > 0] - expected) ** 2 / expected)
    assert chi_square < chi_square_limit(len(expected) - 1)


def test_frequencies_over_positions_follow_the_distribution_too():
    logits = np.random.default_rng(6).normal(size=V).astype(np.float32)
    a = repeated(Row(logits), 20_000) | {"position": np.arange(20_000, dtype=np.int32)}
    found = np.bincount(run(a), minlength=V)
    expected = distribution(Row(logits))[0] * 20_000
    assert np.sum((found - expected) ** 2 / expected) < chi_square_limit(V - 1)


def test_noise_is_gumbel_to_the_last_digits_of_its_tail():
    count = 2**20
    ids = jnp.arange(count, dtype=jnp.int32)[None]
    g = np.asarray(GUMBEL(jnp.array([5], jnp.uint32), jnp.array([0]), ids))[0].astype(np.float64)
    share = np.exp(-np.exp(-np.sort(g)))
    distance = np.abs(share - (np.arange(count) + 0.5) / count).max()
    assert distance < 2.2 / math.sqrt(count)  # Kolmogorov and Smirnov, once in 8,000 times
    # The winner among many tokens comes from the upper tail: it must not be a coarse grid.
    largest = np.sort(g)[-2000:]
    assert len(np.unique(largest)) > 1990
    assert np.isfinite(g).all()


def test_noise_stays_finite_at_the_ends_of_the_bits(monkeypatch):
    for bits, wanted in ((0, 22.87), (2**32 - 1, -2.81)):
        fixed = lambda *_, bits=bits: (jnp.full((1, 1), bits, jnp.uint32), jnp.zeros((1, 1), "u4"))
        monkeypatch.setattr(sampling_draw, "threefry", fixed)
        zero = jnp.zeros(1, jnp.uint32)
        found = sampling_draw.gumbel(zero, zero, jnp.zeros((1, 1), jnp.int32))
        np.testing.assert_allclose(found, [[wanted]], atol=0.01)


GUMBEL = jax.jit(sampling_draw.gumbel)


# ---- the recipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 7), (2**32 - 1, 2**31 - 1)])
def test_noise_is_made_by_the_documented_recipe(seed, position):
    ids = jnp.arange(1000, dtype=jnp.int32)[None]
    found = GUMBEL(jnp.array([seed], jnp.uint32), jnp.array([position], jnp.int32), ids)
    np.testing.assert_allclose(found[0], noise(seed, position, 1000), rtol=1e-5, atol=1e-6)
    some = GUMBEL(jnp.array([seed], jnp.uint32), jnp.array([position], jnp.int32), ids[:, ::-7])
    np.testing.assert_array_equal(some[0], found[0, ::-7])


def wide_rows() -> list[Row]:
    """Rows that settle among near tokens, rows that cannot, and rows that barely do either."""
    rng = np.random.default_rng(0)
    flat = rng.normal(size=WIDE).astype(np.float32)
    peaked = flat.copy()
    peaked[rng.integers(0, WIDE, 90)] += 9
    tied = (np.round(flat * 2) / 2).astype(np.float32)
    every = [
        RowSettings(),
        RowSettings(temperature=0.0, top_k=4, top_p=0.3),
        RowSettings(temperature=0.6, top_k=20, top_p=0.95),
        RowSettings(temperature=1e-4),
        RowSettings(top_k=127),
        RowSettings(top_k=2000),
        RowSettings(top_k=5000, top_p=0.5),
        RowSettings(top_p=0.1),
        RowSettings(top_p=0.97),
        RowSettings(min_p=0.2),
        RowSettings(min_p=1e-4, top_p=0.999),
        RowSettings(allowed=[7, 4400, 13], top_k=9),
        RowSettings(allowed=range(0, WIDE, 2), bias={2: 6.0}),
    ]
    return [
        Row(x, dataclasses.replace(s, seed=31 * i), output=(1,) * (i % 4))
        for i, (x, s) in enumerate((x, s) for x in (flat, peaked, tied) for s in every)
    ]


def test_wide_rows_get_the_token_of_the_largest_log_probability_plus_noise():
    batch = wide_rows()
    found = tokens(batch)
    for row, token in zip(batch, found.tolist(), strict=True):
        p, margin = distribution(row)
        assert margin > 1e-7
        if row.settings.temperature > 0:
            with np.errstate(divide="ignore"):
                score = np.log(p) + noise(row.settings.seed, len(row.output), WIDE)
            second, first = np.sort(score)[-2:]
            assert first - second > 1e-5
            assert token == score.argmax(), row.settings
        else:
            assert token == row.logits.argmax()


def test_near_blocks_change_no_token(monkeypatch):
    a = arguments(wide_rows())
    positions = [np.full(len(a["position"]), n, np.int32) for n in range(12)]
    near = [run(a | {"position": position}) for position in positions]
    monkeypatch.setattr(sampling_draw, "NEAR_BLOCKS", 10**6)
    np.testing.assert_array_equal([run(a | {"position": position}) for position in positions], near)


def test_a_near_cutoff_called_exact_is_that_of_the_whole_row():
    rng = np.random.default_rng(2)
    count, size, blocks = 400, 12 * select.BLOCK, 4
    x = rng.normal(size=(count, size)) * rng.uniform(0.2, 3, (count, 1))
    x[::3] = np.round(x[::3] * 2) / 2  # ties across blocks
    x[::5, 3 * select.BLOCK :] = -np.inf
    x = (x - x.max(-1, keepdims=True)).astype(np.float32)
    pick = lambda i, value, off: value if i else off
    every = [
        RowSettings(
            top_k=pick(i & 1, int(rng.integers(1, 60)), 0),
            top_p=pick(i & 2, float(rng.uniform(0.05, 0.99)), 1.0),
            min_p=pick(i & 4, float(rng.uniform(0.01, 0.6)), 0.0),
        )
        for i in range(count)
    ]
    rows = jax.tree.map(jnp.asarray, RowSampling.make(every, size))
    near = select.top_blocks(jnp.asarray(x), blocks)
    cutoff, exact = jax.jit(
        lambda x: sampling_draw._near_cutoff(near.values, near.floor, lambda: x, rows, Features())
    )(x)
    whole = jax.jit(lambda x: sampling_draw.truncate(x, rows, Features()))(x)
    exact, kept = np.asarray(exact), x >= np.asarray(cutoff)[:, None]
    some_outside = np.arange(count) % 5 > 0
    for kind in range(8):  # rows of both sorts, for all settings that drop tokens
        found = exact[(np.arange(count) % 8 == kind) & some_outside]
        assert not found.all()
        assert found.any() == (kind > 0)
    for b in np.flatnonzero(exact):
        held = np.isfinite(x[b]) & kept[b]
        np.testing.assert_array_equal(held, np.isfinite(whole[b]), err_msg=str(every[b]))


def test_a_top_p_that_rounds_to_more_than_all_keeps_what_was_kept():
    x = jnp.array([[0.0, -1.0, -2.0, -3.0]])
    rows = RowSampling.make([RowSettings(top_p=0.999)], 4)
    cutoff, weights = jnp.array([-1.0]), jnp.array([[1.0, 0.5, 0.0, 0.0]])
    assert sampling_draw._top_p(x, cutoff, weights, jnp.array([1.6]), rows).tolist() == [-1.0]


# ---- independence --------------------------------------------------------------------------------


def test_a_row_gets_the_same_tokens_in_any_company_and_place():
    batch = wide_rows()[13:26]
    together = tokens(batch)
    np.testing.assert_array_equal(tokens(batch[::-1]), together[::-1])
    features = arguments(batch)["features"]
    widest = arguments(batch)["rows"]
    for b, (row, token) in enumerate(zip(batch, together, strict=True)):
        alone = jax.tree.map(lambda x, b=b: x[b : b + 1], widest)
        assert tokens([row], features=features, rows=alone)[0] == token, row.settings


def test_features_that_no_row_needs_change_no_token():
    batch = wide_rows()
    for some in (batch[:2], batch[8:10]):
        np.testing.assert_array_equal(tokens(some, features=Features()), tokens(some))


def test_seeds_and_positions_give_different_streams_and_repeat():
    x = np.zeros(V, np.float32)
    grid = [
        Row(x, RowSettings(seed=seed), output=(0,) * position)
        for seed in range(40)
        for position in range(40)
    ]
    found = tokens(grid)
    np.testing.assert_array_equal(tokens(grid), found)
    table = found.reshape(40, 40)
    for agree in (table[1:] == table[:-1], table[:, 1:] == table[:, :-1], table == table.T):
        off_diagonal = agree if agree.shape[0] != agree.shape[1] else agree[~np.eye(40, dtype=bool)]
        assert abs(off_diagonal.mean() - 1 / V) < 5 * math.sqrt(1 / V / off_diagonal.size)
