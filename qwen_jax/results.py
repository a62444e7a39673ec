"""What comes back from a request: texts, logprobs, times. Plain values, as users of vLLM read them.

Knows names only; knows no array and no model.
"""

import dataclasses
from typing import Any, Literal

from qwen_jax.prompt.parsing import Delta

FinishReason = Literal["stop", "length", "abort"]


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
        picture_tokens: those of the prompt that stand for pictures and videos.
        picture_pixels: of the pictures and of all frames, as they were seen (after resizing).
        cached_tokens: those of the prompt that were in the cache already.
        arrival_time, first_token_time, finished_time: seconds since the epoch; 0 for never.
        time_to_first_token: from its arrival to its first token.
        generation_time: from the first token to the last.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    picture_tokens: int = 0
    picture_pixels: int = 0
    cached_tokens: int = 0
    arrival_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0
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
        finish_reason: "stop", "length", or "abort" for a request that was cancelled.
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


@dataclasses.dataclass
class StreamEvent:
    """A piece of a text as it is generated.

    Attributes:
        text: new text; joined over all events it is the completion's ``text``.
        deltas: the same, parsed into reasoning, content and tool calls (chat only).
        output: the whole result, with the last event only.
    """

    text: str
    deltas: list[Delta] = dataclasses.field(default_factory=list)
    output: RequestOutput | None = None
