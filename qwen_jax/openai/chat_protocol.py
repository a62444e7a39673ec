"""The body of a chat completion: messages, tools, formats. Source: OpenAI's API reference."""

from typing import Annotated, Any, Literal

import pydantic

from qwen_jax.openai.protocol import FIRST, Common, Strict, known_fields, unsupported

MAX_TOOLS = 128  # as OpenAI


class TextPart(Strict):
    type: Literal["text"]
    text: str


class MediaUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class _MediaOptions(Strict):
    min_pixels: int | None = None
    max_pixels: int | None = None


class ImagePart(_MediaOptions):
    type: Literal["image_url"]
    image_url: MediaUrl | str


class VideoPart(_MediaOptions):
    type: Literal["video_url"]
    video_url: MediaUrl | str
    total_pixels: int | None = None
    fps: float | None = None
    num_frames: int | None = None


Part = Annotated[TextPart | ImagePart | VideoPart, pydantic.Field(discriminator="type")]


class CalledFunction(Strict):
    name: str
    arguments: str


class Call(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Strict):
    """Any role; what a role may hold is the chat template's affair (see `chat_messages`)."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], FIRST] | None = None
    name: str | None = None
    tool_calls: Annotated[list[Call], FIRST] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    # What clients send back of an answer, unread.
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class Function(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], FIRST]


class AllowedChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


NamedChoice = Annotated[NamedTool | AllowedChoice, pydantic.Field(discriminator="type")]


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    model_config = pydantic.ConfigDict(protected_namespaces=())
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = pydantic.Field(None, alias="schema")
    strict: bool | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, pydantic.Field(discriminator="type")]


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], pydantic.Field(min_length=1), FIRST]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=20)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[Tool], pydantic.Field(max_length=MAX_TOOLS), FIRST] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    """"none" switches thinking off where the template can; the others leave it to the model."""

    # vLLM's
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None

    raw: bool | None = None
    """The texts of the messages, joined, are the prompt: no template, and nothing parsed."""

    # Known, and refused unless they ask for nothing.
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    verbosity: str | None = None
    web_search_options: dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: Any = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        nothing = {
            "modalities": (["text"],),
            "audio": (),
            "prediction": (),
            "verbosity": ("medium",),
            "web_search_options": (),
            "functions": ([],),
            "function_call": ("none",),
        }
        for name in unsupported(self, nothing):
            hint = "; use tools and tool_choice" if name.startswith("function") else ""
            raise ValueError(f"{name} is not supported{hint}")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one")
        self._check_tools()
        if self.raw:
            self._check_raw()
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"tools: two functions are called {min(twice)!r:.80}")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice needs tools")
        for name in self.wanted_names():
            if name not in names:
                raise ValueError(f"tool_choice: there is no function {name!r:.80} among tools")

    def wanted_names(self) -> list[str]:
        """Functions that tool_choice names."""
        match self.tool_choice:
            case NamedTool(function=function):
                return [function.name]
            case AllowedChoice(allowed_tools=allowed):
                return [tool.function.name for tool in allowed.tools]
        return []

    def _check_raw(self) -> None:
        for name in ("tools", "chat_template_kwargs", "continue_final_message"):
            if getattr(self, name):
                raise ValueError(f"raw uses no chat template, so {name} says nothing; leave it out")
        for message in self.messages:
            if not isinstance(message.content, str) or message.tool_calls:
                raise ValueError("raw takes messages whose content is a text, and nothing else")


KNOWN = known_fields(
    ChatRequest, Message, TextPart, ImagePart, VideoPart, MediaUrl, Function, Tool, Call, JsonSchema
)
