"""The body of a completion. Source: OpenAI's API reference."""

from typing import Annotated

import pydantic

from qwen_jax.server.protocol import Common, known_fields

MAX_PROMPTS = 2048
_MAX_LOGPROBS = 20

Tokens = Annotated[list[int], pydantic.Field(min_length=1)]
Many = pydantic.Field(min_length=1, max_length=MAX_PROMPTS)


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: str | Tokens | Annotated[list[str], Many] | Annotated[list[Tokens], Many]
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
