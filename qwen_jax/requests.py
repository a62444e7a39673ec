"""What a caller asks: sampling parameters and prompts.

Knows names and limits of options, as users of vLLM type them; knows no array and no model.
"""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_jax.structured.spec import Grammar, StructuredOutputs

if TYPE_CHECKING:
    from qwen_jax.prompt.vision_prompt import VisionPrompt


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
        structured_outputs: the form the text must have: a `StructuredOutputs`, a mapping with its
            names, or a `Grammar` that was compiled before.
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
    structured_outputs: StructuredOutputs | Mapping[str, Any] | Grammar | None = None
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
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop={self.stop!r} holds {text!r}: give strings, not empty ones")
        for name in _IDS:
            ids = getattr(self, name)
            if ids is not None:
                object.__setattr__(self, name, tuple(_token_ids(ids, name)))
        if self.allowed_token_ids == ():
            raise ValueError(
                "allowed_token_ids is empty: no token could be chosen; None allows all"
            )
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        if self.structured_outputs is not None:
            object.__setattr__(self, "structured_outputs", _form(self.structured_outputs))
            if self.allowed_token_ids is not None:
                raise ValueError("structured_outputs and allowed_token_ids exclude each other")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def check(self, name: str, *, vocab_size: int, has_tokenizer: bool) -> None:
        """Holds the parameters against a checkpoint; ``name`` says whose they are in an error.

        Raises:
            ValueError: a token id outside the vocabulary, more logprobs than it has tokens, or stop
                strings where there is no tokenizer.
        """
        for option in (*_IDS, "logit_bias"):
            for token in getattr(self, option) or ():
                if not 0 <= token < vocab_size:
                    raise ValueError(
                        f"{name}: {option} has token id {token}, which is not in "
                        f"0 .. {vocab_size - 1}"
                    )
        for option in ("logprobs", "prompt_logprobs"):
            count = getattr(self, option)
            if count is not None and count > vocab_size:
                raise ValueError(
                    f"{name}: {option}={count:,} exceeds the vocabulary of {vocab_size:,}; "
                    "-1 reports all of it"
                )
        if self.stop_strings and not has_tokenizer:
            raise ValueError(
                f"{name}: stop={self.stop!r} needs a tokenizer, which this checkpoint has none of; "
                "use stop_token_ids"
            )

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


def _token_ids(ids: Any, name: str) -> list[int]:
    """Token ids as integers, NumPy's included."""
    if isinstance(ids, str | Mapping) or not isinstance(ids, Iterable):
        raise ValueError(f"{name}={ids!r} is not a list of token ids")
    ids = list(ids)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise ValueError(f"{name}: token id {token!r} is not an integer")
    return [int(token) for token in ids]


def _logit_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias={bias!r} is not a mapping from token id to number")
    for token, value in bias.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, numbers.Real)
            or not math.isfinite(value)
        ):
            raise ValueError(f"logit_bias of token {token!r} is {value!r}, not a finite number")
    return dict(zip(_token_ids(bias.keys(), "logit_bias"), bias.values(), strict=True))


def _form(wish: Any) -> StructuredOutputs | Grammar:
    if isinstance(wish, StructuredOutputs | Grammar):
        return wish
    if isinstance(wish, Mapping):
        return StructuredOutputs.from_mapping(wish)
    raise ValueError(f"structured_outputs={wish!r:.80} is not a mapping such as {{'regex': …}}")


_IDS = ("stop_token_ids", "allowed_token_ids")
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
class Prompt:
    """A prompt as token ids.

    Attributes:
        token_ids: at least one.
        text: it came from, if any.
        stop_ids: end the text besides the checkpoint's own, and are ignored with them.
        vision: the pictures among the tokens; None for text alone.
    """

    token_ids: tuple[int, ...]
    text: str | None = None
    stop_ids: tuple[int, ...] = ()
    vision: "VisionPrompt | None" = dataclasses.field(default=None, compare=False, repr=False)


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
    if all(isinstance(p, numbers.Integral) for p in prompts):
        raise ValueError('a list of token ids is written {"prompt_token_ids": [...]}')
    return prompts


def params_for_each(
    params: SamplingParams | Sequence[SamplingParams],
    count: int,
    *,
    vocab_size: int,
    has_tokenizer: bool,
) -> list[SamplingParams]:
    """Sampling parameters of each of ``count`` prompts, held against the checkpoint.

    Raises:
        ValueError: another number of them, or what `SamplingParams.check` refuses.
    """
    each = [params] * count if isinstance(params, SamplingParams) else list(params)
    if len(each) != count:
        raise ValueError(f"{len(each)} sampling params for {count} prompts; give 1 or {count}")
    for i, one in enumerate(each):
        name = f"prompt {i}" if count > 1 else "prompt"
        one.check(name, vocab_size=vocab_size, has_tokenizer=has_tokenizer)
    return each


def check_prompt_keys(prompt: Mapping[str, Any]) -> None:
    """Raises ValueError on keys that no prompt has, or when text and ids are both there or not."""
    for key in prompt:
        if key not in _PROMPT_KEYS:
            near = difflib.get_close_matches(str(key), _PROMPT_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_PROMPT_KEYS)}"
            raise ValueError(f"unknown key {key!r} in a prompt; {hint}")
    if (prompt.get("prompt") is None) == (prompt.get("prompt_token_ids") is None):
        raise ValueError('a prompt has either "prompt" (text) or "prompt_token_ids"')
