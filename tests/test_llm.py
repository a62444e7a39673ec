"""`LLM`: prompts in, results out: order, batches, seeds, limits, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_llm
from llm_oracle import greedy

from qwen_jax.engine.compile_clock import compile_clock
from qwen_jax.requests import Prompt, SamplingParams

PROMPTS = ["def f(", "hello world", "return print in the the the a"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "max_tokens": 12}


@pytest.fixture(scope="module")
def llm():
    return tiny_llm.shared_llm()


@pytest.fixture(scope="module")
def together(llm):
    return llm.generate(PROMPTS, GREEDY, use_tqdm=False)


def tokens(results) -> list[list[int]]:
    return [output.token_ids for result in results for output in result.outputs]


def test_greedy_tokens_are_those_of_the_model(llm, together):
    # 20 new tokens are on the second page of their rows.
    for result in together:
        assert result.outputs[0].token_ids == greedy(llm, result.prompt_token_ids, 20)


def test_a_result_says_what_was_asked(llm, together):
    for text, result in zip(PROMPTS, together, strict=True):
        assert (result.prompt, result.finished) == (text, True)
        assert result.prompt_token_ids == llm.tokenizer.encode(text)
        (output,) = result.outputs
        assert (output.index, output.finish_reason, output.stop_reason) == (0, "length", None)
        assert len(output.token_ids) == 20
        assert output.text == llm.tokenizer.decode(output.token_ids)
        assert (output.logprobs, output.cumulative_logprob, result.prompt_logprobs) == (None,) * 3
        assert result.metrics.prompt_tokens == len(result.prompt_token_ids)
        assert result.metrics.generated_tokens == 20
        assert result.metrics.time_to_first_token > 0
        assert result.metrics.generation_time > 0
    assert len({result.request_id for result in together}) == len(PROMPTS)


def test_a_batch_equals_its_rows_alone(llm, together):
    alone = [llm.generate(p, GREEDY, use_tqdm=False) for p in PROMPTS]
    assert [tokens(one)[0] for one in alone] == tokens(together)


def test_a_row_that_a_stop_string_ended_leaves_the_others_alone(llm):
    long = SamplingParams(temperature=0.0, max_tokens=80, stop="never")
    (alone,) = tokens(llm.generate(PROMPTS[0], long, use_tqdm=False))
    (whole,) = llm.generate(PROMPTS[1], long, use_tqdm=False)
    short = dataclasses.replace(long, stop=whole.outputs[0].text[:2])
    first, second = llm.generate(PROMPTS[:2], [long, short], use_tqdm=False)
    assert tokens([first]) == [alone]
    assert len(alone) > 40
    assert len(second.outputs[0].token_ids) < 4


def test_more_prompts_than_rows_come_back_in_order(llm, together):
    results = llm.generate([*PROMPTS, *PROMPTS], GREEDY, use_tqdm=False)
    assert [r.prompt for r in results] == [*PROMPTS, *PROMPTS]
    assert tokens(results) == tokens(together) * 2


def test_each_prompt_may_have_its_own_parameters(llm, together):
    limits = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 7, 20)]
    results = llm.generate(PROMPTS, limits, use_tqdm=False)
    whole = tokens(together)
    assert tokens(results) == [whole[0][:1], whole[1][:7], whole[2]]


@pytest.mark.parametrize("as_array", [False, True])
def test_token_ids_are_a_prompt_too(llm, together, as_array):
    ids = llm.tokenizer.encode(PROMPTS[0])
    given = {"prompt_token_ids": np.array(ids) if as_array else ids}
    (result,) = llm.generate(given, GREEDY, use_tqdm=False)
    assert (result.prompt, result.prompt_token_ids) == (None, ids)
    assert tokens([result])[0] == tokens(together)[0]


def test_the_same_seed_gives_the_same_tokens_alone_and_in_a_batch(llm):
    def params(seed):
        return SamplingParams(seed=seed, **SAMPLED)

    (alone,) = tokens(llm.generate(PROMPTS[0], params(5), use_tqdm=False))
    batch = llm.generate(
        [PROMPTS[1], PROMPTS[0], PROMPTS[0]], [params(5), params(6), params(5)], use_tqdm=False
    )
    assert tokens(batch)[2] == alone
    assert tokens(batch)[1] != alone


def test_each_of_n_has_a_seed_of_its_own(llm):
    params = SamplingParams(n=3, seed=5, **SAMPLED)
    (result,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    assert [output.index for output in result.outputs] == [0, 1, 2]
    first, second, third = tokens([result])
    assert first != second != third != first
    single = SamplingParams(seed=5, **SAMPLED)
    assert tokens(llm.generate(PROMPTS[0], single, use_tqdm=False)) == [first]
    assert result.metrics.generated_tokens == 3 * 12


def test_without_a_seed_requests_differ_and_a_new_llm_repeats_them(llm):
    def run(model):
        return tokens(model.generate([PROMPTS[0]] * 3, SamplingParams(**SAMPLED), use_tqdm=False))

    first, again, other = (run(tiny_llm.open_llm(seed=seed)) for seed in (1, 1, -2))
    assert first == again != other
    assert first[0] != first[1]


def test_without_params_the_checkpoint_decides(llm):
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 0.95)
    model, twin = tiny_llm.open_llm(), tiny_llm.open_llm()
    default = model.generate(PROMPTS[0], use_tqdm=False)
    assert tokens(default) == tokens(twin.generate(PROMPTS[0], params, use_tqdm=False))


def test_without_max_tokens_a_text_ends_at_max_model_len(llm):
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 256, 248)]
    params = SamplingParams(temperature=0.0)
    (result,) = llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
    assert len(result.outputs[0].token_ids) == 256 - 248
    assert result.outputs[0].finish_reason == "length"


def test_chunked_prefill_equals_whole(llm, together):
    model = tiny_llm.open_llm(max_num_batched_tokens=5)
    assert tokens(model.generate(PROMPTS, GREEDY, use_tqdm=False)) == tokens(together)


def test_a_cache_that_grows_half_way_changes_nothing(llm, monkeypatch):
    # 104 tokens are 7 pages a row, 40 more need a ninth.
    ids = np.random.default_rng(0).integers(0, 256, (4, 104))
    prompts = [{"prompt_token_ids": row} for row in ids]
    params = SamplingParams(temperature=0.0, max_tokens=40, stop="never")
    expected = tokens(llm.generate(prompts, params, use_tqdm=False))
    monkeypatch.setattr("qwen_jax.engine.engine.FIRST_PAGES", 32)
    monkeypatch.setattr("qwen_jax.engine.core._AHEAD", 4)
    model = tiny_llm.open_llm()
    assert model.engine.runner.num_pages == 32
    assert tokens(model.generate(prompts, params, use_tqdm=False)) == expected
    assert model.engine.runner.num_pages == 64


def test_a_cache_lost_to_an_interrupt_is_made_anew(llm, together):
    model = tiny_llm.open_llm()
    for array in model.engine.runner._cache.pages:
        array.delete()
    assert tokens(model.generate(PROMPTS, GREEDY, use_tqdm=False)) == tokens(together)


def test_new_prompts_compile_nothing(llm):
    def run(prompts, seed):
        params = SamplingParams(seed=seed, **SAMPLED)
        llm.generate(prompts, params, use_tqdm=False)

    run(PROMPTS, 1)
    before = compile_clock().programs
    run([PROMPTS[1] + " " + PROMPTS[2], PROMPTS[0] * 3], 2)
    run("x", 3)
    assert compile_clock().programs == before
    jax.jit(lambda x: 3 * x)(1.0)
    assert compile_clock().programs > before  # so the clock runs


def test_sharded_tokens_equal_those_of_one_device(llm, together):
    model = tiny_llm.open_llm(mesh="expert=4,tensor=2")
    assert model.runtime.mesh.size == 8
    assert tokens(model.generate(PROMPTS, GREEDY, use_tqdm=False)) == tokens(together)


def test_totals_count_tokens_and_leave_compiling_out(llm):
    model = tiny_llm.open_llm()
    before = model.totals
    model.generate(PROMPTS, GREEDY, use_tqdm=False)
    spent = model.totals - before
    assert spent.prompt_tokens == sum(len(llm.tokenizer.encode(p)) for p in PROMPTS)
    assert (spent.generated_tokens, spent.decode_tokens) == (60, 57)
    assert 0 < spent.prefill_time < 5
    assert 0 < spent.decode_time < 5


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompt 0 is empty: it has no token"),
        (["x", {"prompt_token_ids": []}], "prompt 1 is empty"),
        ({"prompt_token_ids": [1, 320]}, "prompt 0: token id 320 is not an integer in 0 .. 319"),
        ({"prompt_token_ids": [-1]}, "token id -1 is not"),
        ({"prompt_token_ids": [True]}, "token id True is not"),
        ({"prompt_token_ids": [1.0]}, "token id 1.0 is not"),
        ({"prompt_token_ids": "12"}, "'12' is not a list of token ids"),
        (Prompt((999,)), "token id 999 is not"),
        (
            {"prompt_token_ids": [1] * 256},
            r"prompt 0 has 256 tokens, max_model_len is 256: raise max_model_len \(KV for 2,048 "
            r"fits\) or shorten it",
        ),
        ([], "empty list"),
        ([1, 2], '"prompt_token_ids"'),
        ([None], "prompt 0 is None"),
        ({"prompt": 5}, "text must be a str"),
        ({"prompt": "x", "prompt_token_ids": [1]}, "either"),
        ({}, "either"),
        ({"promt": "x"}, "did you mean 'prompt'"),
        ({"prompt": "x", "multi_modal_data": {"image": 1}}, "vision-language"),
    ],
)
def test_what_cannot_be_a_prompt_is_named(llm, prompts, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop_token_ids": [320]}, r"prompt: stop_token_ids has token id 320.* 0 .. 319"),
        ({"allowed_token_ids": [3, -1]}, "allowed_token_ids has token id -1"),
        ({"logit_bias": {400: 1.0}}, "logit_bias has token id 400"),
        ({"logprobs": 321}, "logprobs=321 exceeds the vocabulary of 320"),
        ({"prompt_logprobs": 1000}, "prompt_logprobs=1,000 exceeds"),
        ({"min_tokens": 1, "allowed_token_ids": [289]}, "every allowed token is one of"),
    ],
)
def test_parameters_that_do_not_fit_the_checkpoint_are_named(llm, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate("x", SamplingParams(**params), use_tqdm=False)


def test_the_number_of_parameters_must_be_that_of_the_prompts(llm):
    with pytest.raises(ValueError, match="2 sampling params for 3 prompts; give 1 or 3"):
        llm.generate(PROMPTS, [GREEDY, GREEDY], use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0 is not in 1 .. 4"),
        ({"max_num_seqs": 5}, "max_num_seqs=5 is not in 1 .. 4"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0 is not in 1 .. 64"),
        ({"max_model_len": 2049}, "max_model_len=2,049 is not in 2 .. 2,048"),
        ({"hbm_utilization": 1.5}, "hbm_utilization=1.5 is not in"),
        ({"config_overrides": {"num_expert": 4}}, "did you mean 'num_experts'"),
        ({"quantization": "fp4"}, "quantization='fp4' is unknown"),
    ],
)
def test_options_that_cannot_work_raise_before_weights_are_read(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_llm.open_llm(progress=lambda _: pytest.fail("weights were read"), **options)


# ---- without a tokenizer -------------------------------------------------------------------------


def test_a_checkpoint_without_a_tokenizer_serves_token_ids(llm, together):
    model = tiny_llm.open_llm(tokenizer=False)
    prompts = [{"prompt_token_ids": r.prompt_token_ids} for r in together]
    results = model.generate(prompts, GREEDY, use_tqdm=False)
    assert tokens(results) == tokens(together)
    assert results[0].outputs[0].text == ""
    refused = [
        ("x", {}, "no tokenizer files"),
        (prompts[0], {"stop": "x"}, "stop='x' needs a tokenizer"),
    ]
    for prompt, params, message in refused:
        with pytest.raises(ValueError, match=message):
            model.generate(prompt, SamplingParams(**params), use_tqdm=False)
    with pytest.raises(ValueError, match="chat: this checkpoint has no tokenizer"):
        model.chat([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="fill: this checkpoint has no tokenizer"):
        model.fill("a", "b")
