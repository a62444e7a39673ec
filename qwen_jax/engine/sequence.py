"""One text being generated: its tokens so far, its text, and how it ended.

Knows tokens, text and stop strings; knows no batch and no array.
"""

import dataclasses

from qwen_jax.engine.constraint import Factory
from qwen_jax.prompt.stop import StopStrings
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.prompt.vision_prompt import VisionPrompt
from qwen_jax.requests import SamplingParams
from qwen_jax.results import CompletionOutput, FinishReason, Logprob


@dataclasses.dataclass(frozen=True)
class Job:
    """What to generate.

    Attributes:
        prompt: token ids, at least one.
        params: sampling parameters.
        seed: 32 bits, of this completion alone.
        stop_ids: ids that end the text: the checkpoint's (unless ignored) and the request's.
        max_tokens: limit on new tokens, already within ``max_model_len``.
        name: what to call the request in an error.
        vision: the pictures among the prompt's tokens, None for text alone.
        constraint: makes what structured output is held to; None for free text.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    max_tokens: int
    name: str
    vision: VisionPrompt | None = None
    constraint: Factory | None = None


class Sequence:
    """A `Job` in progress. ``push`` takes new tokens; ``text`` grows by what is safe to show."""

    def __init__(self, job: Job, tokenizer: Tokenizer | None, index: int):
        self.job = job
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list[dict[int, Logprob]] | None = None if job.params.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.index = index
        self._decoder = tokenizer and tokenizer.stream(
            skip_special_tokens=job.params.skip_special_tokens
        )
        self._stop = StopStrings(
            job.params.stop_strings, include=job.params.include_stop_str_in_output
        )

    def push(self, tokens: list[int], logprobs: list[dict[int, Logprob]] | None = None) -> str:
        """Takes new tokens until one ends the text; returns the new text."""
        before = len(self.text)
        for i, token in enumerate(tokens):
            if self.finish_reason is not None:
                break
            self.token_ids.append(token)
            if self.logprobs is not None and logprobs is not None:
                self.logprobs.append(logprobs[i])
            self._one(token)
        return self.text[before:]

    def end(self, reason: FinishReason) -> str:
        """Ends the text here; returns the text that was held back."""
        before = len(self.text)
        self._finish(reason, None)
        return self.text[before:]

    def _one(self, token: int) -> None:
        count, params = len(self.token_ids), self.job.params
        may_stop = count > params.min_tokens
        stops = may_stop and token in self.job.stop_ids
        if self._decoder is not None and (not stops or params.include_stop_str_in_output):
            self.text += self._stop.push(self._decoder.push(token), stops=may_stop)
        if stops:
            named = token in (params.stop_token_ids or ())
            self._finish("stop", token if named else None)
        elif self._stop.matched is not None:
            self._finish("stop", self._stop.matched)
        elif count >= self.job.max_tokens:
            self._finish("length", None)

    def _finish(self, reason: FinishReason, stop: str | int | None) -> None:
        if self._decoder is not None and self._stop.matched is None:
            self.text += self._stop.push(self._decoder.finish())
            if self._stop.matched is None:
                self.text += self._stop.finish()
        self.finish_reason, self.stop_reason = reason, stop

    def output(self) -> CompletionOutput:
        """The result so far."""
        total = None
        if self.logprobs is not None:
            pairs = zip(self.logprobs, self.token_ids, strict=True)
            total = sum(by_id[token].logprob for by_id, token in pairs)
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=self.token_ids,
            cumulative_logprob=total,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
