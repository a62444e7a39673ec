"""Sampling parameters and prompts: ranges, names, defaults."""

import dataclasses

import numpy as np
import pytest

from qwen_jax.requests import Prompt, SamplingParams, as_prompts, check_prompt_keys


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"n": 0}, "n=0 is not in 1 .. 1024"),
        ({"n": 1.5}, "n=1.5 is not a whole number"),
        ({"temperature": -0.1}, "temperature=-0.1 is not in 0.0"),
        ({"temperature": float("nan")}, "temperature=nan is not in"),
        ({"temperature": float("inf")}, "temperature=inf is not in"),
        ({"temperature": "hot"}, "temperature='hot' is not a number"),
        ({"temperature": True}, "temperature=True is not a number"),
        ({"temperature": None}, "temperature=None is not a number"),
        ({"top_p": 0.0}, "top_p=0 keeps no token; use temperature=0"),
        ({"top_p": 1.1}, "top_p=1.1 is not in 0.0 .. 1.0"),
        ({"top_k": -2}, "top_k=-2 is not in -1"),
        ({"min_p": 2}, "min_p=2 is not in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0 is not positive"),
        ({"presence_penalty": 2.1}, "presence_penalty=2.1 is not in -2.0 .. 2.0"),
        ({"frequency_penalty": -2.1}, "frequency_penalty=-2.1 is not in"),
        ({"max_tokens": 0}, "max_tokens=0 is not in 1"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens=5 exceeds max_tokens=4"),
        ({"logprobs": -2}, "logprobs=-2 is not in -1"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs=1.5 is not a whole number"),
        ({"seed": 2**63}, "seed=9223372036854775808 is not in"),
        ({"stop": ""}, "holds ''"),
        ({"stop": ["a", 5]}, r"stop=\['a', 5\] holds 5"),
        ({"stop_token_ids": 5}, "stop_token_ids=5 is not a list of token ids"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids: token id '5' is not an integer"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids: token id True"),
        ({"logit_bias": [5]}, r"logit_bias=\[5\] is not a mapping"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias: token id '5' is not an integer"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias of token 5 is inf"),
        ({"logit_bias": {5: "1"}}, "logit_bias of token 5 is '1'"),
        ({"structured_outputs": {"jsn": {}}}, "unknown key 'jsn' in structured_outputs"),
    ],
)
def test_what_is_out_of_range_is_named_with_its_range(option, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**option)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0},
        {"top_p": 1e-9},
        {"top_k": -1},
        {"min_p": 1},
        {"presence_penalty": -2.0},
        {"max_tokens": 1, "min_tokens": 1},
        {"logprobs": -1, "prompt_logprobs": 0},
        {"seed": -(2**63)},
        {"stop": []},
        {"stop_token_ids": []},
    ],
)
def test_the_ends_of_the_ranges_are_in_them(option):
    params = SamplingParams(**option)
    for name, value in option.items():
        assert getattr(params, name) in (value, tuple(value) if isinstance(value, list) else value)


def test_stop_is_one_string_or_several():
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams().stop_strings == ()


def test_token_ids_may_be_numpys():
    params = SamplingParams(
        stop_token_ids=np.array([1, 2]),
        allowed_token_ids=range(3),
        logit_bias={np.int64(3): np.float32(0.5)},
    )
    assert params.stop_token_ids == (1, 2)
    assert params.allowed_token_ids == (0, 1, 2)
    assert params.logit_bias == {3: 0.5}
    assert dataclasses.replace(params, n=2).stop_token_ids == (1, 2)


def test_the_defaults_are_vllms_but_for_max_tokens():
    # vllm/sampling_params.py, where max_tokens is 16.
    expected = {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "max_tokens": None,
        "min_tokens": 0,
        "stop": None,
        "stop_token_ids": None,
        "ignore_eos": False,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": None,
        "prompt_logprobs": None,
        "logit_bias": None,
        "allowed_token_ids": None,
        "structured_outputs": None,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
    }
    assert dataclasses.asdict(SamplingParams()) == expected


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("temprature", "temperature"), ("max_new_tokens", "max_tokens"), ("top-p", "top_p")],
)
def test_an_unknown_option_gets_a_did_you_mean(typed, meant):
    with pytest.raises(
        ValueError, match=f"unknown sampling option '{typed}'; did you mean '{meant}'"
    ):
        SamplingParams.from_options({typed: 1})


def test_an_option_like_none_gets_the_list():
    with pytest.raises(ValueError, match="known: n, temperature, top_p"):
        SamplingParams.from_options({"qqq": 1})
    assert SamplingParams.from_options({"top_k": 3}).top_k == 3


def test_generation_config_says_how_to_sample():
    raw = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": 1}
    params = SamplingParams.from_generation_config(raw | {"repetition_penalty": 1.05})
    assert params == SamplingParams(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    # transformers: without do_sample the other values do not count.
    greedy = SamplingParams(temperature=0.0)
    assert SamplingParams.from_generation_config({**raw, "do_sample": False}) == greedy
    assert SamplingParams.from_generation_config({}) == greedy


def test_one_prompt_or_several():
    assert as_prompts("a") == ["a"]
    assert as_prompts({"prompt": "a"}) == [{"prompt": "a"}]
    assert as_prompts(Prompt((1,))) == [Prompt((1,))]
    assert as_prompts(("a", "b")) == ["a", "b"]
    for wrong in ([1, 2], [np.int32(1)]):
        with pytest.raises(ValueError, match="prompt_token_ids"):
            as_prompts(wrong)


def test_a_prompt_has_text_or_ids():
    check_prompt_keys({"prompt": "a"})
    check_prompt_keys({"prompt_token_ids": [1]})
    for wrong, message in (
        ({"prompt": None}, "either"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "either"),
        ({"prompt_tokens": [1]}, "unknown key 'prompt_tokens' in a prompt; did you mean"),
        ({5: 1}, "unknown key 5"),
    ):
        with pytest.raises(ValueError, match=message):
            check_prompt_keys(wrong)
