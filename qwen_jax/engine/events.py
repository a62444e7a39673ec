"""What a request hears from the engine. Plain values; knows no thread and no array."""

import dataclasses

from qwen_jax.results import Logprob, RequestOutput


@dataclasses.dataclass(frozen=True)
class Delta:
    """New tokens of one of the ``n`` sequences of a request.

    Attributes:
        index: which of them.
        text: new text; it may lag behind the tokens, while a stop string or a character is open.
        token_ids: none where structured output is at its end without another.
        logprobs: of each token, where they were asked for.
        finish_reason, stop_reason: with the last delta of the sequence; None before.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclasses.dataclass(frozen=True)
class Finished:
    """The last event of a request that came to its end, or was cancelled ("abort")."""

    result: RequestOutput


@dataclasses.dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be finished; the error names it."""

    error: Exception


Event = Delta | Finished | Failed


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests, or has ended before this one was done."""
