"""What a caller asks and what comes back: sampling parameters, prompts, results.

Knows names and limits of options, as users of vLLM type them; knows no array and no model.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a text ends. Names and meanings are vLLM's, with one
    difference: ``max_tokens=None`` goes on until a stop token or ``max_model_len``.

    Attributes:
        n: completions per prompt, each with a seed of its own.
        temperature: 0 is greedy.
        top_p, top_k, min_p: cut the distribution's tail; 1.0, 0 (or -1) and 0.0 leave it whole.
        seed: fixes the random numbers of this request, whatever else is in the batch.
        max_tokens, min_tokens: new tokens; no stop token is chosen below ``min_tokens``.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: ids that end the text, besides the checkpoint's own.
        ignore_eos: go on past the checkpoint's own end-of-text ids.
        presence_penalty, frequency_penalty: over the new tokens; 0 is off.
        repetition_penalty: over prompt and new tokens; 1 is off.
        logprobs, prompt_logprobs: how many best tokens to report; -1 the whole vocabulary.
        logit_bias: token id -> added to its logit.
        allowed_token_ids: the only ids that may be chosen.
        structured_outputs: reserved for constrained decoding.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string (or token) in the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: Any = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}={value!r} is not a number")
            if name in _WHOLE and value != int(value):
                raise ValueError(f"{name}={value!r} is not a whole number")
            if not low <= value <= high or math.isnan(value):
                raise ValueError(f"{name}={value!r} is not in {low} .. {high}")
        if self.top_p == 0:
            raise ValueError("top_p=0 keeps no token; use temperature=0 for greedy")
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty=0 is not positive; 1.0 is off")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")
        if any(not s for s in self.stop_strings):
            raise ValueError("stop holds an empty string, which would stop at once")
        if self.structured_outputs is not None:
            raise ValueError(
                "structured_outputs is not supported yet: leave it out and check the output"
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "SamplingParams":
        """From a mapping that somebody typed: an unknown name gets a did-you-mean."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"unknown sampling option {name!r}; {hint}")
        return cls(**options)

    @classmethod
    def from_generation_config(cls, raw: Mapping[str, Any]) -> "SamplingParams":
        """The checkpoint's own defaults, from its `generation_config.json`."""
        if not raw.get("do_sample", False):
            return cls(temperature=0.0)
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return cls(**{name: raw[name] for name in names if raw.get(name) is not None})


_BIG = 2**31 - 1
_RANGES = (
    ("n", 1, 1024),
    ("temperature", 0.0, 1e6),
    ("top_p", 0.0, 1.0),
    ("top_k", -1, _BIG),
    ("min_p", 0.0, 1.0),
    ("seed", -(2**63), 2**63 - 1),
    ("max_tokens", 1, _BIG),
    ("min_tokens", 0, _BIG),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.0, 1e6),
    ("logprobs", -1, _BIG),
    ("prompt_logprobs", -1, _BIG),
)
_WHOLE = {"n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"}
_MAY_BE_NONE = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Log-probability of a token under the unmodified distribution, its rank (1 is the best)."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclasses.dataclass
class Metrics:
    """Times in seconds, of one request.

    Attributes:
        prompt_tokens, generated_tokens: counts.
        time_to_first_token: from the start of its batch to its first token.
        generation_time: from the first token to the last.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    time_to_first_token: float = 0.0
    generation_time: float = 0.0


@dataclasses.dataclass
class CompletionOutput:
    """One completion. ``reasoning_content`` and ``tool_calls`` are filled by `LLM.chat`.

    Attributes:
        index: which of the ``n``.
        text: without the stop string or special tokens, unless asked for.
        token_ids: new tokens, the stop token included.
        cumulative_logprob: sum over ``token_ids``, or None without ``logprobs``.
        logprobs: per token a dict by token id, or None.
        finish_reason: "stop" or "length".
        stop_reason: the stop string or stop token id of the request that matched, or None.
        reasoning_content, content, tool_calls: the text, parsed.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    reasoning_content: str | None = None
    content: str | None = None
    tool_calls: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class RequestOutput:
    """The result of one prompt; ``prompt_logprobs[0]`` is None, since nothing precedes it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool = True
    metrics: Metrics = dataclasses.field(default_factory=Metrics)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, with the text it came from, if any."""

    token_ids: tuple[int, ...]
    text: str | None = None


PromptLike = str | Mapping[str, Any] | Prompt

_PROMPT_KEYS = ("prompt", "prompt_token_ids", "multi_modal_data", "mm_processor_kwargs")


def as_prompts(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """One prompt or several, as a list.

    Raises:
        ValueError: the list is empty, or is a list of token ids without a name.
    """
    if isinstance(prompts, str | Mapping | Prompt):
        return [prompts]
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts is an empty list; give at least one prompt")
    if all(isinstance(p, int) for p in prompts):
        raise ValueError('a list of token ids is written {"prompt_token_ids": [...]}')
    return prompts


def check_prompt_keys(prompt: Mapping[str, Any]) -> None:
    """Raises ValueError on keys that no prompt has, or when text and ids are both there or not."""
    for key in prompt:
        if key not in _PROMPT_KEYS:
            near = difflib.get_close_matches(str(key), _PROMPT_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_PROMPT_KEYS)}"
            raise ValueError(f"unknown key {key!r} in a prompt; {hint}")
    if (prompt.get("prompt") is None) == (prompt.get("prompt_token_ids") is None):
        raise ValueError('a prompt has either "prompt" (text) or "prompt_token_ids"')
