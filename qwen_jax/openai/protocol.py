"""What both kinds of completion share in their bodies: OpenAI's fields, and vLLM's beyond them.

Knows names and types, and which fields have no meaning here; ranges are `SamplingParams`' affair.
A field that would change the answer and is not supported is an error, never ignored. Hints that
change nothing (``user``, ``metadata``, ``store``, ``service_tier`` …) are accepted.
"""

from collections.abc import Iterator
from typing import Annotated, Any

import pydantic

MAX_STOPS = 64
MAX_IDS = 1024  # stop ids, and biases: each width is a program of its own
_MAX_STOP_CHARS = 4096


class Strict(pydantic.BaseModel):
    """No conversion of types, no unknown field, no NaN."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None


# Of a list of a million wrong things the first is enough.
FIRST = pydantic.Field(fail_fast=True)
Stop = str | Annotated[list[str], pydantic.Field(max_length=MAX_STOPS), FIRST]


class Common(Strict):
    """Fields of chat and completion requests."""

    model: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], pydantic.Field(max_length=MAX_IDS)] | None = None
    n: int | None = None
    seed: int | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None

    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[int], pydantic.Field(max_length=MAX_IDS), FIRST] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: Annotated[list[int], FIRST] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    request_id: Annotated[str, pydantic.Field(max_length=256)] | None = None

    # Hints: accepted, without effect on the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @pydantic.model_validator(mode="after")
    def _check_common(self) -> "Common":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs cannot be streamed; use stream=false")
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        for text in texts:
            if not text or len(text) > _MAX_STOP_CHARS:
                raise ValueError(f"a stop string has 1 to {_MAX_STOP_CHARS} characters")
        return self


def known_fields(*kinds: type[pydantic.BaseModel]) -> list[str]:
    """Names of the fields of several models."""
    return sorted({name for kind in kinds for name in kind.model_fields})


def unsupported(body: pydantic.BaseModel, allowed: dict[str, tuple[Any, ...]]) -> Iterator[str]:
    """Fields that hold another value than those that need no support."""
    for name, values in allowed.items():
        if getattr(body, name) not in (None, *values):
            yield name
