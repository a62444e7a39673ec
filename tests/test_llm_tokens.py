"""`LLM`: which tokens are chosen, what is reported of them, and where a text ends.

One anchor row brings every sampling option, so that all rows here share one program.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llm
from llm_oracle import greedy, log_softmax, logits

from qwen_jax.requests import SamplingParams

PROMPT = "def f("
IM_END, ENDOFTEXT = 289, 287
ANCHOR = SamplingParams(
    max_tokens=1,
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    min_tokens=1,
    logit_bias={5: 0.1, 6: 0.1},
    allowed_token_ids=range(200),
    stop_token_ids=[300, 301],
    logprobs=4,
)
F32 = 2e-4  # of a logit, between two programs in float32


@pytest.fixture(scope="module")
def llm():
    return tiny_llm.shared_llm()


@pytest.fixture(scope="module")
def run(llm):
    """Completes `PROMPT` under several sets of parameters at once."""

    def run(*several, prompt=PROMPT):
        defaults = {"temperature": 0.0, "max_tokens": 8}
        params = [ANCHOR, *(SamplingParams(**(defaults | one)) for one in several)]
        results = llm.generate([prompt] * len(params), params, use_tqdm=False)
        return [result.outputs[0] for result in results[1:]]

    return run


@pytest.fixture(scope="module")
def ids(llm):
    return llm.tokenizer.encode(PROMPT)


@pytest.fixture(scope="module")
def plain(run):
    return run({})[0]


# ---- which tokens --------------------------------------------------------------------------------


def test_logit_bias_is_added(llm, run, ids):
    bias = {17: 2.5, 30: -3.0}
    (output,) = run({"logit_bias": bias})
    assert output.token_ids == greedy(llm, ids, 8, bias=bias)


def test_only_allowed_tokens_are_chosen(llm, run, ids):
    allowed = [4, 9, 77, 150]
    (output,) = run({"allowed_token_ids": allowed})
    assert output.token_ids == greedy(llm, ids, 8, allowed=allowed)


def test_penalties_are_those_of_vllm(llm, run, ids):
    # Few tokens, so that they repeat; some of them are the prompt's own.
    allowed = [*ids[:2], 4, 9, 30]
    several = [
        {"repetition_penalty": 3.0},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
    ]
    outputs = run(*({"allowed_token_ids": allowed} | one for one in several))
    expected = [
        greedy(llm, ids, 8, allowed=allowed, **{next(iter(one)).split("_")[0]: value})
        for one in several
        for value in one.values()
    ]
    assert [output.token_ids for output in outputs] == expected
    without = greedy(llm, ids, 8, allowed=allowed)
    assert [tokens != without for tokens in expected] == [True] * 3


def test_top_k_of_one_is_greedy_at_any_temperature(run, plain):
    outputs = run(
        {"temperature": 5.0, "top_k": 1}, {"temperature": 5.0, "top_p": 1e-6}, {"temperature": 5.0}
    )
    assert [output.token_ids == plain.token_ids for output in outputs] == [True, True, False]


# ---- where a text ends ---------------------------------------------------------------------------


def test_an_end_of_text_ends_it_and_is_not_named(run):
    outputs = run({"logit_bias": {IM_END: 100.0}}, {"logit_bias": {ENDOFTEXT: 100.0}})
    for output, token in zip(outputs, (IM_END, ENDOFTEXT), strict=True):
        assert (output.token_ids, output.text) == ([token], "")
        assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_ignore_eos_goes_on_to_max_tokens(run):
    (output,) = run({"logit_bias": {IM_END: 100.0}, "ignore_eos": True, "max_tokens": 5})
    assert (output.token_ids, output.finish_reason) == ([IM_END] * 5, "length")


def test_no_end_before_min_tokens(run):
    end = {"logit_bias": {IM_END: 100.0}}
    outputs = run(*({**end, "min_tokens": n} for n in (1, 4)))
    for output, n in zip(outputs, (1, 4), strict=True):
        assert len(output.token_ids) == n + 1
        assert output.token_ids.index(IM_END) == n
        assert output.finish_reason == "stop"


def test_a_stop_token_of_the_request_is_named(llm, run, plain):
    token = plain.token_ids[3]
    first = plain.token_ids.index(token)
    without, with_it = run(
        {"stop_token_ids": [token]},
        {"stop_token_ids": [token], "include_stop_str_in_output": True},
    )
    for output in (without, with_it):
        assert output.token_ids == plain.token_ids[: first + 1]
        assert (output.finish_reason, output.stop_reason) == ("stop", token)
    assert without.text == llm.tokenizer.decode(plain.token_ids[:first])
    assert with_it.text == llm.tokenizer.decode(plain.token_ids[: first + 1])


def test_a_stop_string_across_tokens_ends_the_text(run):
    # " the" is one token, "re" and "t" are others: no token ends where the string does.
    words = {"logit_bias": {266: 100.0}}  # " the" for ever
    outputs = run(
        {**words, "stop": "he th"},
        {**words, "stop": ["xyz", "he th"], "include_stop_str_in_output": True},
        {**words, "stop": "he th", "min_tokens": 4},
    )
    assert [output.text for output in outputs] == [" t", " the th", " the the the t"]
    assert [len(output.token_ids) for output in outputs] == [2, 2, 5]
    assert {(o.finish_reason, o.stop_reason) for o in outputs} == {("stop", "he th")}


def test_special_tokens_are_left_out_of_the_text_unless_asked_for(run):
    word = {"logit_bias": {288: 100.0}, "max_tokens": 2}
    outputs = run(word, {**word, "skip_special_tokens": False})
    assert [output.text for output in outputs] == ["", "<|im_start|>" * 2]


# ---- what is reported ----------------------------------------------------------------------------


def test_logprobs_are_of_the_unmodified_distribution(llm, run, ids):
    (output,) = run({"logprobs": 3, "logit_bias": {17: 2.5}, "temperature": 0.5, "seed": 3})
    whole = [*ids, *output.token_ids]
    expected = log_softmax(logits(llm, whole)[len(ids) - 1 : -1])
    for entry, row, token in zip(output.logprobs, expected, output.token_ids, strict=True):
        best = list(np.argsort(-row)[:3])
        assert list(entry) == [token, *(i for i in best if i != token)]
        for i, logprob in entry.items():
            assert logprob.logprob == pytest.approx(row[i], abs=F32)
            assert logprob.rank == 1 + (row > row[i]).sum()
            assert logprob.decoded_token == llm.tokenizer.token(i)
    chosen = sum(row[token] for row, token in zip(expected, output.token_ids, strict=True))
    assert output.cumulative_logprob == pytest.approx(chosen, abs=8 * F32)


def test_rows_get_as_many_logprobs_as_each_asked_for(run):
    none, zero, four = run({}, {"logprobs": 0}, {"logprobs": 4})
    assert none.logprobs is None
    assert {len(entry) for entry in zero.logprobs} == {1}
    assert {len(entry) for entry in four.logprobs} == {4}  # greedy: the token is the best one


def test_minus_one_reports_the_whole_vocabulary(llm, ids):
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1)
    (result,) = llm.generate(PROMPT, params, use_tqdm=False)
    (entry,) = result.outputs[0].logprobs
    expected = log_softmax(logits(llm, ids)[-1])
    found = np.array([entry[i].logprob for i in range(320)])
    np.testing.assert_allclose(found, expected, atol=F32)


def test_prompt_logprobs_are_those_of_the_model_whole_and_in_chunks(llm):
    prompts = [PROMPT, "return print the the in", "x"]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2)
    chunked = tiny_llm.open_llm(max_num_batched_tokens=5)
    for model in (llm, chunked):
        for result in model.generate(prompts, params, use_tqdm=False):
            ids, found = result.prompt_token_ids, result.prompt_logprobs
            expected = log_softmax(logits(llm, ids))
            assert found[0] is None
            assert len(found) == len(ids)
            for entry, row, token in zip(found[1:], expected[:-1], ids[1:], strict=True):
                assert entry[token].logprob == pytest.approx(row[token], abs=F32)
                assert entry[token].rank == 1 + (row > row[token]).sum()
                assert set(entry) == {token, *np.argsort(-row)[:2]}


def test_prompt_logprobs_go_to_the_rows_that_asked(llm):
    silent, none, two = (
        SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=k) for k in (None, 0, 2)
    )
    first, second, third = llm.generate([PROMPT, PROMPT, "x"], [silent, none, two], use_tqdm=False)
    assert first.prompt_logprobs is None
    assert [len(entry) for entry in second.prompt_logprobs[1:]] == [1, 1, 1]
    assert third.prompt_logprobs == [None]


def test_a_stream_brings_the_same_logprobs(llm):
    params = dataclasses.replace(ANCHOR, max_tokens=20, stop="<", seed=1)
    (whole,) = llm.generate(PROMPT, params, use_tqdm=False)
    *_, last = llm.stream(PROMPT, params)
    assert last.output.outputs == whole.outputs
    assert len(whole.outputs[0].logprobs) == len(whole.outputs[0].token_ids) > 3


# ---- faults --------------------------------------------------------------------------------------


def test_weights_that_give_no_number_are_named():
    model = tiny_llm.open_llm()
    runner = model.engine.runner
    runner.params = runner.params.replace(norm=jnp.full_like(model.params.norm, np.nan))
    with pytest.raises(ValueError, match=r"request 0 at new token 1.*logits hold NaN"):
        model.generate("x", SamplingParams(temperature=0.0, max_tokens=3), use_tqdm=False)
