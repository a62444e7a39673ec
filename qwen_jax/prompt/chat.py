"""Conversations to prompts: the checkpoint's chat template, and token ids that users cannot forge.

Knows templates, messages and the tokenizer. Does not know the model, sampling or what comes back.
"""

import datetime
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes

from qwen_jax.prompt.chat_messages import log_dropped, normalize_messages, normalize_tools
from qwen_jax.prompt.sandbox import MAX_TEMPLATE_CHARS, TemplateEnvironment
from qwen_jax.prompt.sandbox_meter import Meter, render
from qwen_jax.prompt.taint import Twins
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.prompt.tokenizer_files import read_json_object

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_CONTINUE = "\ue0c0\ue0c1 "  # ends the message to continue; the space shows whether it was trimmed

# What running an untrusted template can raise, besides what Jinja itself names.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A checkpoint's chat template, compiled once, rendered in a sandbox with bounded work.

    `sources`: one template, or several by name: "default", and "tool_use", which is taken where
    tools are given. `special_tokens`: what `{{ eos_token }}` and the like stand for.
    """

    def __init__(
        self, sources: str | Mapping[str, str], *, special_tokens: Mapping[str, str] | None = None
    ):
        self._sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        if "default" not in self._sources:
            raise ValueError(f"no 'default' among the chat templates: {sorted(self._sources)}")
        self._special_tokens = dict(special_tokens or {})
        self._environment = TemplateEnvironment()
        self._compiled = {name: self._compile(name, text) for name, text in self._sources.items()}
        trees = map(self._environment.parse, self._sources.values())
        self.accepts_parts = all(_loops_over_content(tree) for tree in trees)

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str]) -> "ChatTemplate":
        """Read chat_template.jinja, else chat_template.json, else tokenizer_config.json's entry.

        Raises FileNotFoundError naming the three, ValueError for a template that is not valid.
        """
        directory = pathlib.Path(path)
        config = read_json_object(directory / "tokenizer_config.json", missing={})
        names = {name: _token_text(config.get(name)) for name in _TOKEN_NAMES}
        tokens = {name: text for name, text in names.items() if text is not None}
        if (directory / "chat_template.jinja").is_file():
            text = (directory / "chat_template.jinja").read_text(encoding="utf-8")
            return cls(text, special_tokens=tokens)
        for holder in (read_json_object(directory / "chat_template.json", missing={}), config):
            if "chat_template" in holder:
                return cls(_named(holder["chat_template"], directory), special_tokens=tokens)
        raise FileNotFoundError(
            f"{directory} has no chat template: looked for chat_template.jinja, chat_template.json "
            "and 'chat_template' in tokenizer_config.json (use generate with a plain prompt)"
        )

    @property
    def source(self) -> str:
        """The text of the template that is taken where tools are given."""
        return self._sources.get("tool_use", self._sources["default"])

    def render(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt as text, special tokens of users' text included: to look at, not to encode.

        kwargs reach the template (`enable_thinking=False`, `add_vision_id=True`). With
        `continue_final_message` (and `add_generation_prompt=False`) the last message stays open.
        Raises ValueError for a bad conversation and for whatever goes wrong in the template.
        """
        conversation = _Conversation(
            self, messages, tools, add_generation_prompt, continue_final_message, kwargs
        )
        return conversation.text()

    def _compile(self, name: str, text: str) -> jinja2.Template:
        if not isinstance(text, str) or len(text) > MAX_TEMPLATE_CHARS:
            what = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
            raise ValueError(
                f"chat template {name!r} is {what}, the limit is {MAX_TEMPLATE_CHARS} characters"
            )
        try:
            return self._environment.from_string(text)
        # MemoryError: what Python's compiler says of expressions nested too deep.
        except (
            jinja2.TemplateError,
            SyntaxError,
            RecursionError,
            MemoryError,
            ValueError,
        ) as error:
            raise ValueError(f"chat template {name!r} is not valid: {_describe(error)}") from error

    def _run(self, meter: Meter, variables: dict[str, Any]) -> str:
        name = "tool_use" if variables["tools"] and "tool_use" in self._compiled else "default"
        try:
            return render(self._compiled[name], meter, {**self._special_tokens, **variables})
        except _TEMPLATE_ERRORS as error:
            raise ValueError(f"the chat template failed: {_describe(error)}") from error


