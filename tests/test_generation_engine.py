"""What stands around the generate loop on the host: sequences, logprob counts."""

import pytest
import tiny

from qwen_jax.engine.sequence import Job, Sequence
from qwen_jax.engine.token_logprobs import most_wanted
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.requests import SamplingParams
from qwen_jax.results import Logprob

# ---- sequences -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(directory)
    return Tokenizer.from_dir(directory, padded_size=tiny.TOKENIZER_VOCAB)


def sequence(tokenizer, *, stop_ids=(289,), max_tokens=50, **params) -> Sequence:
    given = SamplingParams(**params)
    stops = (*(given.stop_token_ids or ()), *stop_ids)
    return Sequence(Job((1,), given, 0, stops, max_tokens, "request 0"), tokenizer, 0)


def test_the_text_is_that_of_the_tokens_in_any_pieces(tokenizer):
    text = "déf 日本 🙂 f(x)"
    ids = tokenizer.encode(text)
    for size in (1, 2, 5, len(ids)):
        it = sequence(tokenizer, max_tokens=len(ids))
        pieces = [it.push(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert "".join(pieces) == it.text == text
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert it.finish_reason == "length"


def test_a_character_cut_off_by_the_limit_is_shown_as_damaged(tokenizer):
    ids = tokenizer.encode("é")
    it = sequence(tokenizer, max_tokens=1)
    assert it.push(ids) == "\N{REPLACEMENT CHARACTER}"
    assert it.output().token_ids == ids[:1]


def test_what_comes_after_the_end_is_not_taken(tokenizer):
    ids = tokenizer.encode("ab")
    it = sequence(tokenizer)
    assert it.push([*ids, 289, *ids]) == "ab"
    assert it.output().token_ids == [*ids, 289]
    assert (it.finish_reason, it.stop_reason) == ("stop", None)
    assert it.push(ids) == ""


def test_a_stop_string_takes_only_the_tokens_that_complete_it(tokenizer):
    it = sequence(tokenizer, stop=["ll", "never"], logprobs=0)
    ids = tokenizer.encode("he l l", special=False) + tokenizer.encode("l after")
    entries = [{i: Logprob(-0.5, 1, None)} for i in ids]
    it.push(ids, entries)
    output = it.output()
    assert output.text == "he l "
    assert tokenizer.decode(output.token_ids) == "he l ll"
    assert len(output.logprobs) == len(output.token_ids) < len(ids)
    assert output.cumulative_logprob == -0.5 * len(output.token_ids)
    assert (output.finish_reason, output.stop_reason) == ("stop", "ll")


def test_text_that_a_stop_string_might_begin_is_shown_at_the_end(tokenizer):
    it = sequence(tokenizer, stop="xyz", max_tokens=3)
    assert it.push(tokenizer.encode("ax")) == "a"
    assert it.push(tokenizer.encode("y")) == "xy"


def test_min_tokens_put_off_stop_strings_and_stop_tokens(tokenizer):
    ids = tokenizer.encode("x,x,x,x")
    it = sequence(tokenizer, stop="x,", min_tokens=3)
    it.push(ids)
    assert it.text == "x,"
    assert len(it.token_ids) == 4
    it = sequence(tokenizer, min_tokens=2)
    it.push([289, 289, 289])
    assert (len(it.token_ids), it.finish_reason) == (3, "stop")


def test_a_stop_token_counts_before_the_limit(tokenizer):
    it = sequence(tokenizer, max_tokens=2)
    it.push([4, 289])
    assert it.finish_reason == "stop"


def test_without_a_tokenizer_there_are_tokens_and_no_text():
    it = sequence(None)
    assert it.push([5, 6, 289]) == ""
    assert (it.output().token_ids, it.output().text) == ([5, 6, 289], "")


# ---- logprobs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "most"),
    [
        ([], None),
        ([None, None], None),
        ([None, 0], 1),
        ([1], 1),
        ([2, 3, None], 4),
        ([20], 32),
        ([200], 200),
        ([5, -1], -1),
    ],
)
def test_few_numbers_of_logprobs_reach_the_compiler(wanted, most):
    assert most_wanted(wanted, 200) == most
