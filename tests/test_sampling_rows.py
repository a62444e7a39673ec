"""Settings become the arrays they should, bad ones are refused by name, counts count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.sampling import (
    Counts,
    Features,
    RowSampling,
    RowSettings,
    pack_allowed,
    set_row,
    update_counts,
)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -0.1, "temperature=-0.1 must be a finite number >= 0"),
        ("temperature", np.inf, "temperature=inf must be"),
        ("temperature", np.nan, "temperature=nan must be"),
        ("top_k", -1, r"top_k=-1 must be an integer from 0 \(off\) to 2147483647"),
        ("top_k", 1.5, "top_k=1.5 must be an integer"),
        ("top_k", 2**31, "top_k=2147483648 must be"),
        ("top_p", 0.0, "top_p=0.0 must be a number with 0 < top_p <= 1"),
        ("top_p", 1.01, "top_p=1.01 must be"),
        ("top_p", np.nan, "top_p=nan must be"),
        ("min_p", -0.1, "min_p=-0.1 must be a number with 0 <= min_p <= 1"),
        ("repetition", 0.0, "repetition=0.0 must be a finite number > 0"),
        ("presence", np.nan, "presence=nan must be a finite number"),
        ("frequency", np.inf, "frequency=inf must be a finite number"),
        ("seed", -1, "seed=-1 must be an integer from 0 to 4294967295"),
        ("seed", 2**32, "seed=4294967296 must be"),
        ("min_tokens", -1, "min_tokens=-1 must be an integer"),
        ("bias", {7: np.inf}, "bias of token 7 is inf, must be a finite number"),
        ("allowed", [], "allowed is empty: no token could be chosen; use None"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=message):
        RowSettings(**{name: value})


def test_limits_and_numpy_numbers_are_accepted():
    RowSettings(top_k=np.int64(2**31 - 1), seed=np.uint32(2**32 - 1), min_p=1, top_p=1e-30)


def test_allowed_ids_that_min_tokens_forbids_are_refused():
    with pytest.raises(ValueError, match=r"stop_ids=\[3, 4\], which min_tokens=2 forbids"):
        RowSettings(allowed=[3, 4], stop_ids=[4, 3], min_tokens=2)
    RowSettings(allowed=[3, 4], stop_ids=[4, 3])
    RowSettings(allowed=[3, 5], stop_ids=[4, 3], min_tokens=2)


@pytest.mark.parametrize("name", ["allowed", "stop_ids", "bias"])
@pytest.mark.parametrize("token", [-1, 50])
def test_ids_outside_the_vocabulary_are_refused(name, token):
    value = {token: 1.0} if name == "bias" else [2, token]
    with pytest.raises(ValueError, match=rf"{name}: token {token} is outside .* 0 \.\. 49"):
        RowSampling.make([RowSettings(), RowSettings(**{name: value})], 50)


def test_make_lays_rows_out_as_documented():
    rows = RowSampling.make(
        [
            RowSettings(temperature=0.5, top_k=3, seed=2**32 - 1, bias={5: 1.5, 9: -2, 3: 1}),
            RowSettings(stop_ids=(7,), bias={1: 4.0}, allowed=[0, 33, 49]),
        ],
        50,
    )
    np.testing.assert_array_equal(rows.temperature, np.float32([0.5, 1]))
    np.testing.assert_array_equal(rows.top_k, [3, 0])
    np.testing.assert_array_equal(rows.seed, np.uint32([2**32 - 1, 0]))
    np.testing.assert_array_equal(rows.bias_ids, [[5, 9, 3, -1], [1, -1, -1, -1]])
    np.testing.assert_array_equal(rows.bias, np.float32([[1.5, -2, 1, 0], [4, 0, 0, 0]]))
    np.testing.assert_array_equal(rows.stop_ids, [[-1], [7]])
    np.testing.assert_array_equal(rows.allowed[1], [1, (1 << 1) | (1 << 17)])
    np.testing.assert_array_equal(rows.allowed[0], [2**32 - 1, 2**18 - 1])
    assert {str(a.dtype) for a in (rows.top_k, rows.min_tokens, rows.bias_ids)} == {"int32"}
    assert (rows.seed.dtype, rows.allowed.dtype) == (np.uint32, np.uint32)


def test_rows_that_use_nothing_carry_no_lists_and_no_mask():
    rows = RowSampling.make([RowSettings(), RowSettings()], 50)
    assert rows.bias_ids.shape == rows.bias.shape == rows.stop_ids.shape == (2, 0)
    assert rows.allowed is None


def test_pack_allowed_puts_token_v_at_bit_v_mod_32_of_its_word():
    ids = [0, 31, 32, 70]
    mask = pack_allowed(ids, 71)
    assert mask.shape == (3,)
    assert [v for v in range(96) if mask[v // 32] >> np.uint32(v % 32) & 1] == ids


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, set()),
        ({"temperature": 0}, {"greedy_only"}),
        ({"temperature": 9e-6}, {"greedy_only"}),
        ({"temperature": 1e-5}, set()),
        ({"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}, {"greedy_only"}),
        ({"top_k": 5}, {"top_k"}),
        ({"top_p": 0.5}, {"top_p"}),
        ({"min_p": 0.1}, {"min_p"}),
        ({"repetition": 1.1}, {"penalties"}),
        ({"presence": -0.1}, {"penalties"}),
        ({"frequency": 0.1}, {"penalties"}),
        ({"temperature": 0, "frequency": 0.1}, {"greedy_only", "penalties"}),
        ({"bias": {0: 1.0}}, {"bias"}),
        ({"stop_ids": (1,)}, set()),
        ({"min_tokens": 3}, set()),
        ({"stop_ids": (1,), "min_tokens": 3}, {"min_tokens"}),
    ],
)
def test_features_are_exactly_what_the_rows_need(settings, wanted):
    rows = RowSampling.make([RowSettings(temperature=0), RowSettings(**settings)], 50)
    found = Features.of(jax.tree.map(jnp.asarray, rows))
    names = ("greedy_only", "penalties", "bias", "min_tokens", "top_k", "top_p", "min_p")
    assert {name for name in names if getattr(found, name)} == wanted
    assert hash(found) == hash(Features.of(rows))


def test_update_counts_adds_one_per_row_and_skips_rows_without_a_token():
    counts = Counts.empty(3, 10)
    for tokens in ([4, 9, -1], [4, 0, -2]):
        counts = jax.jit(update_counts)(counts, jnp.array(tokens, jnp.int32))
    wanted = np.zeros((3, 10), int)
    wanted[0, 4], wanted[1, 9], wanted[1, 0] = 2, 1, 1
    np.testing.assert_array_equal(counts.output, wanted)
    assert not counts.prompt.any()


def test_set_row_replaces_one_row_and_leaves_the_others():
    counts = update_counts(Counts.empty(3, 10), jnp.array([1, 2, 3]))
    counts = jax.jit(set_row)(
        counts, 1, prompt_ids=jnp.array([5, 5, 0, -1]), output_ids=jnp.array([7, 7, 9, -1])
    )
    output, prompt = np.zeros((3, 10), int), np.zeros((3, 10), bool)
    output[0, 1], output[2, 3], output[1, 7], output[1, 9] = 1, 1, 2, 1
    prompt[1, [0, 5]] = True
    np.testing.assert_array_equal(counts.output, output)
    np.testing.assert_array_equal(counts.prompt, prompt)
