"""Fields of a request to sampling parameters. Knows both names; knows no prompt."""

import dataclasses
import re
from typing import Any

from qwen_jax.openai.errors import ApiError, bad_request
from qwen_jax.openai.protocol import Common
from qwen_jax.requests import Prompt, SamplingParams

_SAME = (
    "frequency_penalty",
    "presence_penalty",
    "n",
    "seed",
    "stop",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "allowed_token_ids",
    "prompt_logprobs",
    "structured_outputs",
)
MAX_N = 128


def sampling_params(
    body: Common, defaults: SamplingParams, *, vocab_size: int, **more: Any
) -> SamplingParams:
    """The parameters of a request; what it does not say is the checkpoint's choice.

    Args:
        body: of the request.
        defaults: the checkpoint's.
        vocab_size: ids of the model.
        more: ``max_tokens``, ``logprobs``, which the two kinds of requests write differently.

    Raises:
        ApiError: a value out of range, or two that exclude each other.
    """
    given = {name: getattr(body, name) for name in _SAME}
    given = {name: value for name, value in {**given, **more}.items() if value is not None}
    if body.logit_bias:
        given["logit_bias"] = _logit_bias(body.logit_bias)
    if given.get("n", 1) > MAX_N:
        raise ApiError(400, f"n={given['n']} exceeds {MAX_N}", param="n")
    try:
        with bad_request():
            params = dataclasses.replace(defaults, **given)
            params.check("the request", vocab_size=vocab_size, has_tokenizer=True)
    except ApiError as error:
        error.param = _named(error.message, body)
        raise
    return params


def _named(message: str, body: Common) -> str | None:
    """The field that a complaint of `SamplingParams` is about."""
    words = re.findall(r"\w+", message)
    return next((word for word in words if word in type(body).model_fields), None)


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    """JSON's keys are texts; OpenAI's values go from -100 to 100."""
    found = {}
    for key, value in bias.items():
        if not key.isdecimal() or len(key) > 9:
            raise ApiError(400, f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
        if not -100 <= value <= 100:
            raise ApiError(
                400, f"logit_bias of token {key} is {value}, not in -100 .. 100", param="logit_bias"
            )
        found[int(key)] = value
    return found


def check_room(prompt: Prompt, max_tokens: int | None, max_model_len: int, field: str) -> None:
    """Raises ApiError where prompt and answer do not fit the context together."""
    length = len(prompt.token_ids)
    if max_tokens is not None and length + max_tokens > max_model_len:
        raise ApiError(
            400,
            f"the prompt has {length:,} tokens and {field} is {max_tokens:,}, together more than "
            f"the context of {max_model_len:,}: lower {field} to {max_model_len - length:,} or "
            "shorten the prompt",
            param=field,
            code="context_length_exceeded",
        )
