"""The functional layer: `load` and `generate`, one jitted program over rows of token ids."""

import numpy as np
import pytest
import tiny_llm
from llm_oracle import greedy, log_softmax, logits

import qwen_jax as qj
from qwen_jax.generation_state import LENGTH, STOP
from qwen_jax.sampling import RowSettings

ROWS = [[269, 220, 69, 7], [65], list(range(60, 75))]
NEW = 6


@pytest.fixture(scope="module")
def llm():
    return tiny_llm.shared_llm()


@pytest.fixture(scope="module")
def model(llm):
    return qj.load(str(tiny_llm.directory()), runtime=llm.runtime)


@pytest.fixture(scope="module")
def state(llm, model):
    """Row 0 greedy, row 1 greedy with penalties, row 2 stops at its third token."""
    config, params, _ = model
    third = greedy(llm, ROWS[2], 3)[2]
    settings = [
        RowSettings(temperature=0.0),
        RowSettings(temperature=0.0, repetition=1.5, frequency=0.5),
        RowSettings(temperature=0.0, stop_ids=(third, 289)),
    ]
    return qj.generate(
        params,
        config,
        ROWS,
        max_new_tokens=NEW,
        runtime=llm.runtime,
        settings=settings,
        logprobs=2,
    )


def test_load_gives_plain_values(llm, model):
    config, _, tokenizer = model
    assert config == llm.config
    assert tokenizer.encode("def f(") == llm.tokenizer.encode("def f(")


def test_every_row_gets_the_models_tokens(llm, state):
    expected = [
        greedy(llm, ROWS[0], NEW),
        greedy(llm, ROWS[1], NEW, repetition=1.5, frequency=0.5),
        greedy(llm, ROWS[2], 3),
    ]
    count = np.asarray(state.count)
    assert count.tolist() == [NEW, NEW, 3, 0]  # the fourth is padding
    found = [row[:n].tolist() for row, n in zip(np.asarray(state.tokens), count, strict=True)]
    assert found[:3] == expected
    assert np.asarray(state.finish)[:3].tolist() == [LENGTH, LENGTH, STOP]


def test_the_cache_holds_all_but_the_newest_token(state):
    lengths = [len(row) for row in ROWS]
    held = [n + c - 1 for n, c in zip(lengths, (NEW, NEW, 3), strict=True)]
    assert np.asarray(state.kv_lens)[:3].tolist() == held
    tokens, count = np.asarray(state.tokens), np.asarray(state.count)
    newest = [int(tokens[b, count[b] - 1]) for b in range(3)]
    assert np.asarray(state.newest)[:3].tolist() == newest


def test_logprobs_are_the_models(llm, state):
    new = np.asarray(state.tokens)[0, :NEW].tolist()
    expected = log_softmax(logits(llm, [*ROWS[0], *new])[len(ROWS[0]) - 1 : -1])
    found = state.logprobs
    chosen = expected[np.arange(NEW), new]
    np.testing.assert_allclose(np.asarray(found.logprob)[0, :NEW], chosen, atol=2e-4)
    best = np.argsort(-expected, -1)[:, :2]
    np.testing.assert_array_equal(np.asarray(found.top_ids)[0, :NEW], best)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "0 rows"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ([[1], []], {}, "row 1: needs at least one token id"),
        ([[320]], {}, r"row 0: .* in 0..319"),
        ([[-1]], {}, r"row 0: .* in 0..319"),
        (
            [[1] * 2000],
            {"max_new_tokens": 49},
            "row 0: 2,000 tokens and .* model's 2,048 positions",
        ),
        ([[1]], {"settings": [RowSettings()] * 2}, "2 settings for 1 rows"),
    ],
)
def test_what_cannot_be_generated_from_is_named(llm, model, rows, options, message):
    config, params, _ = model
    with pytest.raises(ValueError, match=message):
        qj.generate(params, config, rows, **{"max_new_tokens": 4, **options}, runtime=llm.runtime)


def test_rows_are_routed_as_each_alone(llm, model):
    config, params, _ = model
    together = qj.routing(params, config, ROWS, runtime=llm.runtime)
    text = config.text
    for row, experts in zip(ROWS, together, strict=True):
        assert experts.shape == (text.num_hidden_layers, len(row), text.num_experts_per_tok)
        assert experts.max() < text.num_experts
        (alone,) = qj.routing(params, config, [row], runtime=llm.runtime)
        np.testing.assert_array_equal(experts, alone)
