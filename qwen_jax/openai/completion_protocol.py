"""The body of a completion. Source: OpenAI's API reference."""

from typing import Annotated, Any

import pydantic

from qwen_jax.openai.protocol import Common, known_fields

MAX_PROMPTS = 2048
_MAX_LOGPROBS = 20


def _check_prompt(prompt: Any) -> Any:
    """By hand: of the four types of a union pydantic tries all, and complains of each item."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("a prompt is a text, token ids, or a list of one of these")
    if isinstance(prompt[0], str | list) and len(prompt) > MAX_PROMPTS:
        raise ValueError(f"{len(prompt):,} prompts are more than {MAX_PROMPTS:,}")
    kind = type(prompt[0])
    if not all(type(item) is kind for item in prompt) or kind not in (str, int, list):
        raise ValueError("the items of prompt are all texts, all token ids, or all lists of them")
    for ids in prompt if kind is list else [prompt] if kind is int else []:
        if not ids or not all(type(token) is int for token in ids):
            raise ValueError("token ids are integers, at least one")
    return prompt


Prompts = Annotated[
    str | list[int] | list[str] | list[list[int]], pydantic.PlainValidator(_check_prompt)
]


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: Prompts
    suffix: str | None = None
    """Code behind the gap; the prompt is the code before it."""
    max_tokens: int | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, pydantic.Field(ge=0, le=_MAX_LOGPROBS)] | None = None
    best_of: int | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported; use n")
        if self.suffix is not None and (self.echo or not isinstance(self.prompt, str)):
            raise ValueError("suffix takes one prompt, a text, and excludes echo")
        if self.echo and self.stream and self.logprobs is not None:
            raise ValueError("echo with logprobs cannot be streamed; use stream=false")
        if self.max_tokens == 0 and (not self.echo or self.stream):
            raise ValueError("max_tokens=0 needs echo=true, and stream=false")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        first = self.prompt[0]
        return [self.prompt] if isinstance(first, int) else list(self.prompt)  # type: ignore[list-item]


KNOWN = known_fields(CompletionRequest)