class _Conversation:
    """Everything one rendering needs, checked: rendered once plain and, to encode, once marked."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Messages,
        tools: Tools | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: dict[str, Any],
    ):
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message keeps the last message open and add_generation_prompt "
                "starts a new one: give add_generation_prompt=False"
            )
        self._template = template
        self._continue = continue_final_message
        self._messages = normalize_messages(messages, accepts_parts=template.accepts_parts)
        self._variables = {
            "messages": _left_open(self._messages) if continue_final_message else self._messages,
            "tools": normalize_tools(tools),
            **kwargs,
        }
        self._flags = {"add_generation_prompt": add_generation_prompt}
        self._now = datetime.datetime.now()

    def text(self) -> str:
        """The rendering as a reader sees it."""
        rendered = self._render({**self._variables, **self._flags})
        log_dropped(self._messages, rendered)
        return rendered

    def marked(self, twins: Twins) -> str:
        """The rendering in which twins stand for all that did not come from the template."""
        rendered = self._render({**twins.mark_all(self._variables), **self._flags})
        if twins.restore(rendered) != self.text():
            raise ValueError(
                "this chat template changes text in a way that would let a message forge special "
                "tokens: render() it and encode the text yourself if the messages are trusted"
            )
        return rendered

    def strings(self) -> list[str]:
        """Every string the caller gave, keys of mappings too."""
        return _strings(self._variables)

    def _render(self, variables: dict[str, Any]) -> str:
        rendered = self._template._run(Meter(self.strings(), self._now), variables)
        return _cut_at_open_end(rendered) if self._continue else rendered


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **kwargs: Any,
) -> list[int]:
    """The prompt's token ids: special tokens come from the template alone.

    Whatever the messages, tools or kwargs say, `<|im_end|>` in them is ten characters of text,
    also when it comes together from several strings; so are `<think>` and `<tool_call>`.
    """
    options = {
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        **kwargs,
    }
    return tokenizer.encode_parts(chat_parts(tokenizer, template, messages, **options))


def chat_parts(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **kwargs: Any,
) -> list[str | int]:
    """The prompt cut at the template's special tokens: plain strings and, between them, ids.

    Pictures are put in here, before `Tokenizer.encode_parts`: text that they bring joins the
    text around it. The arguments are those of `encode_chat`.
    """
    conversation = _Conversation(
        template, messages, tools, add_generation_prompt, continue_final_message, kwargs
    )
    alphabet = "".join(tokenizer.added)
    twins = Twins(alphabet, [*template._sources.values(), *conversation.strings()])
    parts = tokenizer.split(conversation.marked(twins))
    return [twins.restore(part) if isinstance(part, str) else part for part in parts]


def _left_open(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = dict(messages[-1])
    content = last["content"]
    if isinstance(content, str):
        last["content"] = content + _CONTINUE
    else:
        if not content or content[-1]["type"] != "text":
            raise ValueError("continue_final_message: the last message does not end in text")
        last["content"] = [*content[:-1], {**content[-1], "text": content[-1]["text"] + _CONTINUE}]
    return [*messages[:-1], last]


def _cut_at_open_end(rendered: str) -> str:
    before, mark, after = rendered.rpartition(_CONTINUE.rstrip())
    if not mark:
        raise ValueError("continue_final_message: the template left the last message out")
    return before if after.startswith(" ") else before.rstrip()


def _named(entry: Any, directory: pathlib.Path) -> str | dict[str, str]:
    if isinstance(entry, str):
        return entry
    try:
        return {item["name"]: item["template"] for item in entry}
    except (TypeError, KeyError):
        raise ValueError(
            f"{directory}: chat_template must be a string or a list of {{name, template}}"
        ) from None


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether a template walks through `content`, that is, takes it as a list of parts."""
    for loop in tree.find_all(nodes.For):
        match loop.iter:
            case nodes.Name(name="content") | nodes.Getattr(attr="content"):
                return True
            case nodes.Getitem(arg=nodes.Const(value="content")):
                return True
    return False


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []


def _describe(error: BaseException) -> str:
    line = getattr(error, "lineno", None)
    kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
    return f"{kind}{error}" + (f" (line {line})" if line else "")
